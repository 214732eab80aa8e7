"""`generate` as a user runs it: pipes, two columns, Ctrl-C, and a conversation at a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from irq_convert.cli.chat import talk_with
from irq_convert.cli.generate_show import _told_apart
from irq_convert.cli.main import app
from irq_convert.errors import UsageError
from irq_convert.jobs.generate.generate import generate
from irq_convert.jobs.generate.models import load_writers
from irq_convert.jobs.generate.options import GenerateOptions
from tests.folders import change_json
from tests.jobs.generate.test_generate import PROMPT, TEMPLATE, with_template
from tests.paths import DEMO

from .process import Commands
from .terminal import until


def run(*args: object, stdin: str | None = None) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    words = ["generate", *map(str, args)]
    result = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_text_alone_is_on_standard_output(demo_nf3: Path) -> None:
    text = generate(demo_nf3, PROMPT, max_tokens=16).generated.text
    out, err = run(demo_nf3, "--prompt", PROMPT, "--max-tokens", 16)
    assert out == f"{text}\n"
    assert err.startswith("16 tokens, ")
    assert " tokens a second, the first after " in err
    assert err.endswith("--max-tokens reached\n")
    assert run(demo_nf3, "--prompt", "-", "--max-tokens", 16, stdin=PROMPT)[0] == out
    with pytest.raises(UsageError, match="prompt: not UTF-8"):
        generate(demo_nf3, os.fsdecode(b"caf\xe9"))


def test_json_of_two(demo_nf3: Path) -> None:
    out, err = run(demo_nf3, "--prompt", PROMPT, "--max-tokens", 9, "--against", DEMO, "--json")
    found = json.loads(out)
    assert err == ""
    assert (found["tokens"], found["ended"], found["prompt"]) == (9, "length", PROMPT)
    assert found["reference"]["text"] == generate(DEMO, PROMPT, max_tokens=9).generated.text


def test_two_columns_in_eighty(demo_nf3: Path) -> None:
    out, err = run(demo_nf3, "--prompt", PROMPT, "--max-tokens", 40, "--against", DEMO)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["demo-nf3", "model"]
    assert all(line.startswith(PROMPT[:4], at) for line in lines[1:2] for at in (0, 40))
    left = " ".join(line[:38].strip() for line in lines[1:])
    assert (
        left.split() == (PROMPT + generate(demo_nf3, PROMPT, max_tokens=40).generated.text).split()
    )
    assert err.count("tokens a second") == 2
    assert "characters alike" in err or "the same text" in err


def test_two_columns_grow_at_a_terminal(irq: Commands, demo_nf3: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    more = ("--prompt", PROMPT, "--max-tokens", 40, "--against", DEMO)
    running = irq.start("generate", demo_nf3, *more, terminal=os.ttyname(theirs))
    seen = until(ours, "alike", after="tokens a second")
    assert running.wait().code == 0
    os.close(ours)
    os.close(theirs)
    drawn = re.split(r"(?:\x1b\[1A\x1b\[2K)+", seen)  # up a line, and clear it
    texts = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", each) for each in drawn]
    assert len(texts) > 2
    assert all("demo-nf3" in text for text in texts)
    assert len(texts[0].split()) < len(texts[-1].split())
    columns = texts[-1].splitlines()[:-3]  # below them how fast both were
    assert max(map(len, columns)) <= 80


def test_a_conversation_that_outgrows_the_positions(
    demo_nf3: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    talk = with_template(tmp_path / "talk")
    options = GenerateOptions(max_tokens=4)
    writers = load_writers(demo_nf3, tokenizer=talk, options=options)
    lines = iter(["Tell me of the cat and the dog. " * 12, "And then? " * 40, "What?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    talk_with(writers, None, options)
    told = capsys.readouterr().err
    assert told.count("the conversation begins anew") == 1
    assert told.count("tokens a second") == 3


def _end() -> str:
    raise EOFError


def test_names_are_told_apart() -> None:
    assert _told_apart(["a/model", "b/other"]) == ["model", "other"]
    assert _told_apart(["a/model", "b/model"]) == ["a/model", "b/model"]
    assert _told_apart(["a/model", "a/model"]) == ["model (1)", "model (2)"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--prompt: give a text"),
        (["--chat"], "there is none: give --prompt"),
        (["--system", "x", "--prompt", "y"], "--chat makes of it"),
        (["--chat", "--prompt", "Hi"], "has no chat template"),
        (["--prompt", "x", "--adapter", "nothing"], "no such folder"),
        (["--prompt", "-"], "standard input: not UTF-8"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "--prompt: not UTF-8"),
        (["--prompt", "x", "--chat", "--system", os.fsdecode(b"\xe9")], "--system: not UTF-8"),
        (["--prompt", "x", "--adapter", "~no-such-user-here/a"], "no such folder"),
        (["--prompt", "x", "--against", "~no-such-user-here/m"], "no such folder"),
    ],
)
def test_refusals(args: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(DEMO), *args], input=b"caf\xe9")
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert result.stdout == ""


def test_an_interrupt_leaves_what_there_is(irq: Commands, tmp_path: Path) -> None:
    """Of a text that never ends: no file names an end token any more."""
    endless = tmp_path / "endless"
    endless.mkdir()
    for path in DEMO.iterdir():
        (endless / path.name).write_bytes(path.read_bytes())
    more = {"max_position_embeddings": 1 << 20, "eos_token_id": None}
    change_json(endless / "config.json", lambda raw: raw.update(more))
    (endless / "generation_config.json").unlink()
    change_json(endless / "tokenizer_config.json", lambda raw: raw.pop("eos_token"))
    running = irq.start(
        "generate", endless, "--prompt", PROMPT, "--max-tokens", 100_000, "--temperature", 1.5
    )
    deadline = time.monotonic() + 60
    while not (seen := running._out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill(signal.SIGINT)
    result = running.wait()
    assert result.code == 130
    assert result.out.startswith(seen)
    assert result.out.endswith("\n")
    assert result.err.endswith("; stopped\n")
    assert result.err.count("\n") == 1


def test_a_conversation_at_a_terminal(irq: Commands, demo_nf3: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "talk")
    ours, theirs = pty.openpty()
    more = ("--chat", "--tokenizer", tmp_path / "talk", "--max-tokens", 6)
    running = irq.start("generate", demo_nf3, *more, terminal=os.ttyname(theirs))
    assert "Ctrl-D ends" in until(ours, "> ")
    os.write(ours, b"Hello.\n")
    until(ours, "> ", after="tokens a second")
    os.write(ours, b"And then?\n")
    until(ours, "> ", after="tokens a second")
    os.write(ours, b"\x04")
    assert running.wait().code == 0
    os.close(ours)
    os.close(theirs)
