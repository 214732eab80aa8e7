"""`original/` beside other weights is the model once more: left out wholly, local or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.locate import Fetch, locate, open_source
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.jobs.quantize.made_files import make_files
from tests.jobs.push.client import use_hub
from tests.jobs.push.server import serve
from tests.jobs.push.state import FolderRepo, World

from .meta_files import MetaModel, converted, whole_tensors, write_meta

NAME = "org/twice"
MODEL = MetaModel()
HINTS = SourceHints(llama_version="1")
INSIDE = tuple(
    f"original/{name}"
    for name in ("consolidated.00.pth", "params.json", "sub/notes.txt", "tokenizer.model")
)


def safetensors(folder: Path) -> None:
    save_file(converted(whole_tensors(MODEL), MODEL), folder / "model.safetensors")


def pickles(folder: Path) -> None:
    torch.save(converted(whole_tensors(MODEL), MODEL), folder / "pytorch_model.bin")


def indexed_pickles(folder: Path) -> None:
    torch.save(converted(whole_tensors(MODEL), MODEL), folder / "a.pth")
    names = dict.fromkeys(converted(whole_tensors(MODEL), MODEL), "a.pth")
    (folder / "a.pth.index.json").write_text(json.dumps({"weight_map": names}))


def metas(folder: Path) -> None:
    write_meta(folder, MODEL)


@pytest.fixture(params=[safetensors, pickles, indexed_pickles, metas])
def twice(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with weights, and with Meta's files in `original/`."""
    folder = tmp_path / "m"
    write_meta(folder / "original", MODEL)
    request.param(folder)
    if request.param is not metas:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "original" / "sub").mkdir()
    (folder / "originals").mkdir()
    for name in (*INSIDE[2:], "originals/kept.txt", "tokenizer.json"):
        (folder / name).write_text("x")
    return folder


def test_in_a_folder(twice: Path) -> None:
    opened = open_checkpoint(twice, hints=HINTS)
    own = {"config.json"} if (twice / "config.json").exists() else set()
    assert set(opened.other_files) == {"originals/kept.txt", "tokenizer.json"} | own
    assert opened.left_out == INSIDE
    assert all(path.parent == twice for path in opened.shards)
    notes = make_files(opened).notes
    assert [note for note in notes if note.startswith("original/ is left out: ")]


@pytest.mark.parametrize("fetch", [Fetch.AS_READ, Fetch.STREAM])
def test_on_the_hub(
    twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: Fetch
) -> None:
    local = open_checkpoint(twice, hints=HINTS)
    with serve(World({NAME: FolderRepo(twice)})) as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        opened = open_source(NAME, fetch=fetch, hints=HINTS)
        with opened.fetcher:
            assert opened.fetcher.folder == opened.folder
            assert (opened.other_files, opened.left_out) == (local.other_files, INSIDE)
            assert opened.file_bytes == local.file_bytes
            assert not (opened.folder / "original").exists()
        whole = locate(NAME).folder
        assert not (whole / "original").exists()
        again = open_source(NAME, fetch=fetch, hints=HINTS)  # all of it is in the cache by now
        assert (again.other_files, again.left_out) == (local.other_files, INSIDE)
        assert not server.asked("GET", "original/")


@pytest.mark.parametrize("hub", [False, True])
def test_it_is_the_source_where_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: bool
) -> None:
    folder = tmp_path / "m"
    write_meta(folder / "original", MODEL)
    for name in ("README.md", "original/notes.txt"):
        (folder / name).write_text("x")
    with serve(World({NAME: FolderRepo(folder)})) as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        opened = open_source(NAME if hub else str(folder), hints=HINTS)
    assert [path.parent.name for path in opened.shards] == ["original"]
    assert opened.other_files == ("README.md", "original/notes.txt")
    assert opened.left_out == ()
