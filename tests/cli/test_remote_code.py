"""--trust-remote-code: one option in every command that loads a model, and no question."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.process import Commands, assert_fails
from tests.hf.test_remote_code import write_own


def test_a_command_refuses_in_one_line(irq: Commands, tmp_path: Path) -> None:
    own = write_own(tmp_path / "own", tmp_path / "mark")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    result = irq("eval", own, "--text", text)
    assert_fails(result, 1, "own", "trust_remote_code")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("command", ["eval", "finetune", "merge", "export"])
def test_every_command_that_loads_a_model_has_the_option(irq: Commands, command: str) -> None:
    assert "--trust-remote-code" in irq(command, "--help", COLUMNS="100").out
