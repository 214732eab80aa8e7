"""Which tensors of an artifact are quantized, and whether each has its parts and no others.

Decided from headers alone by formats/irq-v1.md, section 3. Problems are collected, not raised, so
that a verifier can list them all; a tensor with a problem is not among the sound ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from irq_convert.artifact.config import (
    PART_SUFFIXES,
    ModuleFormat,
    QuantizationConfig,
    module_name,
)
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.blocks import BlockShape
from irq_convert.core.parts import stored_parts
from irq_convert.errors import IrqError

WAY_OUT = "the artifact is damaged: convert or download it again"
ROUNDING = 1e-4
"""How far below 0 a figure may lie: a writer may compute entropies from rounded logarithms."""


@dataclass(frozen=True)
class StoredTensor:
    """One quantized tensor as it lies in the files.

    `name` is the source's; `leading` are the stored tensor's dimensions but the last, which `shape`
    flattens to rows; `parts` are the stored tensors by suffix, "" for the codes. Where
    `format.transposed`, the last two dimensions of the source are stored swapped.
    """

    name: str
    format: ModuleFormat
    shape: BlockShape
    leading: tuple[int, ...]
    parts: Mapping[str, TensorInfo]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the weights as they are stored, inputs last."""
        return (*self.leading, self.shape.cols)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of the weights in the source."""
        return swapped(self.stored_shape) if self.format.transposed else self.stored_shape

    @property
    def weights(self) -> int:
        return self.shape.rows * self.shape.cols

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Structure:
    """Sound quantized tensors, copied tensors, and one line for everything that is wrong."""

    quantized: tuple[StoredTensor, ...]
    copied: tuple[TensorInfo, ...]
    problems: tuple[str, ...]


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with its last two dimensions exchanged."""
    return (*shape[:-2], shape[-1], shape[-2])


def part_specs(name: str, shape: tuple[int, ...], fmt: ModuleFormat) -> dict[str, TensorSpec]:
    """The stored tensors of source tensor `name` of `shape`, by suffix."""
    shape = swapped(shape) if fmt.transposed else shape
    leading = shape[:-1]
    blocks = BlockShape(math.prod(leading), shape[-1], fmt.block_size, fmt.bits)
    parts = stored_parts(blocks, leading, fmt.scale_dtype, fmt.tau_dtype)
    return {
        suffix: TensorSpec(name + suffix, part.dtype.safetensors, part.shape)
        for suffix, part in parts.items()
    }


def sort_tensors(
    tensors: Mapping[str, TensorInfo],
    config: QuantizationConfig,
    manifest: Mapping[str, Any] | None,
) -> Structure:
    """Tell quantized from copied tensors and check each against `config` and `manifest`."""
    found = _suffixes(tensors)
    meant = [name for name in tensors if _is_quantized(tensors[name], found.get(name, set()))]
    sound: list[StoredTensor] = []
    problems: list[str] = []
    for name in meant:
        try:
            sound.append(_stored(name, found.get(name, set()), tensors, config))
        except IrqError as error:
            problems.append(str(error))
    listed = {} if manifest is None else manifest["tensors"]
    problems += _orphans(tensors, found, listed)
    problems += _overrides(meant, config)
    if manifest is not None:
        problems += _against_manifest(tensors, meant, sound, listed)
    parts = {name + suffix for name in meant for suffix in ("", *found.get(name, ()))}
    copied = tuple(info for name, info in tensors.items() if name not in parts)
    problems += _bare_codes(copied, config, listed)
    return Structure(tuple(sound), copied, tuple(problems))


