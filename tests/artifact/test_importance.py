"""Files of importance: what is written is read again, and what breaks the format is one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from irq_convert.artifact.importance import (
    Importance,
    is_importance,
    read_importance,
    write_importance,
)
from irq_convert.errors import IrqError
from irq_convert.version import PRODUCER
from tests.folders import assert_one_line, listing

SOURCE = {"model": "org/m", "revision": None, "tensors_sha256": "ab" * 32}
VALUES = {"b.weight": np.array([1.0, 0.0, 2.5]), "a.experts": np.array([[1.0, 2.0], [0.5, 3e-300]])}
SOUND = Importance(VALUES, "wiki.txt", 4096, 512, "cd" * 32, SOURCE)

squares = np_st.arrays(
    np.float64,
    np_st.array_shapes(min_dims=1, max_dims=2, max_side=5),
    elements=st.floats(0, allow_infinity=False, allow_nan=False),
)
names = st.text(min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)


@given(st.dictionaries(names, squares, min_size=1, max_size=4), st.text(), st.integers(0, 2**40))
def test_round_trip(values: dict[str, np.ndarray], text: str, tokens: int) -> None:
    text = text.encode("utf-8", "replace").decode()
    wanted = replace(SOUND, values=values, text=text, tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.safetensors"
        size = write_importance(path, wanted)
        assert path.stat().st_size == size
        found = read_importance(path)
        raw = path.read_bytes()
        write_importance(path, replace(wanted, values=dict(reversed(values.items()))))
        assert path.read_bytes() == raw
    assert replace(found, values={}) == replace(wanted, values={})
    assert set(found.values) == set(values)
    for name, each in values.items():
        np.testing.assert_array_equal(found.values[name], each)


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    write_importance(path, SOUND)
    found = load_file(path)
    assert {name: each.dtype for name, each in found.items()} == dict.fromkeys(VALUES, np.float64)
    np.testing.assert_array_equal(found["a.experts"], VALUES["a.experts"])
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("source")) == SOURCE
    assert metadata == {
        "format": "irq importance",
        "format_version": "1",
        "producer": PRODUCER,
        "text": "wiki.txt",
        "tokens": "4096",
        "window": "512",
        "tokens_sha256": "cd" * 32,
    }
    assert is_importance(path)


def _values(name: str, values: Any) -> Callable[[Any, Any], None]:
    return lambda tensors, metadata: tensors.update({name: np.asarray(values)})


def _says(key: str, text: str | None) -> Callable[[Any, Any], None]:
    def change(tensors: Any, metadata: dict[str, str]) -> None:
        metadata.pop(key)
        metadata.update({} if text is None else {key: text})

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_values("b.weight", [1.0, np.nan]), "b.weight has NaN or infinite numbers"),
        (_values("b.weight", [1.0, np.inf]), "b.weight has NaN or infinite numbers"),
        (_values("b.weight", [1.0, -1e-9]), "b.weight has negative numbers"),
        (_values("b.weight", np.float32([1.0])), "b.weight is F32 [1]"),
        (_values("b.weight", np.zeros((2, 2, 2))), "b.weight is F64 [2, 2, 2]"),
        (_values("b.weight", np.zeros((0,))), "b.weight is F64 [0]"),
        (_says("format", "pt"), "no file of importance (its metadata have format 'pt')"),
        (_says("format_version", "2"), "of version '2' of its format"),
        (_says("tokens", None), "tokens in its metadata is '', no count"),
        (_says("tokens", "-3"), "tokens in its metadata is '-3', no count"),
        (_says("window", "many"), "window in its metadata is 'many', no count"),
        (_says("source", None), "source in its metadata is no object"),
        (_says("source", "[1]"), "source in its metadata is no object"),
        (_says("source", '{"model": "m"}'), "with model, revision, tensors_sha256"),
        (lambda tensors, metadata: tensors.clear(), "has no tensors"),
    ],
)
def test_what_breaks_the_format(
    tmp_path: Path, change: Callable[[Any, Any], None], says: str
) -> None:
    path = tmp_path / "i.safetensors"
    tensors, metadata = dict(VALUES), SOUND.metadata
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(IrqError) as caught:
        read_importance(path)
    assert_one_line(str(caught.value), str(path), says)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    write_importance(path, SOUND)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(IrqError, match="truncated inside tensor"):
        read_importance(path)
    assert not is_importance(path)


def test_bad_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(IrqError, match="w has NaN"):
        write_importance(tmp_path / "i", replace(SOUND, values={"w": np.array([np.nan])}))
    assert listing(tmp_path) == {}
