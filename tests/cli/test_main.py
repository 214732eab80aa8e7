"""The program itself: help, version, exit codes, and a start that does not keep anyone waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from irq_convert import __version__
from irq_convert.cli.main import app, main

from .process import assert_fails, fresh

COMMANDS = ["quantize", "measure", "inspect", "verify", "eval", "finetune", "merge", "export"]
COMMANDS += ["generate", "push", "demo"]
HEAVY = ("torch", "transformers", "numpy", "numba", "huggingface_hub", "matplotlib")


def test_version_from_a_fresh_process() -> None:
    result = fresh("--version")
    assert (result.code, result.out, result.err) == (0, f"irq-convert {__version__}\n", "")


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: irq-convert {command}" in " ".join(result.output.split())


def test_defaults_are_shown_in_help() -> None:
    result = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "200"})
    for text in ("NAME-irq-CODEBOOK", "[default: all]", "[default: 64]", "REGEX=BITS"):
        assert text in result.output, text


@pytest.mark.parametrize(
    "args", [["--help"], ["quantize", "--help"], ["push", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "irq_convert", *args],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not [name for name in imported if name.partition(".")[0] in HEAVY]


def test_a_full_device_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr("irq_convert.cli.main.app", full)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "irq-convert: CUDA out of memory: stop what else uses it, or use --device cpu\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_is_one_line(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "irq_convert", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    line = "irq-convert: standard output: no space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.slow
def test_errors_from_a_fresh_process(tmp_path: Path) -> None:
    assert_fails(fresh("quantize", "m", "--bits", "5", cwd=tmp_path), 2, "--bits 5")
    assert fresh("nope").code == 2
    assert not list(tmp_path.iterdir())
