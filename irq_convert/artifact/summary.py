"""An artifact in rows: by layer, by kind of tensor or by tensor, with totals. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact, StoredTensor
from irq_convert.artifact.structure import is_number
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import UsageError

OTHER = "other"
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Row:
    """Some tensors of an artifact together.

    `weights` counts their numbers, `quantized_weights` those that are quantized, `bytes` everything
    stored for them. The last four are of the quantized ones, None where there are none and, but
    for `bits_per_weight`, where the artifact has no manifest. `entropy_plain` and `entropy` are
    bits a code before calibration and as stored. `relative_error` is a mean over weights, but in
    the row of totals what the manifest says: squared errors over squares of the whole model.
    """

    name: str
    tensors: int
    weights: int
    quantized_weights: int
    bytes: int
    codebooks: tuple[str, ...]
    bits_per_weight: float | None = None
    entropy_plain: float | None = None
    entropy: float | None = None
    relative_error: float | None = None

    @property
    def share(self) -> float:
        """Part of the weights that is quantized, 0 to 1."""
        return self.quantized_weights / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "share": self.share}


def layer_name(tensor: str) -> str:
    """The numbered block a tensor belongs to, such as "model.layers.0"; "other" for none."""
    found = _NUMBER.search(tensor)
    return tensor[: found.end()] if found else OTHER


def kind_name(tensor: str) -> str:
    """What a tensor is in its layer, such as "q_proj": the last part of its module's name."""
    parts = [part for part in module_name(tensor).split(".") if not part.isdigit()]
    return parts[-1] if parts else tensor


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts "layers.2" before "layers.10", and "other" last."""
    pieces = re.split(r"(\d+)", name)
    key: list[tuple[int, int | str]] = [(1 if name == OTHER else 0, 0)]
    return key + [(0, int(p)) if p.isdecimal() else (1, p) for p in pieces if p]


def summarize(artifact: Artifact, by: str = "layer") -> list[Row]:
    """Rows of `artifact` by "layer", "kind" or "tensor", in natural order.

    Copied tensors count in their layer; by kind and by tensor, where none beside them is
    quantized, they are together in the last row, "other". Raises `UsageError` for another `by`.
    """
    if by not in _GROUPINGS:
        raise UsageError(f"cannot summarize by {by!r}: choose one of {', '.join(_GROUPINGS)}")
    group = _GROUPINGS[by]
    quantized = _grouped(artifact.quantized, group)
    copied = _grouped(
        artifact.copied,
        lambda name: group(name) if by == "layer" or group(name) in quantized else OTHER,
    )
    names = sorted({*quantized, *copied}, key=natural_key)
    return [_row(n, quantized.get(n, []), copied.get(n, []), artifact.manifest) for n in names]


def summarize_all(artifact: Artifact) -> Row:
    """The row of totals."""
    row = _row("total", artifact.quantized, artifact.copied, artifact.manifest)
    noted = (artifact.manifest or {}).get("totals", {}).get("relative_error")
    known = float(noted) if is_number(noted) else row.relative_error
    return Row(**{**vars(row), "relative_error": known})


def statistics(artifact: Artifact) -> Mapping[str, Mapping[str, Any]]:
    """The manifest's entries of quantized tensors by name; empty where there is no manifest."""
    return artifact.manifest["tensors"] if artifact.manifest is not None else {}


_GROUPINGS: dict[str, Callable[[str], str]] = {
    "layer": layer_name,
    "kind": kind_name,
    "tensor": module_name,
}


def _grouped(tensors: Iterable[Any], group: Callable[[str], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for tensor in tensors:
        groups.setdefault(group(tensor.name), []).append(tensor)
    return groups


def _row(
    name: str,
    quantized: Iterable[StoredTensor],
    copied: Iterable[TensorInfo],
    manifest: Mapping[str, Any] | None,
) -> Row:
    stored, plain = list(quantized), list(copied)
    weights = sum(tensor.weights for tensor in stored)
    nbytes = sum(tensor.nbytes for tensor in stored)
    means = _means(stored, weights, manifest) if manifest is not None and weights else {}
    return Row(
        name=name,
        tensors=len(stored) + len(plain),
        weights=weights + sum(info.numel for info in plain),
        quantized_weights=weights,
        bytes=nbytes + sum(info.nbytes for info in plain),
        codebooks=tuple(sorted({tensor.format.codebook for tensor in stored})),
        bits_per_weight=8 * nbytes / weights if weights else None,
        **means,
    )


def _means(
    stored: list[StoredTensor], weights: int, manifest: Mapping[str, Any]
) -> dict[str, float]:
    entries = manifest["tensors"]
    return {
        key: math.fsum(entries[t.name][key] * t.weights for t in stored) / weights
        for key in ("entropy_plain", "entropy", "relative_error")
    }