def _suffixes(tensors: Mapping[str, TensorInfo]) -> dict[str, set[str]]:
    """Which part suffixes follow each stem; no name ends in two of them."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        for suffix in PART_SUFFIXES:
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), set()).add(suffix)
    return found


def _is_quantized(info: TensorInfo, suffixes: set[str]) -> bool:
    """By the specification `_scale` decides; the rest recognizes tensors that have lost it."""
    return "_scale" in suffixes or len(suffixes) > 1 or (bool(suffixes) and info.dtype == "U8")


def _stored(
    name: str, suffixes: set[str], tensors: Mapping[str, TensorInfo], config: QuantizationConfig
) -> StoredTensor:
    info, module = tensors[name], module_name(name)
    if module in config.dense_modules:
        part = name + min(suffixes)
        raise IrqError(
            f"{part} is in {tensors[part].shard.name}, but modules_to_not_convert names {module} "
            f"as not quantized: {WAY_OUT}"
        )
    fmt = config.module(module)
    if info.dtype != "U8" or not info.shape:
        raise IrqError(
            f"{name} in {info.shard.name} is {_words(info)}, but it has {name}{min(suffixes)} and "
            f"so must be packed codes, U8 [..., row_bytes]: {WAY_OUT}"
        )
    row_bytes = info.shape[-1]
    cols = fmt.columns_of(row_bytes)
    if -(-cols * fmt.bits // 8) != row_bytes:
        raise IrqError(
            f"{name} in {info.shard.name} has rows of {row_bytes} bytes, but its override says "
            f"columns {cols}, which {fmt.codebook} packs to {-(-cols * fmt.bits // 8)}: {WAY_OUT}"
        )
    leading = info.shape[:-1]
    if fmt.transposed and len(leading) < 1:
        raise IrqError(
            f"{name} in {info.shard.name} is {_words(info)}, but its override says transposed, "
            f"which needs two dimensions: {WAY_OUT}"
        )
    specs = part_specs(name, (*leading, cols), replace(fmt, transposed=False))
    what = f"{fmt.codebook} in blocks of {fmt.block_size}, shape {[*leading, cols]},"
    for spec in specs.values():
        _check_part(tensors.get(spec.name), spec, what)
    for suffix in sorted(suffixes - set(specs)):
        raise IrqError(f"{name}{suffix} is in the files, but {what} has no such part: {WAY_OUT}")
    shape = BlockShape(math.prod(leading), cols, fmt.block_size, fmt.bits)
    return StoredTensor(name, fmt, shape, leading, {s: tensors[name + s] for s in specs})


def _check_part(info: TensorInfo | None, spec: TensorSpec, what: str) -> None:
    wanted = f"{spec.dtype} {list(spec.shape)}"
    if info is None:
        raise IrqError(f"{spec.name} is missing: {what} needs it as {wanted}: {WAY_OUT}")
    if (info.dtype, info.shape) != (spec.dtype, spec.shape):
        raise IrqError(
            f"{spec.name} in {info.shard.name} is {_words(info)}, {what} needs {wanted}: {WAY_OUT}"
        )


def _words(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _orphans(
    tensors: Mapping[str, TensorInfo], found: Mapping[str, set[str]], listed: Mapping[str, Any]
) -> Iterator[str]:
    """Parts without their tensor. One lone name such as `logit_scale` is the source's own."""
    for stem, suffixes in found.items():
        certain = len(suffixes) > 1 or stem.endswith(".weight") or stem in listed
        if stem not in tensors and certain:
            part = tensors[stem + min(suffixes)]
            yield (
                f"{part.name} in {part.shard.name} is a part of {stem}, which is missing: {WAY_OUT}"
            )


def _overrides(meant: list[str], config: QuantizationConfig) -> Iterator[str]:
    modules = {module_name(name) for name in meant}
    for name in config.overrides:
        if name not in modules:
            yield (
                f"quantization_config overrides {name}, but no tensor of that module is quantized "
                f"in the files: {WAY_OUT}"
            )


def _bare_codes(
    copied: tuple[TensorInfo, ...], config: QuantizationConfig, listed: Mapping[str, Any]
) -> Iterator[str]:
    """Packed codes that have lost all other parts look like a copied U8 weight."""
    for info in copied:
        module = module_name(info.name)
        if (
            info.dtype == "U8"
            and len(info.shape) > 1
            and info.name != module
            and module not in config.dense_modules
            and info.name not in listed  # named already
        ):
            yield (
                f"{info.name} in {info.shard.name} is {_words(info)} without {info.name}_scale, "
                f"but modules_to_not_convert does not name {module}: {WAY_OUT}"
            )


def _against_manifest(
    tensors: Mapping[str, TensorInfo],
    meant: list[str],
    sound: list[StoredTensor],
    listed: Mapping[str, Any],
) -> Iterator[str]:
    for name in listed:
        if name not in meant:
            state = "not quantized" if name in tensors else "missing"
            yield f"{name} is quantized by {MANIFEST_NAME}, but {state} in the files: {WAY_OUT}"
    for name in meant:
        if name not in listed:
            yield f"{name} is quantized in the files, but {MANIFEST_NAME} lacks it: {WAY_OUT}"
    for tensor in sound:
        if tensor.name in listed:
            yield from _entry_problems(tensor, listed[tensor.name])


def _entry_problems(tensor: StoredTensor, entry: Any) -> Iterator[str]:
    where = f"{MANIFEST_NAME}: tensors[{tensor.name}]"
    if not isinstance(entry, dict):
        yield f"{where} is not an object: {WAY_OUT}"
        return
    known = {
        "shape": list(tensor.source_shape),
        "codebook": tensor.format.codebook,
        "block_size": tensor.format.block_size,
    }
    for key, stored in known.items():
        if entry.get(key) != stored:
            yield f"{where} says {key} {entry.get(key)!r}, the files hold {stored!r}: {WAY_OUT}"
    for key in ("entropy_plain", "entropy", "relative_error"):
        value: Any = entry.get(key)
        if not is_number(value) or value < -ROUNDING:
            yield f"{where} says {key} {value!r}, which must be a number of at least 0: {WAY_OUT}"


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; `true` is not."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
