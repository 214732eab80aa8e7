"""Everything that `export` must refuse: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import change_json, listing
from tests.jobs.export.make import quantized

from .process import Commands, assert_fails, nothing_left


@pytest.fixture(scope="module")
def source(whole_blocks: Path) -> Path:
    return whole_blocks


@pytest.fixture(scope="module")
def int4(whole_int4: Path) -> Path:
    return whole_int4


@pytest.fixture(scope="module")
def nf4(whole_nf4: Path) -> Path:
    return whole_nf4


@pytest.fixture(scope="module")
def int4_16(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(source, tmp_path_factory.mktemp("refusals") / "int4-16", block_size=16)


def refuse(irq: Commands, tmp_path: Path, code: int, words: list[str], *args: object) -> None:
    with nothing_left(tmp_path):
        assert_fails(irq("export", *args), code, *words)


def test_what_the_targets_cannot_hold(
    irq: Commands, int4: Path, nf4: Path, int4_16: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for artifact, to, words in (
        (nf4, "mlx", ["down_proj.weight", "nf4", "--to dense", "--codebook int"]),
        (nf4, "compressed-tensors", ["nf4", "--zero-point integer", "--refit"]),
        (int4, "compressed-tensors", ["no integer", "--zero-point integer", "--refit"]),
        (int4_16, "mlx", ["blocks of 16", "32, 64, 128", "--block-size 32"]),
    ):
        refuse(irq, tmp_path, 2, words, artifact, out, "--to", to)
        refuse(irq, tmp_path, 2, words, artifact, out, "--to", to, "--dry-run")


def test_options(irq: Commands, int4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, *more in (
        (["--to onnx", "dense, mlx, gguf, compressed-tensors"], "--to", "onnx"),
        (["--refit", "--to dense"], "--to", "dense", "--refit"),
        (["--fallback", "--to mlx"], "--to", "mlx", "--fallback", "q8_0"),
        (["--dtype int8", "bfloat16, float16"], "--to", "mlx", "--dtype", "int8"),
        (["--threads 0"], "--to", "mlx", "--threads", "0"),
        (["--max-shard-size 0"], "--to", "mlx", "--max-shard-size", "0"),
        (["--max-shard-size nan"], "--to", "mlx", "--max-shard-size", "nan"),
    ):
        refuse(irq, tmp_path, 2, words, int4, out, *more)


def test_typer_refuses_what_is_no_option(irq: Commands, int4: Path, tmp_path: Path) -> None:
    for more in ((), ("--to", "mlx", "--threads", "many"), ("--to", "mlx", "--bits", "4")):
        with nothing_left(tmp_path):
            result = irq("export", int4, tmp_path / "out", *more)
        assert result.code == 2
        assert "Traceback" not in result.err


def test_what_is_no_artifact(irq: Commands, source: Path, int4: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("text")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, words in (
        (source, ["not an irq artifact", "irq-convert quantize"]),
        (empty, ["not an irq artifact"]),
        (tmp_path / "missing", ["no such folder"]),
        (file, ["no such folder"]),
    ):
        refuse(irq, tmp_path, 2, words, folder, out, "--to", "mlx")


def test_where_it_cannot_write(irq: Commands, int4: Path, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    file.write_text("text")
    for out, words, *more in (
        (full, ["not empty"]),
        (full, ["holds no result of quantizing, merging or exporting"], "--overwrite"),
        (file, ["a file, not a folder"]),
        (file / "deeper", ["is a file"]),
        (int4, ["the source itself"], "--overwrite"),
        (int4 / "inside", ["inside the source"]),
        (int4.parent, ["holds the source"], "--overwrite"),
    ):
        refuse(irq, tmp_path, 2, words, int4, out, "--to", "mlx", *more)


def test_a_folder_nobody_may_write(irq: Commands, int4: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for folder in {tmp_path, *tmp_path.parents, *int4.parents}:
        if any(part.startswith("pytest-") for part in folder.parts):
            folder.chmod(folder.stat().st_mode | 0o055)
    result = irq("export", int4, closed / "out", "--to", "mlx", nobody=True)
    assert_fails(result, 1, "permission denied")
    assert list(closed.iterdir()) == []


def test_an_artifact_nobody_may_see(irq: Commands, int4: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    shutil.copytree(int4, hidden / "int4")
    hidden.chmod(0o700)
    result = irq("export", hidden / "int4", tmp_path / "out", "--to", "mlx", nobody=True)
    assert_fails(result, 1, "permission denied")


Change = Callable[[Path], None]


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def newer(folder: Path) -> None:
    change_json(
        folder / "config.json", lambda raw: raw["quantization_config"].update(format_version=2)
    )


def wrong_dtype(folder: Path) -> None:
    manifest = json.loads((folder / "irq_manifest.json").read_text())
    for entry in manifest["tensors"].values():
        entry["dtype"] = "I8"
    (folder / "irq_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, ["model.safetensors"]),
        (empty_config, ["config.json"]),
        (newer, ["format version 2", "upgrade"]),
        (wrong_dtype, ["dtype 'I8'", "--dtype"]),
    ],
)
def test_damage(
    irq: Commands, int4: Path, tmp_path: Path, change: Change, words: list[str]
) -> None:
    artifact = tmp_path / "damaged"
    shutil.copytree(int4, artifact)
    change(artifact)
    for to in ("dense", "mlx"):
        refuse(irq, tmp_path, 1, words, artifact, tmp_path / "out", "--to", to)


def test_stopped_in_the_middle(irq: Commands, int4: Path, tmp_path: Path) -> None:
    """SIGTERM leaves nothing of the new result and the old one whole."""
    out, staging = tmp_path / "out", tmp_path / "out.partial"
    assert irq("export", int4, out, "--to", "mlx").code == 0
    before = listing(out)
    running = irq.start("export", int4, out, "--to", "dense", "--overwrite")
    deadline = time.monotonic() + 60
    while not staging.exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    running.kill(signal.SIGTERM)
    code = running.wait().code
    assert code in (0, 128 + signal.SIGTERM)  # 0 where it was done before the signal came
    if code:
        assert listing(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
