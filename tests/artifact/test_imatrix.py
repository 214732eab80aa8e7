"""llama.cpp's imatrix files, written by hand in both forms and read."""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.artifact.imatrix import read_imatrix
from irq_convert.errors import IrqError, UsageError
from tests.folders import assert_one_line

from .imatrix_files import write_gguf, write_list

MEANS = {
    "blk.0.attn_q.weight": np.array([[1.0, 2.0, 0.25]]),
    "blk.0.ffn_gate_exps.weight": np.array([[1.0, 2.0], [3.0, 4.0], [0.5, 8.0]]),
}


def test_the_older_form(tmp_path: Path) -> None:
    found = read_imatrix(write_list(tmp_path / "i.dat", MEANS))
    assert (found.text, found.tokens) == ("wiki.txt", None)
    for name, values in MEANS.items():
        own = found.matrices(name, values.shape)
        np.testing.assert_allclose(own, values, rtol=1e-6)
        assert found.matrices(name, (1, 17)) is None


def test_the_older_form_without_its_end(tmp_path: Path) -> None:
    found = read_imatrix(write_list(tmp_path / "i.dat", MEANS, calls=0 + 1, dataset=None))
    assert (found.text, found.tokens) == ("", None)
    assert set(found.values) == set(MEANS)


def test_the_newer_form(tmp_path: Path) -> None:
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", MEANS))
    assert (found.text, found.tokens) == ("wiki.txt", 8 * 512)
    for name, values in MEANS.items():
        np.testing.assert_allclose(found.matrices(name, values.shape), values, rtol=1e-6)


def test_an_expert_that_no_token_reached(tmp_path: Path) -> None:
    name = "blk.0.ffn_gate_exps.weight"
    counts = {name: np.array([10.0, 30.0, 0.0])}
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", MEANS, counts)).values[name]
    np.testing.assert_allclose(found[:2], MEANS[name][:2], rtol=1e-6)
    np.testing.assert_allclose(found[2], [(10 * 1 + 30 * 3) / 40, (10 * 2 + 30 * 4) / 40])
    none = {name: np.zeros(3)}
    assert name not in read_imatrix(write_gguf(tmp_path / "j.gguf", MEANS, none)).values


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("blk.0.attn_q.weight", [[1.0, np.nan]], "blk.0.attn_q.weight has NaN"),
        ("blk.0.attn_q.weight", [[1.0, -2.0]], "blk.0.attn_q.weight has negative"),
    ],
)
@pytest.mark.parametrize("write", [write_list, write_gguf])
def test_bad_numbers(tmp_path: Path, name: str, values: list, says: str, write: object) -> None:
    path = write(tmp_path / "i", {**MEANS, name: np.array(values)})  # type: ignore[operator]
    with pytest.raises(IrqError) as caught:
        read_imatrix(path)
    assert_one_line(str(caught.value), str(path), says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "ends early"),
        (b"abc", "ends early"),
        (struct.pack("<i", 0), "neither a file of importance nor an imatrix"),
        (struct.pack("<i", -5), "neither"),
        (b"Once upon a time there was a text file.", "neither"),
        (struct.pack("<ii", 1, 0), "neither"),
        (struct.pack("<ii", 1, 4) + b"name", "ends early, at byte 12"),
        (struct.pack("<ii", 1, 4) + b"name" + struct.pack("<ii", 1, 0), "name: 0 values"),
        (struct.pack("<ii", 1, 4) + b"name" + struct.pack("<ii", -1, 1), "1 values of -1 calls"),
        (struct.pack("<ii", 1, 4) + b"name" + struct.pack("<iif", 1, 2, 1.0), "ends early"),
        (b"GGUF", "a GGUF file that is damaged"),
        (b"GGUF" + bytes(range(60)), "a GGUF file that is damaged"),
    ],
)
def test_what_is_none(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "i"
    path.write_bytes(data)
    with pytest.raises(IrqError) as caught:
        read_imatrix(path)
    assert_one_line(str(caught.value), str(path), says)


def test_a_model_in_gguf_is_no_imatrix(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", MEANS, kind="model")
    with pytest.raises(IrqError, match="a GGUF file of type 'model', no imatrix"):
        read_imatrix(path)


def test_the_newer_form_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "i.gguf", MEANS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'irq-convert\[gguf\]'"):
        read_imatrix(path)


@given(data=st.data())
def test_any_damage_is_one_line(data: st.DataObject) -> None:
    """Cut off or with other bytes: read, or refused in a line."""
    with tempfile.TemporaryDirectory() as folder:
        write = data.draw(st.sampled_from([write_list, write_gguf]))
        path = write(Path(folder) / "i", MEANS)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        try:
            read_imatrix(path)
        except IrqError as error:
            assert_one_line(str(error))
