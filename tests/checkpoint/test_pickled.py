"""Files of torch.save: read tile by tile, equal to torch.load, and without running anything."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irq_convert.checkpoint.pickled import read_pickle
from irq_convert.checkpoint.reader import TileReader, matrix_shape
from irq_convert.checkpoint.remote_pickle import fetch_pickle
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from tests.folders import assert_one_line


def views() -> dict[str, torch.Tensor]:
    """Tensors of every sort that torch.save keeps as a view of a storage."""
    base = torch.arange(240.0).view(12, 20)
    cube = torch.arange(120).view(4, 5, 6)
    return {
        "whole": base,
        "transposed": base.t(),
        "rows": base[3:7],
        "columns": base[:, 4:9],
        "every other row": base[::2],
        "expanded": base[:1].expand(5, 20),
        "permuted": cube.permute(2, 0, 1),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "half": base.half()[1],
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "true": torch.tensor([True, False]),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({**views(), "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_every_view_is_what_torch_loads(saved: Path) -> None:
    header, wanted = read_pickle(saved), torch.load(saved, weights_only=True)
    assert header.tensors.keys() == views().keys()
    with TileReader() as reader:
        for name, info in header.tensors.items():
            found = reader.read_tensor(info)
            assert torch.equal(found, wanted[name]), name
            assert found.dtype == wanted[name].dtype, name
            data = b"".join(bytes(piece) for piece in reader.iter_bytes(info, 7))
            assert (
                data
                == wanted[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            ), name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_tile_of_a_view(saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["transposed", "columns", "every other row", "permuted"]))
    info = read_pickle(saved).tensors[name]
    whole = views()[name].reshape(matrix_shape(info))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    with TileReader() as reader:
        assert torch.equal(reader.read_rows(info, start, stop), whole[start:stop])


class Touch:
    """Unpickled by a careless program, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    torch.save({"weight": torch.ones(3), "x": Touch(mark)}, path)
    with pytest.raises(IrqError) as caught:
        read_pickle(path)
    assert_one_line(str(caught.value), str(path), "system", "is not run")
    assert not mark.exists()


def test_files_that_cannot_be_read_are_one_line(saved: Path, tmp_path: Path) -> None:
    def refused(path: Path, *words: str) -> None:
        with pytest.raises(IrqError) as caught:
            read_pickle(path)
        assert_one_line(str(caught.value), str(path), *words)

    other = tmp_path / "other.bin"
    for cut in (10, 700, len(saved.read_bytes()) - 30):
        other.write_bytes(saved.read_bytes()[:cut])
        refused(other, "cut off or damaged")
    torch.save(views(), other, _use_new_zipfile_serialization=False)
    refused(other, "before 1.6", "weights_only=True")
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refused(other, "is compressed")
    other.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(other, "Git LFS")
    other.write_bytes(b"\0" * 100)
    refused(other, "no file of torch.save")
    torch.save([1, 2], other)
    refused(other, "no weights by name")
    torch.save({"a": torch.ones(2).to_sparse()}, other)
    refused(other, "no plain tensor")
    refused(tmp_path / "absent.bin", "no such file")
    os.mkfifo(tmp_path / "pipe.bin")
    refused(tmp_path / "pipe.bin", "not a regular file")


def test_a_storage_that_is_shorter_than_its_tensors_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "short.bin"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:-8] if entry.filename.endswith("/0") else data)
    with pytest.raises(IrqError, match="ends inside"):
        read_pickle(other)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module"])
def test_weights_beside_the_state_of_training(tmp_path: Path, wrap: str) -> None:
    torch.save({wrap: {"a": torch.ones(2)}, "optimizer": {"step": 1}}, tmp_path / "x.pth")
    assert list(read_pickle(tmp_path / "x.pth").tensors) == ["a"]


@pytest.mark.parametrize(
    ("prefix", "names", "left"),
    [
        ("module.", ["model.a.weight", "lm_head.weight"], ""),
        ("_orig_mod.module.", ["model.a.weight"], ""),
        ("model.", ["model.a.weight", "lm_head.weight"], ""),
        ("model.", ["layers.0.weight", "norm.weight"], "model."),
    ],
)
def test_prefixes_of_training_programs_go(
    tmp_path: Path, prefix: str, names: list[str], left: str
) -> None:
    state = {prefix + name: torch.ones(2) for name in names}
    torch.save(state, tmp_path / "model.pth")
    assert set(open_checkpoint(tmp_path).tensors) == {left + name for name in names}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_shares_the_embedding(tmp_path: Path, tied: bool) -> None:
    weight = torch.ones(4, 3)
    torch.save(
        {"model.embed_tokens.weight": weight, "lm_head.weight": weight},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    checkpoint = open_checkpoint(tmp_path)
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    assert [name for name, _ in checkpoint.dropped] == ["lm_head.weight"] * tied


def test_an_index_names_the_files(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save(
            {f"t{number}": torch.full((3,), number)}, tmp_path / f"pytorch_model-{number}.bin"
        )
    index = {"weight_map": {f"t{n}": f"pytorch_model-{n}.bin" for n in (1, 2)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"x": 1}, tmp_path / "training_args.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source_format == "pickle"
    assert list(checkpoint.tensors) == ["t1", "t2"]
    assert checkpoint.left_out == ("training_args.bin",)


def test_what_is_fetched_of_a_file_tells_the_same(saved: Path, tmp_path: Path) -> None:
    """A few ranges of it are enough to plan, with the true place of every tensor."""
    torch.save({**views(), "large": torch.zeros(1 << 20)}, saved)
    data, asked = saved.read_bytes(), [0]

    def fetch(start: int, stop: int) -> bytes:
        asked[0] += stop - start
        return data[start:stop]

    small = tmp_path / "small" / saved.name
    small.parent.mkdir()
    small.write_bytes(fetch_pickle(fetch, saved, len(data)))
    assert asked[0] < len(data) / 2
    planned, found = read_pickle(small, len(data)), read_pickle(saved)
    moved = {name: info.moved(lambda _: saved) for name, info in planned.tensors.items()}
    assert moved == found.tensors


def test_a_file_on_the_hub_that_is_no_zip(tmp_path: Path) -> None:
    with pytest.raises(IrqError, match="not a zip file as torch"):
        fetch_pickle(lambda start, stop: b"\x80" * (stop - start), tmp_path / "x.bin", 5000)
