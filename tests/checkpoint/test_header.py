"""Headers: agreement with the reference library on good files, one clear line for each bad one."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from irq_convert.checkpoint.header import DTYPE_BITS, TensorInfo, read_header, tensor_nbytes
from irq_convert.errors import IrqError
from tests.folders import assert_one_line

from .helpers import entry, raw_file, run_python

GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("U8", [5], 24, 29)}


def test_agrees_with_reference_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "z": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "héllo"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "héllo"}
    raw = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert set(header.tensors) == set(reference.keys())
        for name, info in header.tensors.items():
            piece = reference.get_slice(name)
            assert (info.dtype, list(info.shape)) == (piece.get_dtype(), piece.get_shape())
            stored = raw[info.offset : info.offset + info.nbytes]
            want = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert stored == want
            assert info.numel == tensors[name].numel()
    offsets = [info.offset for info in header.tensors.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_reference_library_knows_every_dtype(tmp_path: Path, dtype: str) -> None:
    size = tensor_nbytes(dtype, (4, 2))
    path = raw_file(tmp_path / "x", {"t": entry(dtype, [4, 2], 0, size)}, bytes(size))
    with safe_open(path, "np") as reference:
        assert list(reference.keys()) == ["t"]
    assert read_header(path).tensors["t"].nbytes == size


def test_tensor_nbytes_rules() -> None:
    assert tensor_nbytes("F4", (3, 2)) == 3
    assert tensor_nbytes("BF16", ()) == 2
    for dtype, shape in (("F4", (3,)), ("Q8", (1,)), ("F32", (-1, 2))):
        with pytest.raises(ValueError, match=r"byte|dtype|negative"):
            tensor_nbytes(dtype, shape)


def _bad(**changes: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **changes}, "b": GOOD["b"]}


BAD_HEADERS = {
    "not json": (b"{hello", ["not JSON"]),
    "not utf-8": (b'{"\xff": 1}', ["not JSON"]),
    "nested too deep": (b"[" * 200_000, ["not JSON"]),
    "array": ([1, 2], ["not a JSON object"]),
    "duplicate tensor": (
        '{"a":{"dtype":"U8","shape":[29],"data_offsets":[0,29]},'
        '"a":{"dtype":"U8","shape":[29],"data_offsets":[0,29]}}',
        ["'a' appears twice"],
    ),
    "duplicate field": (
        '{"a":{"dtype":"U8","dtype":"I8","shape":[29],"data_offsets":[0,29]}}',
        ["'dtype' appears twice"],
    ),
    "metadata numbers": ({**GOOD, "__metadata__": {"x": 1}}, ["__metadata__"]),
    "metadata list": ({**GOOD, "__metadata__": []}, ["__metadata__"]),
    "entry is text": ({"a": "x"}, ["'a'", "not an object"]),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 29]}}, ["'a'", "shape"]),
    "negative shape": (_bad(shape=[-2, -3]), ["'a'", "shape", "-2"]),
    "float shape": (_bad(shape=[2.0, 3]), ["'a'", "shape"]),
    "true shape": (_bad(shape=[True, 6]), ["'a'", "shape"]),
    "text shape": (_bad(shape="6"), ["'a'", "shape"]),
    "unknown dtype": (_bad(dtype="F12"), ["'a'", "F12"]),
    "dtype is a list": (_bad(dtype=["F32"]), ["'a'", "dtype"]),
    "odd nibbles": (_bad(dtype="F4", shape=[3], data_offsets=[0, 2]), ["'a'", "whole number"]),
    "offsets of other size": (_bad(data_offsets=[0, 20]), ["'a'", "20", "24"]),
    "huge shape": (_bad(shape=[10**30, 3]), ["'a'", "data_offsets"]),
    "one offset": (_bad(data_offsets=[0]), ["'a'", "data_offsets"]),
    "negative offset": (_bad(data_offsets=[-24, 0]), ["'a'", "data_offsets"]),
    "backwards": (_bad(data_offsets=[24, 0]), ["'a'", "data_offsets"]),
    "overlap": ({**GOOD, "b": entry("U8", [9], 20, 29)}, ["'a'", "'b'", "overlap"]),
    "hole": ({**GOOD, "b": entry("U8", [3], 26, 29)}, ["'b'", "hole of 2"]),
    "hole at start": ({"b": entry("U8", [27], 2, 29)}, ["'b'", "hole of 2"]),
    "out of range": ({**GOOD, "b": entry("U8", [50], 24, 74)}, ["'b'", "truncated"]),
    "trailing bytes": ({"a": GOOD["a"]}, ["5 bytes after"]),
    "lone surrogate": ('{"\\ud800": {}}', ["Unicode"]),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, words = BAD_HEADERS[case]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(29))
    with pytest.raises(IrqError) as caught:
        read_header(path)
    assert_one_line(str(caught.value), str(path), *words)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    short = tmp_path / "short"
    short.write_bytes(b"1234567")
    pointer = tmp_path / "pointer"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.mkfifo(tmp_path / "pipe")
    for path, word in (
        (folder, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "absent", "no such file"),
        (short, "8 bytes"),
        (pointer, "git lfs pull"),
        (raw_file(tmp_path / "past", "{}", length=3), "the file ends after 10"),
        (raw_file(tmp_path / "giant", "{}", length=1 << 62), "limit"),
    ):
        with pytest.raises(IrqError) as caught:
            read_header(path)
        assert_one_line(str(caught.value), str(path), word)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = raw_file(tmp_path / "whole", GOOD, bytes(29)).read_bytes()
    cut = tmp_path / "cut"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(IrqError):
            read_header(cut)


def test_claimed_gigabytes_are_not_allocated(tmp_path: Path) -> None:
    """A sparse file whose header claims 99 MB is read; one that claims 8 GiB is not even tried."""
    path = raw_file(tmp_path / "x", "", length=8 << 30)
    os.truncate(path, 9 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IrqError, match="limit"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@settings(max_examples=300)
@given(st.data())
def test_never_accepts_what_the_reference_refuses(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Damage one byte of a good file: we refuse, or the reference library reads the same thing."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    raw = bytearray(raw_file(path, GOOD, bytes(29)).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 30))
    raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except IrqError as error:
        assert_one_line(str(error), str(path))
        return
    try:
        with safe_open(path, "np") as reference:
            names = list(reference.keys())
            shapes = {name: reference.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise AssertionError(f"accepted {bytes(raw)!r}, but: {error}") from error
    assert {name: list(info.shape) for name, info in header.tensors.items()} == shapes


def test_imports_nothing_heavy() -> None:
    code = "import sys, irq_convert.checkpoint.header; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_tensor_info_is_a_value(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x", GOOD, bytes(29))
    start = 8 + len(json.dumps(GOOD))
    assert read_header(path).tensors["b"] == TensorInfo("b", "U8", (5,), path, start + 24, 5)
    assert np.prod(read_header(path).tensors["a"].shape) == 6
