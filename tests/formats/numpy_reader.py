"""A second reader of the irq format: numpy and the standard library, nothing else.

Written from `formats/irq-v1.md` alone, so that the page can be held against the package: a weight
that both decode to the same bits was not decoded by a shared mistake. Section numbers below are
those of the page. Speed is no aim; every rule is written the way the page words it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODEBOOKS = ("nf2", "nf3", "nf4", "int2", "int3", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
STATISTIC_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32"}
GROUP_SIZE = 256
GRID_LIMIT = 2**21
TILE = 1 << 20  # weights decoded at a time; a multiple of every block size and of 8

# bfloat16 and the 8-bit floats have no numpy type: their bits are handed out as unsigned integers.
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}

_NORMAL_FLOAT = {
    "nf2": (-1.0, -0.25256848336266113, 0.2525685131549835, 1.0),
    "nf3": (
        *(-1.0, -0.4786292016506195, -0.217141792178154, 0.0),
        *(0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0),
    ),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}


class FormatError(ValueError):
    """The artifact breaks a rule of the page; the message names the file or tensor and the rule."""


def levels(codebook: str) -> NDArray[np.float32]:
    """The values of a codebook (section 4), code 0 first: `[2**bits]` float32."""
    if codebook in _NORMAL_FLOAT:
        return np.array(_NORMAL_FLOAT[codebook], dtype=np.float32)
    top = 2 ** int(codebook[-1]) - 1
    numerators = 2 * np.arange(top + 1, dtype=np.float32) - np.float32(top)
    return numerators / np.float32(top)  # one IEEE division of integers: the nearest binary32


# --- section 2: the configuration -----------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the weight of one module is stored; `columns` is None where the formula gives it.

    `transposed`: the source has the last two dimensions the other way round.
    """

    codebook: str
    bits: int
    block_size: int
    scale_dtype: str
    tau_dtype: str
    columns: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Config:
    """A checked `quantization_config`, without `meta`."""

    default: Layout
    overrides: Mapping[str, Layout] = field(default_factory=dict)
    modules_to_not_convert: frozenset[str] = frozenset()

    def layout(self, tensor: str) -> Layout:
        """The layout of a tensor by its own name; module names are compared whole."""
        return self.overrides.get(module_name(tensor), self.default)


def module_name(tensor: str) -> str:
    """A tensor's name without its `.weight` ending, if it has one."""
    return tensor.removesuffix(".weight")


def _integer(raw: Any, where: str) -> int:
    """A JSON number without a fraction (1.0 is the JSON number 1; true is no number)."""
    whole = isinstance(raw, int) or (isinstance(raw, float) and raw.is_integer())
    if isinstance(raw, bool) or not whole:
        raise FormatError(f"{where}: {raw!r} is not an integer")
    return int(raw)


def _choice(raw: Any, allowed: tuple[str, ...], where: str) -> str:
    if not isinstance(raw, str) or raw not in allowed:
        raise FormatError(f"{where}: {raw!r} is not one of {', '.join(allowed)}")
    return raw


def _number(raw: Any, allowed: tuple[int, ...], where: str) -> int:
    value = _integer(raw, where)
    if value not in allowed:
        raise FormatError(f"{where}: {value} is not one of {', '.join(map(str, allowed))}")
    return value


