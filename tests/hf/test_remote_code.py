"""Code that comes with a model: run when it was asked for, refused else, never a question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irq_convert.errors import IrqError
from irq_convert.hf.causal_lm import load_config, load_tokenizer
from irq_convert.remote_code import remote_code, trusted
from tests.tiny import tiny_config

CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


def write_own(folder: Path, mark: Path) -> Path:
    """A folder whose configuration is a class of its own, which makes the file `mark`."""
    tiny_config().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    return write_own(tmp_path / "own", tmp_path / "mark")


def test_code_runs_only_where_it_is_trusted(own: Path, tmp_path: Path) -> None:
    assert not trusted()
    with pytest.raises(IrqError, match="add --trust-remote-code"):
        load_config(own)
    assert not (tmp_path / "mark").exists()
    with remote_code(True):
        assert trusted()
        assert type(load_config(own)).__name__ == "OwnConfig"
    assert (tmp_path / "mark").exists()
    assert not trusted()
    with pytest.raises(IrqError):
        load_tokenizer(own)
