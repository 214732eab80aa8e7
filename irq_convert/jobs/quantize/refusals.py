"""What quantizing refuses before it begins, from headers and options alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from irq_convert.artifact.config import PART_SUFFIXES
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions


def check_expressions(
    options: QuantizeOptions, names: Collection[str], tensors: Iterable[str]
) -> None:
    """Raise `UsageError` for an expression that matches none of `names`, the linear weights.

    `tensors` are all that the source has.
    """
    every = list(tensors)
    for option, patterns in (
        ("--keep", options.keep),
        ("--bits-for", tuple(pattern for pattern, _ in options.bits_for)),
    ):
        for pattern in patterns:
            if any(re.search(pattern, name) for name in names):
                continue
            elsewhere = [name for name in every if re.search(pattern, name)]
            hint = f"; {elsewhere[0]} is copied in any case" if elsewhere else ""
            example = min(names) if names else "none"
            raise UsageError(
                f"{option} {pattern!r} matches no tensor that would be quantized{hint} "
                f"(they are named like {example})"
            )


def check_names(tensors: Mapping[str, TensorInfo], quantized: Collection[str]) -> None:
    """No tensor of the source may bear a name that means a part of a quantized one."""
    for name in quantized:
        for suffix in PART_SUFFIXES:
            if name + suffix in tensors:
                raise IrqError(
                    f"{name}{suffix} exists in the source, so {name} cannot be quantized (is the "
                    "source quantized already?): keep it with --keep"
                )


def check_copied(tensors: Mapping[str, TensorInfo], quantized: Collection[str]) -> None:
    """A copied tensor of bytes must not look like the codes of a quantized one."""
    for name, info in tensors.items():
        if info.dtype != "U8" or name in quantized:
            continue
        for suffix in PART_SUFFIXES:
            if name + suffix in tensors:
                raise IrqError(
                    f"{name} is U8 and has {name}{suffix} beside it: the source is already "
                    "quantized; give the original model"
                )
