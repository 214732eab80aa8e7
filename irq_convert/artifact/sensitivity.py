"""Files of sensitivities: what each choice for each weight is expected to cost the model.

The contract is formats/sensitivity-v1.md. A file is small, is read whole, and is checked as it is
read: who has a `Sensitivity` has finite damages that are not negative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.manifest import SOURCE_KEYS
from irq_convert.checkpoint.header import read_header
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec
from irq_convert.errors import IrqError
from irq_convert.version import PRODUCER

FORMAT, FORMAT_VERSION = "irq sensitivity", "1"
DEPTH = "irq.depth"
"""The tensor of the factors of depth, in the order of the others' names."""
_AGAIN = "measure it again"


@dataclass(frozen=True)
class Width:
    """A width at which every weight was quantized alike: the damage `expected` of that, and the KL
    divergence `kl` to the source that it had, with its standard error."""

    expected: float
    kl: float
    kl_se: float | None

    @property
    def factor(self) -> float:
        """What an expected damage at this width is worth."""
        return self.kl / self.expected if self.expected > 0 else 1.0


@dataclass(frozen=True)
class View:
    """How much what was seen overrules what was expected: exponents of two factors.

    `width`: that of a width; `depth`: that of where in the model a weight lies.
    """

    width: float = 1.0
    depth: float = 0.0


EXPECTED = View()


@dataclass(frozen=True)
class Sensitivity:
    """`damages` by the tensor's name in the files: float64 `[choices]`, nats a token.

    `choices` are their names, as "nf3/64"; `widths` by their bits. `settings` say how weights were
    quantized for it and on which text: another run can use the file only with the same.
    `source` says of which model, as the manifest of an artifact does. `depth`: by tensor, how much
    more than expected a weight where it lies was seen to count; 1 for those that are not there.
    """

    damages: Mapping[str, np.ndarray]
    choices: tuple[str, ...]
    widths: Mapping[int, Width]
    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    depth: Mapping[str, float] = field(default_factory=dict)

    def damage(self, tensor: str, choice: str, bits: int, view: View = EXPECTED) -> float:
        """What `choice`, of so many bits, costs at `tensor`, by what its width was seen to cost."""
        found = float(self.damages[tensor][self.choices.index(choice)])
        width = self.widths.get(bits)
        found *= self.depth.get(tensor, 1.0) ** view.depth
        return found * (width.factor**view.width if width else 1.0)


def write_sensitivity(path: Path, found: Sensitivity) -> int:
    """Write the file `path`, whole or not at all, and return its size.

    The same sensitivities give the same bytes. Raises `IrqError` when the disk refuses.
    """
    widths = {str(bits): [w.expected, w.kl, w.kl_se] for bits, w in found.widths.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": PRODUCER,
        "choices": json.dumps(list(found.choices)),
        "widths": json.dumps(widths, sort_keys=True),
        "settings": json.dumps(dict(found.settings), sort_keys=True),
        "source": json.dumps(dict(found.source), sort_keys=True),
    }
    names = sorted(found.damages)
    tensors = dict(found.damages)
    if found.depth:
        tensors[DEPTH] = np.array([found.depth.get(name, 1.0) for name in names])
    specs = [TensorSpec(name, "F64", tensors[name].shape) for name in sorted(tensors)]
    with ShardWriter(path, specs, metadata) as writer:
        for name, values in tensors.items():
            writer.write(name, np.ascontiguousarray(values, "<f8").tobytes())
    return writer.nbytes


def is_sensitivity(path: Path) -> bool:
    """Whether `path` is a file of this format, of any version."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except IrqError:
        return False


def read_sensitivity(path: Path) -> Sensitivity:
    """Read and check the file `path`.

    Raises `IrqError` for a file that is not of this format, breaks a rule of it (naming the tensor
    or the key), or cannot be read.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise IrqError(f"{path}: no file of sensitivities: give what --sensitivity has written")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise IrqError(
            f"{path}: of version {metadata.get('format_version')!r} of its format, and {PRODUCER} "
            f"reads version {FORMAT_VERSION}: update irq-convert, or {_AGAIN}"
        )
    choices = _parsed(path, metadata, "choices", list)
    widths = _widths(path, _parsed(path, metadata, "widths", dict, empty=True))
    source = _parsed(path, metadata, "source", dict)
    if not all(key in source for key in SOURCE_KEYS):
        raise IrqError(f"{path}: source in its metadata lacks {', '.join(SOURCE_KEYS)}: {_AGAIN}")
    damages = {}
    names = sorted(name for name in header.tensors if name != DEPTH)
    with TileReader() as reader:
        for name, info in header.tensors.items():
            wanted, of = len(choices), "choice"
            if name == DEPTH:
                wanted, of = len(names), "tensor"
            if info.dtype != "F64" or info.shape != (wanted,):
                raise IrqError(
                    f"{path}: {name} is {info.dtype} {list(info.shape)}, and it has to be F64 "
                    f"[{wanted}], one for each {of}: {_AGAIN}"
                )
            values = reader.read_tensor(info).numpy()
            if not np.isfinite(values).all() or (values < 0).any():
                raise IrqError(f"{path}: {name} has values that are no numbers from 0: {_AGAIN}")
            damages[name] = values
    settings = _parsed(path, metadata, "settings", dict)
    factors = damages.pop(DEPTH, None)
    depth = {} if factors is None else dict(zip(names, map(float, factors), strict=True))
    return Sensitivity(damages, tuple(map(str, choices)), widths, settings, source, depth)


def _parsed(
    path: Path, metadata: Mapping[str, str], key: str, kind: type, *, empty: bool = False
) -> Any:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind) or not (found or empty):
        raise IrqError(f"{path}: {key} in its metadata is no {kind.__name__} in JSON: {_AGAIN}")
    return found


def _widths(path: Path, found: Mapping[str, Any]) -> dict[int, Width]:
    try:
        widths = {int(bits): Width(*values) for bits, values in found.items()}
        sound = all(w.expected > 0 and w.kl > 0 for w in widths.values())
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise IrqError(f"{path}: widths in its metadata have no damage and KL above 0: {_AGAIN}")
    return widths
