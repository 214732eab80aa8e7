"""`quantize --calibrate` as people meet it: one command, streamed, shared out, looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import listing
from tests.jobs.calibration.words import word_text, write_word_tokenizer
from tests.jobs.push.server import serve
from tests.jobs.push.state import FolderRepo, World
from tests.tiny import LLAMA, VOCABULARY, llama_tensors, write_source

from .process import Commands, assert_fails

NAME = "org/model"
TARGET = ("--target-bits", "5", "--include-embeddings")
OPTIONS = (
    "--bits", "2", "--block-size", "16", "--calibration-tokens", "512", "--calibration-window",
    "32", "--threads", "1",
)  # fmt: skip


@pytest.fixture
def calibration_source(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "model", llama_tensors(), LLAMA, shards=3)
    write_word_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture
def words(work: Path) -> Path:
    path = work / "words.txt"
    path.write_text(word_text(VOCABULARY, 2000))
    return path


@pytest.mark.slow
def test_a_report_and_what_inspect_shows(
    irq: Commands, work: Path, calibration_source: Path, words: Path
) -> None:
    command = ("quantize", calibration_source, "out", "--calibrate", words.name, *OPTIONS)
    planned = irq(*command, "--dry-run", cwd=work)
    assert planned.code == 0, planned.err
    assert "512 tokens in 16 windows, 2 layers" in planned.out
    done = irq(*command, cwd=work)
    assert done.code == 0, done.err
    for text in (done.out, irq("inspect", "out", cwd=work).out):
        assert "words.txt, 512 tokens in 16 windows" in text
        assert "held-out KL" in text
        assert max(map(len, text.splitlines())) <= 80
    assert irq("verify", "out", cwd=work).code == 0
    told = json.loads(irq("inspect", "out", "--json", cwd=work).out)
    assert told["manifest"]["calibration"]["kept"] == "calibrated" if "manifest" in told else True
    assert not list(work.glob("out.*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        ("--calibrate", "words.txt", *OPTIONS),
        (*TARGET, "--target-text", "words.txt", "--target-tokens", "512"),
    ],
    ids=["calibrated", "a target"],
)
def test_streamed_from_the_hub(
    irq: Commands,
    hub_settings: Callable[[str], dict[str, str]],
    work: Path,
    calibration_source: Path,
    words: Path,
    asked: tuple[str, ...],
) -> None:
    """The same bytes as from the folder, and nothing of the source left."""
    data = (*asked, "--max-shard-size", "0.00005")
    assert irq("quantize", calibration_source, "local", *data, cwd=work).code == 0
    with serve(World({NAME: FolderRepo(calibration_source)})) as server:
        env = hub_settings(server.url)
        done = irq("quantize", NAME, "out", *data, "--stream", cwd=work, **env)
        assert done.code == 0, done.err
    streamed = work / "home" / "irq-convert" / "streamed"
    assert not streamed.exists() or not any(streamed.rglob("*.safetensors"))
    one, other = listing(work / "local"), listing(work / "out")
    for found in (one, other):
        found.pop("irq_manifest.json")  # names the source
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("asked", [OPTIONS, (*TARGET, *OPTIONS[4:])], ids=["alone", "a target"])
def test_two_processes_make_the_same(
    irq: Commands, work: Path, calibration_source: Path, words: Path, asked: tuple[str, ...]
) -> None:
    given = ("--calibrate", words, *asked, "--max-shard-size", "0.00005")
    assert irq("quantize", calibration_source, "alone", *given, cwd=work).code == 0
    done = irq.together(2, "quantize", calibration_source, work / "both", *given)
    assert done.code == 0, done.err
    assert listing(work / "alone") == listing(work / "both")


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--calibrate", "none.txt"), 2, "none.txt: no such text file"),
        (("--calibrate", "words.txt", "--calibration-window", "65"), 2, "context of 64"),
        (("--calibrate", "words.txt", "--correction", "2"), 2, "--correction 2: from 0 to 1"),
        (("--calibrate", "words.txt", "--damping", "0"), 2, "--damping 0: above 0"),
        (("--calibrate", "words.txt", "--importance", "x"), 2, "leave out --importance"),
        (("--calibrate", "self", "--stream"), 2, "leave out --stream"),
    ],
)
def test_one_line_and_nothing_left(
    irq: Commands, work: Path, calibration_source: Path, words: Path,
    more: tuple[str, ...], code: int, says: str,
) -> None:  # fmt: skip
    found = irq("quantize", calibration_source, "out", *OPTIONS, *more, cwd=work)
    assert_fails(found, code, says)
    assert [path.name for path in work.iterdir()] == ["words.txt"]
