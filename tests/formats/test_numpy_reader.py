"""The page `formats/irq-v1.md` made executable: the numpy reader against artifacts made by hand.

The encoder below knows nothing of the reader: rows are packed as Python integers, files are written
with `struct` and `json`, and expected values are written out or computed one weight at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable
from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.formats import numpy_reader
from tests.formats.numpy_reader import (
    FormatError,
    check_config,
    read_artifact,
    read_config,
    verify_files,
)
from tests.paths import ROOT

FORMATS = ROOT / "formats"
VECTORS = FORMATS / "vectors"
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((FORMATS / "irq-config.schema.json").read_text(encoding="utf-8"))
)

Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors dtype, shape, bytes


# --- a tiny writer --------------------------------------------------------------------------------


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "quant_method": "irq",
        "format_version": 1,
        "codebook": "nf3",
        "bits": 3,
        "block_size": 16,
        "group_size": 256,
        "scale_dtype": "float32",
        "tau_dtype": "float32",
    }
    return base | changes


def container(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        begin = len(data)
        data += raw
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def artifact(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_type": "toy", "quantization_config": config(**changes)})
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(container(tensors, {"format": "pt"}))
    return folder


def f32(shape: tuple[int, ...], *values: float) -> Tensor:
    return "F32", shape, struct.pack(f"<{len(values)}f", *values)


def f16(shape: tuple[int, ...], *values: float) -> Tensor:
    return "F16", shape, struct.pack(f"<{len(values)}e", *values)


def u8(shape: tuple[int, ...], *values: int) -> Tensor:
    return "U8", shape, bytes(values)


def pack(rows: Iterable[Iterable[int]], bits: int) -> bytes:
    """Each row as one big integer with code c at bit c * bits, written little-endian."""
    packed = b""
    for row in rows:
        codes = list(row)
        number = sum(code << (c * bits) for c, code in enumerate(codes))
        packed += number.to_bytes(ceil(len(codes) * bits / 8), "little")
    return packed


def one_block(code_bytes: bytes, scale: float = 1.0, tau: float = 0.0) -> dict[str, Tensor]:
    """A one-row matrix `w.weight` of one block with float32 statistics."""
    return {
        "w.weight": u8((1, len(code_bytes)), *code_bytes),
        "w.weight_scale": f32((1, 1), scale),
        "w.weight_tau": f32((1, 1), tau),
    }


# --- values written out by hand -------------------------------------------------------------------


def test_three_bit_codes_cross_bytes(tmp_path: Path) -> None:
    # Codes 7 0 5 2 6 1 4 3; most significant bit on the left, as on the page:
    #   01 000 111 | 1 110 010 1 | 011 100 00
    folder = artifact(tmp_path, one_block(b"\x47\xe5\x70", scale=7.0), codebook="int3")
    found = read_artifact(folder)["w.weight"]
    assert found.dtype == np.float32
    assert found.tolist() == [[7.0, -7.0, 3.0, -3.0, 5.0, -5.0, 1.0, -1.0]]


def test_four_and_two_bit_codes_begin_low(tmp_path: Path) -> None:
    four = artifact(tmp_path / "4", one_block(b"\x1f\x80", 15.0), codebook="int4", bits=4)
    assert read_artifact(four)["w.weight"].tolist() == [[15.0, -13.0, -15.0, 1.0]]
    two = artifact(tmp_path / "2", one_block(b"\x1b", 3.0, 0.5), codebook="int2", bits=2)
    assert read_artifact(two)["w.weight"].tolist() == [[3.5, 1.5, -0.5, -2.5]]


def test_normal_float_scale_and_tau(tmp_path: Path) -> None:
    # Codes 0 3 7 0 0 0 0 0: levels -1, 0 and 1.
    folder = artifact(tmp_path, one_block(pack([[0, 3, 7, 0, 0, 0, 0, 0]], 3), 2.0, 0.5))
    assert read_artifact(folder)["w.weight"].tolist() == [[-1.5, 0.5, 2.5] + 5 * [-1.5]]


def test_two_roundings_and_not_one(tmp_path: Path) -> None:
    level = Fraction(float(np.float32(0.16093020141124725)))
    exact = level * 7 - 1
    twice, fused = float.fromhex("0x1.031870p-3"), float.fromhex("0x1.03186ap-3")
    assert abs(exact - Fraction(fused)) < abs(exact - Fraction(twice))  # rounded once: `fused`
    folder = artifact(tmp_path, one_block(pack([8 * [4]], 3), 7.0, -1.0))
    assert read_artifact(folder)["w.weight"].tolist() == [8 * [twice]]


def test_block_of_zeros_is_positive_zero(tmp_path: Path) -> None:
    found = read_artifact(artifact(tmp_path, one_block(b"\x00\x00\x00", 0.0, 0.0)))["w.weight"]
    assert found.view(np.uint32).tolist() == [8 * [0]]


def test_short_last_block(tmp_path: Path) -> None:
    tensors = {
        "w.weight": u8((1, 6), *(6 * b"\xff")),  # 24 columns, two nf2 blocks of 16 and 8
        "w.weight_scale": f32((1, 2), 1.0, 2.0),
        "w.weight_tau": f32((1, 2), 0.0, 0.25),
    }
    folder = artifact(tmp_path, tensors, codebook="nf2", bits=2)
    assert read_artifact(folder)["w.weight"].tolist() == [16 * [1.0] + 8 * [2.25]]


def test_groups_cross_rows(tmp_path: Path) -> None:
    # 6 rows of 100 blocks: group 1 begins at block 256 (row 2, block 56), group 2 at 512 (row 5,
    # block 12). Scales 1(3+1), 2(3+0), .5(3-1); taus 1(3+0), 1(3-3), 1(3-4).
    tensors = {
        "w.weight": u8((6, 400), *(2400 * b"\xff")),
        "w.weight_scale": u8((6, 100), *(600 * b"\x03")),
        "w.weight_scale_grid": f32((3, 2), 1.0, 1.0, 2.0, 0.0, 0.5, -1.0),
        "w.weight_tau": u8((6, 100), *(600 * b"\x03")),
        "w.weight_tau_grid": f32((3, 2), 1.0, 0.0, 1.0, -3.0, 1.0, -4.0),
    }
    uint8 = {"scale_dtype": "uint8", "tau_dtype": "uint8"}
    folder = artifact(tmp_path, tensors, codebook="nf2", bits=2, **uint8)
    found = read_artifact(folder)["w.weight"]
    assert found.shape == (6, 1600)
    assert (found.ravel()[: 256 * 16] == 7.0).all()
    assert found[2, 895] == 7.0
    assert found[2, 896] == 6.0
    assert (found.ravel()[256 * 16 : 512 * 16] == 6.0).all()
    assert found[5, 191] == 6.0
    assert (found[5, 192:] == 0.0).all()


def test_eight_bit_statistic_rounds_once_after_an_exact_sum(tmp_path: Path) -> None:
    # binary32(0.1) * (2 + 13) = 1.50000002..., which rounds to 1.5; the sum of two rounded
    # products would be 1.5000001.
    tensors = one_block(b"\xff\xff\xff") | {
        "w.weight_scale": u8((1, 1), 2),
        "w.weight_scale_grid": f32((1, 2), 0.1, 13.0),
    }
    folder = artifact(tmp_path, tensors, scale_dtype="uint8")
    assert read_artifact(folder)["w.weight"].tolist() == [8 * [1.5]]


def test_float16_taus(tmp_path: Path) -> None:
    tensors = one_block(pack([[7, 0, 7, 0, 7, 0, 7, 0]], 3)) | {"w.weight_tau": f16((1, 1), 0.1)}
    found = read_artifact(artifact(tmp_path, tensors, tau_dtype="float16"))["w.weight"]
    assert found.tolist() == [4 * [1.0999755859375, -0.9000244140625]]  # float16 of a tenth


def test_columns_override(tmp_path: Path) -> None:
    # Seven 3-bit codes fill 21 of 24 bits; the formula would say eight.
    tensors = one_block(pack([[0, 1, 2, 3, 4, 5, 6]], 3), 7.0)
    seven = {"overrides": {"w": {"columns": 7}}}
    found = read_artifact(artifact(tmp_path, tensors, codebook="int3", **seven))["w.weight"]
    assert found.tolist() == [[-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0]]


@pytest.mark.parametrize(("row_bytes", "columns"), [(1, 2), (2, 5), (3, 8), (4, 10), (0, 0)])
def test_columns_by_the_formula(tmp_path: Path, row_bytes: int, columns: int) -> None:
    blocks = ceil(columns / 16)
    tensors = {
        "v": u8((row_bytes,), *bytes(row_bytes)),
        "v_scale": f32((blocks,), *(blocks * [1.0])),
        "v_tau": f32((blocks,), *(blocks * [0.0])),
    }
    assert read_artifact(artifact(tmp_path, tensors))["v"].tolist() == columns * [-1.0]


def test_three_dimensions_without_weight_ending(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        name: u8((2, 2, 1), 0b1110_0100, 0, 0b1111_1111, 0b0000_0011),
        f"{name}_scale": f32((2, 2, 1), 3.0, 6.0, 3.0, 9.0),
        f"{name}_tau": f32((2, 2, 1), 0.0, 0.0, 1.0, 0.0),
    }
    two = {"overrides": {name: {"codebook": "int2", "bits": 2}}}
    found = read_artifact(artifact(tmp_path, tensors, **two))[name]
    assert found.tolist() == [
        [[-3.0, -1.0, 1.0, 3.0], [-6.0, -6.0, -6.0, -6.0]],
        [[4.0, 4.0, 4.0, 4.0], [9.0, -9.0, -9.0, -9.0]],
    ]


def test_override_names_are_compared_whole(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in ("a.b", "x.a.b", "a.b.c"):
        row = one_block(b"\xff\xff\xff")
        tensors |= {key.replace("w.weight", f"{name}.weight"): part for key, part in row.items()}
    four = {"overrides": {"a.b": {"codebook": "int4", "bits": 4}}}
    found = read_artifact(artifact(tmp_path, tensors, **four))
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {"a.b.weight": (1, 6), "x.a.b.weight": (1, 8), "a.b.c.weight": (1, 8)}


def test_no_rows(tmp_path: Path) -> None:
    tensors = {"w": u8((0, 3)), "w_scale": f32((0, 1)), "w_tau": f32((0, 1))}
    assert read_artifact(artifact(tmp_path, tensors))["w"].shape == (0, 8)


# --- copied tensors and shards --------------------------------------------------------------------


def test_copied_tensors(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = one_block(b"\x00\x00\x00") | {
        "bf16": ("BF16", (2,), b"\x80\x3f\x00\xc0"),
        "half": f16((1, 2), 1.0, -2.0),
        "long": ("I64", (), struct.pack("<q", -5)),
        "flag": ("BOOL", (2,), b"\x01\x00"),
        "fp8": ("F8_E4M3", (3,), b"\x01\x7f\x80"),
        "none": f32((0, 4)),
        "logit_scale": f32((), 2.5),  # a scale of nothing: there is no tensor `logit`
    }
    found = read_artifact(artifact(tmp_path, tensors))
    assert set(found) == set(tensors) - {"w.weight_scale", "w.weight_tau"}
    assert found["bf16"].dtype == np.uint16
    assert found["bf16"].tolist() == [0x3F80, 0xC000]
    assert found["half"].dtype == np.float16
    assert found["half"].tolist() == [[1.0, -2.0]]
    assert found["long"].shape == ()
    assert found["long"] == -5
    assert found["flag"].tolist() == [True, False]
    assert found["fp8"].tolist() == [1, 0x7F, 0x80]
    assert found["none"].shape == (0, 4)
    assert found["logit_scale"] == 2.5


def sharded(folder: Path) -> Path:
    """An artifact of two shards with the parts of one tensor in both."""
    parts = one_block(b"\x47\xe5\x70", scale=7.0) | {"norm": f32((1,), 3.0)}
    artifact(folder, {}, codebook="int3")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in ((1, ["w.weight", "norm"]), (2, ["w.weight_scale", "w.weight_tau"])):
        file = f"model-{number:05}-of-00002.safetensors"
        held = container({name: parts[name] for name in names}, {"format": "pt"})
        (folder / file).write_bytes(held)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 15}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded(tmp_path: Path) -> None:
    found = read_artifact(sharded(tmp_path))
    assert set(found) == {"w.weight", "norm"}
    assert found["w.weight"].tolist() == [[7.0, -7.0, 3.0, -3.0, 5.0, -5.0, 1.0, -1.0]]
    assert found["norm"].tolist() == [3.0]


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(extra="model-00002-of-00002.safetensors"), "lacks extra"),
        (lambda m: m.update(norm="model-00002-of-00002.safetensors"), "not there by the index"),
        (lambda m: m.pop("norm"), "not there by the index"),
        (lambda m: m.update(extra="model-00003-of-00003.safetensors"), "no such file"),
        (lambda m: m.update(norm="../model-00001-of-00002.safetensors"), "no shard's name"),
    ],
)
def test_index_and_shards_must_agree(
    tmp_path: Path, edit: Callable[[dict[str, str]], object], message: str
) -> None:
    edit_index(sharded(tmp_path), edit)
    with pytest.raises(FormatError, match=message):
        read_artifact(tmp_path)


def test_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors").write_bytes(container({}, {"format": "pt"}))
    with pytest.raises(FormatError, match="one is stale"):
        read_artifact(tmp_path)


# --- what is refused ------------------------------------------------------------------------------

GRID = {
    "w.weight_scale": u8((1, 1), 1),
    "w.weight_scale_grid": f32((1, 2), 1.0, 0.0),
}
UINT8 = {"scale_dtype": "uint8"}
TAU_GRID = {
    "w.weight_tau": u8((1, 1), 255),  # the sum is small enough, the offset is not
    "w.weight_tau_grid": f32((1, 2), 1.0, -(2.0**21)),
}
NESTED = GRID | {
    "w.weight_scale_scale": u8((1, 1), 1),
    "w.weight_scale_scale_grid": f32((1, 2), 1.0, 0.0),
    "w.weight_scale_tau": f32((1, 1), 0.0),
}


def columns(number: int) -> dict[str, Any]:
    return {"overrides": {"w": {"columns": number}}}


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ({"w.weight_tau": None}, {}, "w.weight_tau is missing"),
        ({"w.weight": ("I8", (1, 3), b"\0\0\0")}, {}, "w.weight: dtype I8, should be U8"),
        ({"w.weight_scale": f16((1, 1), 1.0)}, {}, "dtype F16, should be F32"),
        ({"w.weight_scale": u8((1, 1), 1)}, UINT8, "scale_grid is missing"),
        ({"w.weight_scale_grid": f32((1, 2), 1.0, 0.0)}, {}, "no such part"),
        ({"w.weight_tau_grid": f32((1, 2), 1.0, 0.0)}, {}, "no such part"),
        ({"w.weight_scale": f32((1, 2), 1.0, 1.0)}, {}, r"shape \(1, 2\), should be \(1, 1\)"),
        ({"w.weight_tau": f32((1,), 1.0)}, {}, r"shape \(1,\), should be \(1, 1\)"),
        ({"w.weight_tau": f32((2, 1), 1.0, 1.0)}, {}, r"shape \(2, 1\), should be \(1, 1\)"),
        ({"w.weight": u8((), 1)}, {}, "at least one dimension"),
        ({}, columns(9), "rows of 3 bytes do not hold 9 columns"),
        ({}, columns(5), "rows of 3 bytes do not hold 5 columns"),
        ({"w.weight": u8((1, 3), 0, 0, 0x20)}, columns(7), "unused bits"),
        ({"w.weight": u8((1, 2), 0, 0x80)}, {}, "unused bits"),
        ({"w.weight_scale": f32((1, 1), -1.0)}, {}, "a scale is negative"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), 1.0, -2.0)}, UINT8, "a scale is negative"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), -1.0, 0.0)}, UINT8, "step is negative"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), np.inf, 0.0)}, UINT8, "not finite"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), np.nan, 0.0)}, UINT8, "not finite"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), 1.0, 0.5)}, UINT8, "not an integer"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), 1.0, 2.0**21)}, UINT8, "2\\^21"),
        (GRID | {"w.weight_scale_grid": f32((1, 2), 1.0, 2.0**21 - 1)}, UINT8, "2\\^21"),
        (TAU_GRID, {"tau_dtype": "uint8"}, "2\\^21"),
        (GRID | {"w.weight_scale_grid": f32((2, 2), 1.0, 0.0, 1.0, 0.0)}, UINT8, "should be"),
        (GRID | {"w.weight_scale_grid": f32((2,), 1.0, 0.0)}, UINT8, "should be"),
        (GRID | {"w.weight_scale_grid": f16((1, 2), 1.0, 0.0)}, UINT8, "should be F32"),
        ({}, {"modules_to_not_convert": ["w"]}, "modules_to_not_convert"),
        (NESTED, UINT8, "w.weight_scale: belongs to w.weight and to w.weight_scale"),
    ],
)
def test_refused(
    tmp_path: Path, parts: dict[str, Tensor | None], changes: dict[str, Any], message: str
) -> None:
    good = one_block(b"\x00\x00\x00")
    assert read_artifact(artifact(tmp_path, good))["w.weight"].shape == (1, 8)
    merged = {name: part for name, part in (good | parts).items() if part is not None}
    with pytest.raises(FormatError, match=message):
        read_artifact(artifact(tmp_path, merged, **changes))


def test_a_grid_that_fits_is_read(tmp_path: Path) -> None:
    folder = artifact(tmp_path, one_block(b"\xff\xff\xff") | GRID, **UINT8)
    assert read_artifact(folder)["w.weight"].tolist() == [8 * [1.0]]


def entry(**changes: Any) -> bytes:
    """A container of one tensor of 4 data bytes, its header entry changed."""
    raw = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes
    text = json.dumps({"__metadata__": {"format": "pt"}, "t": raw}).encode()
    return struct.pack("<Q", len(text)) + text + b"abcd"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x01\x00", "too short"),
        (struct.pack("<Q", 100) + b"{}", "longer than the file"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 14) + b'{"a":1, "a":2}', "given twice"),
        (entry(dtype="F4"), "cannot read dtype"),
        (entry(shape=[5]), "do not hold"),
        (entry(shape=[-4]), "natural numbers"),
        (entry(shape=[2.0, 2]), "natural numbers"),
        (entry(data_offsets=[0, 5]), "outside the file"),
        (entry(data_offsets=[1, 4], shape=[3]), "hole"),
        (entry(data_offsets=[0, 3], shape=[3]), "belong to no tensor"),
        (entry(extra=1), "unknown key"),
        (container({}, None), "format"),
        (container({}, {"format": "np"}), "format"),
    ],
)
def test_bad_containers(tmp_path: Path, raw: bytes, message: str) -> None:
    artifact(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(entry())
    assert read_artifact(tmp_path)["t"].tobytes() == b"abcd"
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        read_artifact(tmp_path)


def test_containers_of_the_safetensors_library(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "codes": np.arange(5, dtype=np.uint8),  # an odd length: what follows may lie unaligned
        "half": np.array([[1.5], [-2.0]], dtype=np.float16),
        "long": np.array(-5, dtype=np.int64),
        "single": np.linspace(0, 1, 7, dtype=np.float32),
    }
    save_file(arrays, tmp_path / "library.safetensors", {"format": "pt"})
    read, metadata = numpy_reader.read_container(tmp_path / "library.safetensors")
    assert metadata == {"format": "pt"}
    (tmp_path / "ours.safetensors").write_bytes(
        container({name: (t.dtype, t.shape, t.data.tobytes()) for name, t in read.items()}, None)
    )
    for found in (
        {k: t.array() for k, t in read.items()},
        load_file(tmp_path / "ours.safetensors"),
    ):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array)


def test_missing_files_and_no_quantization_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    with pytest.raises(FormatError, match="no quantization_config"):
        read_config(tmp_path)
    artifact(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no such file"):
        read_artifact(tmp_path)


# --- any artifact, against one weight at a time ---------------------------------------------------


def page_levels() -> dict[str, list[float]]:
    """The level table, read off the page; the integer books from their formula, exactly."""
    text = (FORMATS / "irq-v1.md").read_text(encoding="utf-8")
    table = {}
    for name, numbers in re.findall(r"^\| `(nf[234])` \| ([-0-9., ]+) \|$", text, re.MULTILINE):
        table[name] = [nearest(Fraction(number.strip())) for number in numbers.split(",")]
    for bits in (2, 3, 4):
        top = 2**bits - 1
        table[f"int{bits}"] = [nearest(Fraction(2 * k - top, top)) for k in range(top + 1)]
    return table


def nearest(exact: Fraction) -> float:
    """The binary32 nearest to an exact number, by trying three neighbours."""
    guess = np.float32(float(exact))
    tries = [np.nextafter(guess, np.float32(-2)), guess, np.nextafter(guess, np.float32(2))]
    return min(map(float, tries), key=lambda value: abs(Fraction(value) - exact))


def test_levels_are_those_of_the_page() -> None:
    table = page_levels()
    assert sorted(table) == sorted(numpy_reader.CODEBOOKS)
    for name, expected in table.items():
        assert numpy_reader.levels(name).dtype == np.float32
        assert numpy_reader.levels(name).tolist() == expected
        assert len(expected) == 2 ** int(name[-1])


def round32(value: float) -> float:
    """Binary64 to binary32. A product of two binary32 is exact in binary64, and a sum rounded to
    53 bits and then to 24 is the sum rounded to 24, since 53 >= 2 * 24 + 2."""
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found


class Toy:
    """A random quantized tensor and the dense values it must decode to."""

    def __init__(self, seed: int, shape: list[int], book: str, block: int, stats: list[str]):
        random = np.random.default_rng(seed)
        bits = int(book[-1])
        *leading, self.columns = shape
        self.rows, self.blocks = prod(leading), ceil(self.columns / block)
        codes = random.integers(0, 2**bits, (self.rows, self.columns)).tolist()
        row_bytes = ceil(self.columns * bits / 8)
        self.tensors: dict[str, Tensor] = {"t": ("U8", (*leading, row_bytes), pack(codes, bits))}
        scale = self.statistic("scale", stats[0], tuple(leading), random)
        tau = self.statistic("tau", stats[1], tuple(leading), random)
        table = page_levels()[book]
        self.dense = np.empty((self.rows, self.columns), dtype=np.float32)
        for r in range(self.rows):
            for c in range(self.columns):
                n = r * self.blocks + c // block
                self.dense[r, c] = round32(round32(table[codes[r][c]] * scale[n]) + tau[n])
        self.dense = self.dense.reshape(shape)
        self.changes: dict[str, Any] = {"codebook": book, "bits": bits, "block_size": block}
        self.changes |= {"scale_dtype": stats[0], "tau_dtype": stats[1]}
        if 8 * row_bytes // bits != self.columns:
            self.changes["overrides"] = {"t": {"columns": self.columns}}

    def statistic(
        self, kind: str, dtype: str, leading: tuple[int, ...], random: np.random.Generator
    ) -> list[float]:
        shape, count = (*leading, self.blocks), self.rows * self.blocks
        low = 0.0 if kind == "scale" else -1.0
        if dtype != "uint8":
            values = random.uniform(low, 1.0, count).astype(dtype).tolist()
            self.tensors[f"t_{kind}"] = (f16 if dtype == "float16" else f32)(shape, *values)
            return values
        codes = random.integers(0, 256, count).tolist()
        groups = ceil(count / 256)
        steps = random.uniform(0, 0.01, groups).astype(np.float32).tolist()
        offsets = random.integers(0 if kind == "scale" else -200, 200, groups).tolist()
        pairs = [value for pair in zip(steps, offsets, strict=True) for value in pair]
        self.tensors[f"t_{kind}"] = u8(shape, *codes)
        self.tensors[f"t_{kind}_grid"] = f32((groups, 2), *pairs)
        return [round32(steps[n // 256] * (codes[n] + offsets[n // 256])) for n in range(count)]


STATS = st.sampled_from(["uint8", "float16", "float32"])


def assert_same_bits(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 200),
    st.sampled_from(numpy_reader.CODEBOOKS),
    st.sampled_from([16, 32, 64]),
    st.lists(STATS, min_size=2, max_size=2),
)
def test_any_tensor(
    seed: int, leading: list[int], columns: int, book: str, block: int, stats: list[str]
) -> None:
    toy = Toy(seed, [*leading, columns], book, block, stats)
    with tempfile.TemporaryDirectory() as folder:
        found = read_artifact(artifact(Path(folder), toy.tensors, **toy.changes))
        assert list(found) == ["t"]
        assert_same_bits(found["t"], toy.dense)


def test_many_groups(tmp_path: Path) -> None:
    toy = Toy(3, [2, 9, 613], "nf3", 16, ["uint8", "uint8"])  # 702 blocks, 39 to a row
    assert toy.tensors["t_scale_grid"][1] == (3, 2)
    found = read_artifact(artifact(tmp_path, toy.tensors, **toy.changes))["t"]
    assert_same_bits(found, toy.dense)


@pytest.mark.parametrize("shape", [[5, 3001], [15005], [700, 21]])
def test_tiles_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[int]
) -> None:
    toy = Toy(4, shape, "nf3", 64, ["uint8", "float16"])
    folder = artifact(tmp_path, toy.tensors, **toy.changes)
    assert_same_bits(read_artifact(folder)["t"], toy.dense)
    monkeypatch.setattr(numpy_reader, "TILE", 1024)
    assert_same_bits(read_artifact(folder)["t"], toy.dense)


@pytest.mark.parametrize("shape", [(2048, 8192), (2**24,)])
def test_memory_is_bounded(tmp_path: Path, shape: tuple[int, ...]) -> None:
    *leading, columns = shape
    blocks, rows = columns // 64, prod(leading)
    tensors: dict[str, Tensor] = {
        "t": ("U8", (*leading, columns // 8 * 3), bytes(rows * columns // 8 * 3)),
        "t_scale": ("F32", (*leading, blocks), bytes(4 * rows * blocks)),
        "t_tau": ("F32", (*leading, blocks), bytes(4 * rows * blocks)),
    }
    folder = artifact(tmp_path, tensors, block_size=64)
    tracemalloc.start()
    try:
        found = read_artifact(folder)["t"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == shape
    assert peak - found.nbytes < 64 * 2**20


# --- the configuration, by code and by schema -----------------------------------------------------

DROP = object()
NOT_NAMES: list[Any] = [None, "lm_head", [1], {"a": 1}, [None]]
BAD_OVERRIDES: list[dict[str, Any]] = [
    {"codebook": "int3"},
    {"bits": 3},
    {"codebook": "nf4", "bits": 3},
    {"codebook": "nf9", "bits": 3},
    {"block_size": 65},
    {"scale_dtype": "float64"},
    {"tau_dtype": None},
    {"group_size": 256},
    {"quant_method": "irq"},
    {"meta": {}},
    {"transposed": 1},
    {"transposed": None},
    {"columns": 0},
    {"columns": -1},
    {"columns": 7.5},
    {"columns": "7"},
    {"columns": True},
    {"columns": None},
]
NOT_OVERRIDES: list[Any] = [None, [], "a", {"a": None}, {"a": []}]
GOOD: list[dict[str, Any]] = [
    {},
    {"codebook": "int4", "bits": 4, "block_size": 1024},
    {"scale_dtype": "uint8", "tau_dtype": "float16"},
    {"modules_to_not_convert": []},
    {"modules_to_not_convert": ["lm_head", "model.embed_tokens"], "overrides": {}},
    {"overrides": {"a": {}}},
    {"overrides": {"a": {"codebook": "nf2", "bits": 2, "block_size": 16}, "b": {"columns": 1}}},
    {"overrides": {"a": {"scale_dtype": "float16", "tau_dtype": "uint8"}}},
    {"overrides": {"a": {"codebook": "int3", "bits": 3}}},
    {"meta": {"anything": [1, {"codebook": "nf9"}]}},
    {"meta": None},
    {"bits": 3.0, "format_version": 1.0},  # the same JSON numbers as 3 and 1
]
BAD: list[dict[str, Any]] = [
    *({key: DROP} for key in config()),
    {"quant_method": "gptq"},
    {"quant_method": None},
    *({"format_version": value} for value in (2, 0, -1, "1", True, 1.5, None)),
    *({"codebook": value} for value in ("nf2", "nf4", "int2", "nf5", "NF3", "", None, 3, ["nf3"])),
    *({"bits": value} for value in (2, 4, 5, "3", True, 3.5, None)),
    *({"block_size": value} for value in (0, 8, 48, 2048, -16, "64", True, 64.5, [64])),
    *({"group_size": value} for value in (128, 512, "256", None)),
    *({"scale_dtype": value} for value in ("bfloat16", "U8", "", None, 8)),
    *({"tau_dtype": value} for value in ("bfloat16", "F32", None)),
    *({"modules_to_not_convert": value} for value in NOT_NAMES),
    *({"overrides": value} for value in NOT_OVERRIDES),
    {"columns": 7},
    {"Meta": {}},
    {"version": 1},
    *({"overrides": {"a": override}} for override in BAD_OVERRIDES),
]


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(config() | changes)
    return {key: value for key, value in merged.items() if changes.get(key) is not DROP}


def accepted(raw: Any) -> bool:
    """Whether `check_config` takes it; the schema must say the same."""
    try:
        check_config(raw)
        taken = True
    except FormatError:
        taken = False
    assert SCHEMA.is_valid(raw) == taken, raw
    return taken


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)


@pytest.mark.parametrize("changes", GOOD, ids=repr)
def test_good_configs(changes: dict[str, Any]) -> None:
    assert accepted(changed(changes))


@pytest.mark.parametrize("changes", BAD, ids=lambda changes: repr(changes).replace(repr(DROP), "-"))
def test_bad_configs(changes: dict[str, Any]) -> None:
    assert not accepted(changed(changes))


@pytest.mark.parametrize("raw", [None, [], "irq", 1, {}])
def test_not_a_config(raw: Any) -> None:
    assert not accepted(raw)


def test_the_example_on_the_page() -> None:
    text = (FORMATS / "irq-v1.md").read_text(encoding="utf-8")
    example = json.loads(text.split("```json\n")[1].split("```")[0])
    assert accepted(example)
    found = check_config(example)
    assert found.default == numpy_reader.Layout("nf3", 3, 64, "uint8", "uint8")
    assert found.layout("model.layers.0.mlp.down_proj.weight").codebook == "nf4"
    assert found.layout("model.layers.1.mlp.down_proj.weight").columns == 1023
    assert found.layout("model.layers.1.mlp.down_proj.weight").bits == 3
    assert found.modules_to_not_convert == {"lm_head"}


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 1, 2, 3, 4, 3.0, 16, 256, "irq", "nf2", "nf3", "int4", "uint8", [], ["a"], {}]
)
KEYS = st.sampled_from([*config(), "columns", "overrides", "modules_to_not_convert", "meta", "x"])


@settings(max_examples=300)
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(KEYS, VALUES, max_size=3))
def test_code_and_schema_agree(top: dict[str, Any], override: dict[str, Any]) -> None:
    accepted(changed({"overrides": {"a": override}} | top))


def test_newer_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="newer format"):
        read_config(artifact(tmp_path, {}, format_version=2))


# --- the manifest ---------------------------------------------------------------------------------


def with_manifest(folder: Path) -> Path:
    artifact(folder, one_block(b"\x00\x00\x00"))
    (folder / "extra").mkdir()
    (folder / "extra" / "chat.jinja").write_bytes(b"abc")
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file()
    }
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files["extra/chat.jinja"] == {"bytes": 3, "sha256": known}
    manifest = {"format": "irq", "format_version": 1, "producer": "test", "files": files}
    (folder / "irq_manifest.json").write_text(json.dumps(manifest))
    return folder


def test_verify_files(tmp_path: Path) -> None:
    names = ["config.json", "extra/chat.jinja", "model.safetensors"]
    assert verify_files(with_manifest(tmp_path)) == names


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "extra/chat.jinja").write_bytes(b"abd"), "sha256 differs"),
        (lambda f: (f / "extra/chat.jinja").write_bytes(b"abcd"), "bytes long"),
        (lambda f: (f / "extra/chat.jinja").unlink(), "listed but missing"),
        (lambda f: (f / "more.txt").write_bytes(b""), "not in the manifest"),
        (lambda f: (f / "irq_manifest.json").write_text("{}"), "not a manifest"),
        (lambda f: (f / "irq_manifest.json").unlink(), "no such file"),
    ],
)
def test_verify_files_finds_damage(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(with_manifest(tmp_path))
    with pytest.raises(FormatError, match=message):
        verify_files(tmp_path)


def test_weights_do_not_need_the_manifest(tmp_path: Path) -> None:
    (with_manifest(tmp_path) / "irq_manifest.json").write_text("not JSON")
    assert set(read_artifact(tmp_path)) == {"w.weight"}


# --- golden vectors -------------------------------------------------------------------------------


def vector_folders() -> list[Path]:
    return sorted(path for path in VECTORS.glob("*") if path.is_dir()) if VECTORS.is_dir() else []


def test_there_are_golden_vectors() -> None:
    if not VECTORS.is_dir():
        pytest.skip("formats/vectors is not there")
    assert vector_folders()
    readme = (VECTORS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in vector_folders() if path.name not in readme] == []


@pytest.mark.parametrize(
    "folder",
    [pytest.param(path, id=path.name) for path in vector_folders()]
    or [pytest.param(None, id="none", marks=pytest.mark.skip(reason="no formats/vectors/*/"))],
)
def test_golden_vectors(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(raw) == ["quantization_config"]
    assert SCHEMA.is_valid(raw["quantization_config"])
    dense, _ = numpy_reader.read_container(folder / "dense.safetensors")
    quantized = numpy_reader.quantized_names(numpy_reader.read_tensors(folder))
    assert quantized == sorted(dense) != []
    found = read_artifact(folder)
    for name in quantized:
        assert_same_bits(found[name], dense[name].array())
