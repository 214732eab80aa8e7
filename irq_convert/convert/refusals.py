"""What a conversion refuses before it begins, from headers and options alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from irq_convert.artifact.config import PART_SUFFIXES
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.convert.options import ConvertOptions
from irq_convert.errors import IrqError, UsageError

if TYPE_CHECKING:
    from irq_convert.convert.plan import TensorPlan


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `IrqError` for a source whose config.json says that it is quantized already."""
    config = checkpoint.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for found in filter(None, (part.get("quantization_config") for part in parts)):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise IrqError(
            f"{checkpoint.folder}: already quantized (quant_method {method!r}); give the original "
            "model, in float32, bfloat16 or float16"
        )


def check_expressions(
    options: ConvertOptions, names: frozenset[str], checkpoint: Checkpoint
) -> None:
    """Raise `UsageError` for an expression that matches none of `names`, the linear weights."""
    for option, patterns in (
        ("--keep", options.keep),
        ("--bits-for", tuple(pattern for pattern, _ in options.bits_for)),
    ):
        for pattern in patterns:
            if any(re.search(pattern, name) for name in names):
                continue
            elsewhere = [name for name in checkpoint.tensors if re.search(pattern, name)]
            hint = f"; {elsewhere[0]} is copied in any case" if elsewhere else ""
            example = min(names) if names else "none"
            raise UsageError(
                f"{option} {pattern!r} matches no tensor that would be quantized{hint} "
                f"(they are named like {example})"
            )


def check_names(tensors: Sequence[TensorPlan]) -> None:
    """No source tensor may bear a name that means a part of a quantized one."""
    names = {tensor.info.name for tensor in tensors}
    for tensor in tensors:
        for suffix in PART_SUFFIXES:
            if tensor.spec and tensor.info.name + suffix in names:
                raise IrqError(
                    f"{tensor.info.name}{suffix} exists in the source, so {tensor.info.name} "
                    "cannot be quantized (is the source quantized already?): keep it with --keep"
                )


def check_copied(tensors: Sequence[TensorPlan]) -> None:
    """A copied tensor of bytes must not look like the codes of a quantized one."""
    names = {tensor.info.name for tensor in tensors}
    for tensor in tensors:
        if tensor.spec is None and tensor.info.dtype == "U8":
            for suffix in PART_SUFFIXES:
                if tensor.info.name + suffix in names:
                    raise IrqError(
                        f"{tensor.info.name} is U8 and has {tensor.info.name}{suffix} beside it: "
                        "the source is already quantized; give the original model"
                    )