def _object(raw: Any, known: set[str] | None, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: not an object")
    if known is not None and (unknown := sorted(set(raw) - known)):
        raise FormatError(f"{where}: unknown key {unknown[0]!r}")
    return raw


_LAYOUT_KEYS = ("codebook", "bits", "block_size", "scale_dtype", "tau_dtype")
_TOP_KEYS = ("quant_method", "format_version", "group_size", *_LAYOUT_KEYS)
_OPTIONAL_KEYS = ("modules_to_not_convert", "overrides", "meta")


def _layout_keys(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The checked layout keys that `raw` has."""
    found: dict[str, Any] = {}
    if "codebook" in raw:
        found["codebook"] = _choice(raw["codebook"], CODEBOOKS, f"{where}.codebook")
    if "bits" in raw:
        found["bits"] = _number(raw["bits"], (2, 3, 4), f"{where}.bits")
    if "block_size" in raw:
        found["block_size"] = _number(raw["block_size"], BLOCK_SIZES, f"{where}.block_size")
    for key in ("scale_dtype", "tau_dtype"):
        if key in raw:
            found[key] = _choice(raw[key], tuple(STATISTIC_DTYPES), f"{where}.{key}")
    if ("codebook" in found) != ("bits" in found):
        raise FormatError(f"{where}: codebook and bits are given together or not at all")
    if "bits" in found and found["bits"] != int(found["codebook"][-1]):
        raise FormatError(f"{where}: {found['bits']} bits do not agree with {found['codebook']}")
    return found


def check_config(raw: Any) -> Config:
    """Check a `quantization_config` by section 2 and return it; FormatError where it is refused."""
    top = _object(raw, {*_TOP_KEYS, *_OPTIONAL_KEYS}, "quantization_config")
    for key in _TOP_KEYS:
        if key not in top:
            raise FormatError(f"quantization_config: no key {key!r}")
    _choice(top["quant_method"], ("irq",), "quant_method")
    version = _integer(top["format_version"], "format_version")
    if version != 1:
        newer = " (a newer format)" if version > 1 else ""
        raise FormatError(f"format_version: {version} is not 1{newer}")
    _number(top["group_size"], (GROUP_SIZE,), "group_size")
    default = Layout(**_layout_keys(top, "quantization_config"))
    overrides: dict[str, Layout] = {}
    for module, entry in _object(top.get("overrides", {}), None, "overrides").items():
        where = f"overrides[{module!r}]"
        keys = _object(entry, {*_LAYOUT_KEYS, "columns", "transposed"}, where)
        overrides[module] = replace(default, **_layout_keys(keys, where))
        if "columns" in keys:
            columns = _integer(keys["columns"], f"{where}.columns")
            if columns < 1:
                raise FormatError(f"{where}.columns: {columns} is not positive")
            overrides[module] = replace(overrides[module], columns=columns)
        if "transposed" in keys:
            if not isinstance(keys["transposed"], bool):
                raise FormatError(f"{where}.transposed: not true or false")
            overrides[module] = replace(overrides[module], transposed=keys["transposed"])
    kept = top.get("modules_to_not_convert", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise FormatError("modules_to_not_convert: not a list of names")
    return Config(default, overrides, frozenset(kept))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error})") from error
    return _object(raw, None, where)


def _file(path: Path) -> bytes:
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    return path.read_bytes()


def read_config(folder: Path | str) -> Config:
    """Read and check the `quantization_config` of an artifact's `config.json`."""
    path = Path(folder) / "config.json"
    raw = _json(_file(path), str(path))
    if "quantization_config" not in raw:
        raise FormatError(f"{path}: no quantization_config")
    return check_config(raw["quantization_config"])


# --- section 1: the files -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: dtype by its safetensors name, and a view of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def array(self) -> NDArray[Any]:
        """The values, copied, in the machine's byte order; see DTYPES for what has no type."""
        stored = np.dtype(DTYPES[self.dtype])
        values = np.array(self.data).view(stored).reshape(self.shape)
        return values.astype(stored.newbyteorder("="), copy=False)


def _naturals(raw: Any, where: str) -> list[int]:
    if not isinstance(raw, list) or any(type(number) is not int or number < 0 for number in raw):
        raise FormatError(f"{where}: {raw!r} is not a list of natural numbers")
    return raw


def _stored(entry: Any, data: NDArray[np.uint8], where: str) -> tuple[int, int, Stored]:
    raw = _object(entry, {"dtype", "shape", "data_offsets"}, where)
    dtype = raw.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: cannot read dtype {dtype!r}")
    shape = _naturals(raw.get("shape"), f"{where}: shape")
    offsets = _naturals(raw.get("data_offsets"), f"{where}: data_offsets")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data.size:
        raise FormatError(f"{where}: data_offsets {offsets} are outside the file")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise FormatError(f"{where}: {end - begin} bytes do not hold {dtype} of shape {shape}")
    return begin, end, Stored(dtype, tuple(shape), data[begin:end])


def read_container(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the header metadata of one safetensors file; the data stay mapped."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.stat().st_size < 8:
        raise FormatError(f"{path}: too short for a safetensors header")
    mapped: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > mapped.size - 8:
        raise FormatError(f"{path}: the header is longer than the file")
    header = _json(mapped[8 : 8 + length].tobytes(), f"{path}: header")
    metadata = _object(header.pop("__metadata__", {}), None, f"{path}: __metadata__")
    data = mapped[8 + length :]
    entries = {name: _stored(raw, data, f"{path}: {name}") for name, raw in header.items()}
    reached = 0
    for begin, end, _ in sorted(entries.values(), key=lambda entry: entry[:2]):
        if begin != reached:
            raise FormatError(f"{path}: tensors overlap or leave a hole at byte {reached}")
        reached = end
    if reached != data.size:
        raise FormatError(f"{path}: {data.size - reached} bytes belong to no tensor")
    return {name: stored for name, (_, _, stored) in entries.items()}, metadata


_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index's tensor-to-file map, or None where the artifact is one file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None
    if (folder / "model.safetensors").exists():
        raise FormatError(f"{folder}: has both model.safetensors and an index; one is stale")
    raw = _object(_json(_file(index), str(index)).get("weight_map"), None, f"{index}: weight_map")
    for name, file in raw.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise FormatError(f"{index}: {name} lies in {file!r}, which is no shard's name")
    return raw


def read_tensors(folder: Path | str) -> dict[str, Stored]:
    """Every stored tensor of an artifact, parts included, whether it is sharded or one file."""
    folder = Path(folder)
    weight_map = _weight_map(folder)
    found: dict[str, Stored] = {}
    files = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
    for file in files:
        tensors, metadata = read_container(folder / file)
        if metadata.get("format") != "pt":
            raise FormatError(f'{folder / file}: the header metadata lack "format": "pt"')
        for name in tensors:
            if weight_map is not None and weight_map.get(name) != file:
                raise FormatError(f"{folder / file}: {name} is not there by the index")
        found.update(tensors)
    if weight_map is not None and (missing := sorted(set(weight_map) - set(found))):
        raise FormatError(f"{folder / weight_map[missing[0]]}: lacks {missing[0]}")
    return found


# --- sections 3 to 6: quantized tensors -----------------------------------------------------------


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """Codes `[rows, columns]` of the packed rows `[rows, row_bytes]` (section 5)."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")  # bit n of a row is stream[:, n]
    if stream[:, columns * bits :].any():
        raise FormatError("unused bits at the end of a row are not 0")
    codes = np.zeros((packed.shape[0], columns), dtype=np.uint8)
    for j in range(bits):
        codes |= stream[:, j : columns * bits : bits] << np.uint8(j)
    return codes


def _grid_values(codes: NDArray[np.uint8], grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Statistics `[rows, blocks_per_row]` from their 8-bit codes and grid (section 6)."""
    step, offset = grid[:, 0], grid[:, 1]
    if not (np.isfinite(step) & (step >= 0)).all():
        raise FormatError("a step is negative or not finite")
    if not (np.isfinite(offset) & (np.trunc(offset) == offset)).all():
        raise FormatError("an offset is not an integer")
    group = np.arange(codes.size).reshape(codes.shape) // GROUP_SIZE
    shifted = codes.astype(np.float32) + offset[group]
    if (np.abs(offset) >= GRID_LIMIT).any() or (np.abs(shifted) >= GRID_LIMIT).any():
        raise FormatError("an offset, or a code with its offset, is not below 2^21 in magnitude")
    with np.errstate(over="ignore"):
        return step[group] * shifted


def _parts(name: str, layout: Layout, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """The names and dtypes of a quantized tensor's parts; refuses missing and foreign ones."""
    parts = {name: "U8"}
    for kind, dtype in (("scale", layout.scale_dtype), ("tau", layout.tau_dtype)):
        parts[f"{name}_{kind}"] = STATISTIC_DTYPES[dtype]
        grid = f"{name}_{kind}_grid"
        if dtype == "uint8":
            parts[grid] = "F32"
        elif grid in tensors:
            raise FormatError(f"{grid}: no such part where {kind}_dtype is {dtype}")
    for part, dtype in parts.items():
        if part not in tensors:
            raise FormatError(f"{name}: is quantized, but {part} is missing")
        if tensors[part].dtype != dtype:
            raise FormatError(f"{part}: dtype {tensors[part].dtype}, should be {dtype}")
    return parts


def _columns(name: str, layout: Layout, packed: Stored) -> int:
    """The source's last dimension (section 3)."""
    least = 2 if layout.transposed else 1
    if len(packed.shape) < least:
        words = "two dimensions" if layout.transposed else "one dimension"
        raise FormatError(f"{name}: a quantized tensor has at least {words}")
    row_bytes = packed.shape[-1]
    columns = 8 * row_bytes // layout.bits if layout.columns is None else layout.columns
    if row_bytes != math.ceil(columns * layout.bits / 8):
        raise FormatError(f"{name}: rows of {row_bytes} bytes do not hold {columns} columns")
    return columns


def _statistics(
    kind: str, name: str, tensors: Mapping[str, Stored], leading: tuple[int, ...], blocks: int
) -> NDArray[np.float32]:
    """The scales or taus of a tensor as `[rows, blocks_per_row]` float32."""
    part, grid_part = f"{name}_{kind}", f"{name}_{kind}_grid"
    if tensors[part].shape != (*leading, blocks):
        raise FormatError(f"{part}: shape {tensors[part].shape}, should be {(*leading, blocks)}")
    rows = math.prod(leading)
    stored = tensors[part].array().reshape(rows, blocks)
    if tensors[part].dtype != "U8":
        values = stored.astype(np.float32)
    else:
        shape = (-(-rows * blocks // GROUP_SIZE), 2)
        if tensors[grid_part].shape != shape:
            raise FormatError(f"{grid_part}: shape {tensors[grid_part].shape}, should be {shape}")
        try:
            values = _grid_values(stored, tensors[grid_part].array())
        except FormatError as error:
            raise FormatError(f"{grid_part}: {error}") from error
    if kind == "scale" and (values < 0).any():
        raise FormatError(f"{part}: a scale is negative")
    return values


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into row and column ranges of about TILE weights, so memory stays small."""
    wide = min(max(columns, 1), TILE)
    high = max(1, TILE // wide)
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            yield slice(row, row + high), slice(column, min(column + wide, columns))


def _decode(name: str, layout: Layout, tensors: Mapping[str, Stored]) -> NDArray[np.float32]:
    """The dense values of a quantized tensor in its source's shape (section 4)."""
    columns, bits = _columns(name, layout, tensors[name]), layout.bits
    leading = tensors[name].shape[:-1]
    rows, blocks = math.prod(leading), -(-columns // layout.block_size)
    scale = _statistics("scale", name, tensors, leading, blocks)
    tau = _statistics("tau", name, tensors, leading, blocks)
    packed = tensors[name].data.reshape(rows, tensors[name].shape[-1])
    table = levels(layout.codebook)
    dense = np.empty((rows, columns), dtype=np.float32)
    for row, column in _tiles(rows, columns):
        # A tile begins at a multiple of 8 columns, so on a byte.
        held = packed[row, column.start * bits // 8 : math.ceil(column.stop * bits / 8)]
        try:
            codes = unpack(held, bits, column.stop - column.start)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        block = np.arange(column.start, column.stop) // layout.block_size
        with np.errstate(over="ignore", invalid="ignore"):
            product = table[codes] * scale[row][:, block]  # first rounding
            dense[row, column] = product + tau[row][:, block]  # second rounding
    dense = dense.reshape(*leading, columns)
    return np.ascontiguousarray(dense.swapaxes(-1, -2)) if layout.transposed else dense


def quantized_names(tensors: Mapping[str, Stored]) -> list[str]:
    """The tensors that have a scale beside them (section 3), in order of name."""
    return sorted(name for name in tensors if f"{name}_scale" in tensors)


def read_artifact(folder: Path | str) -> dict[str, NDArray[Any]]:
    """Every source tensor of an artifact by its source name and in its source shape.

    Quantized tensors come as float32. Copied ones come as they are stored, bfloat16 as the uint16
    of its bits and 8-bit floats as uint8. Raises FormatError where a rule of the page is broken.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    quantized = quantized_names(tensors)
    owner: dict[str, str] = {}
    for name in quantized:
        if module_name(name) in config.modules_to_not_convert:
            raise FormatError(f"{name}: is quantized and in modules_to_not_convert")
        for part in _parts(name, config.layout(name), tensors):
            if part in owner:
                raise FormatError(f"{part}: belongs to {owner[part]} and to {name}")
            owner[part] = name
    dense = {name: _decode(name, config.layout(name), tensors) for name in quantized}
    copied = {name: tensors[name].array() for name in tensors if name not in owner}
    return dense | copied


# --- section 7: the manifest ----------------------------------------------------------------------


def verify_files(folder: Path | str) -> list[str]:
    """Hold every file against the manifest's sizes and sha256; return the names of the files.

    Raises FormatError for a file that differs, is missing, or is not in the manifest.
    """
    folder = Path(folder)
    path = folder / "irq_manifest.json"
    manifest = _json(_file(path), str(path))
    if manifest.get("format") != "irq" or manifest.get("format_version") != 1:
        raise FormatError(f"{path}: not a manifest of irq, version 1")
    listed = _object(manifest.get("files"), None, f"{path}: files")
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    there = {p.as_posix() for p in files if not any(x.startswith(".") for x in p.parts)}
    there -= {"README.md", "irq_scores.json"}
    there.discard(path.name)
    for name in sorted(set(listed) ^ there):
        what = "is listed but missing" if name in listed else "is not in the manifest"
        raise FormatError(f"{folder / name}: {what}")
    for name, entry in sorted(listed.items()):
        file = folder / name
        expected = _object(entry, {"bytes", "sha256"}, f"{path}: {name}")
        if file.stat().st_size != expected.get("bytes"):
            raise FormatError(f"{file}: not {expected.get('bytes')} bytes long")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected.get("sha256"):
                raise FormatError(f"{file}: sha256 differs from the manifest")
    return sorted(listed)
