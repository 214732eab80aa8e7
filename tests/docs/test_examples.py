"""The scripts of the documentation, run as they stand; and what the page says of them."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from irq_convert.adapters.put_on import check_adapter
from irq_convert.cli.main import app
from tests.fresh import Forks
from tests.jobs.finetune.base import write_tales
from tests.paths import ROOT

DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGE = DOCS / "finetune.md"


@pytest.fixture(scope="module")
def artifact(demo_nf3: Path) -> Path:
    return demo_nf3


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(python: Forks, script: str, *args: object) -> None:
    done = python(RUN, EXAMPLES / script, *args, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]


def assert_trained(out: Path, artifact: Path, kind: str) -> None:
    checked = check_adapter(out, artifact)
    assert (checked.kind, checked.base_matches) == (kind, True)
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)


@pytest.mark.slow
def test_trainer(python: Forks, artifact: Path, tmp_path: Path) -> None:
    text = write_tales(tmp_path / "tales.txt", 2)
    run(python, "train_with_trainer.py", artifact, text, tmp_path / "out", 1)
    assert_trained(tmp_path / "out", artifact, "iec")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer(python: Forks, artifact: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Count {n}.", "input": "", "output": f"{n} cats."} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run(python, "train_with_sft.py", artifact, tmp_path / "rows.json", tmp_path / "out", 1)
    assert_trained(tmp_path / "out", artifact, "block")


@pytest.mark.parametrize("script", ["train_with_trainer.py", "train_with_sft.py"])
def test_the_page_shows_the_scripts_as_they_are(script: str) -> None:
    code = (EXAMPLES / script).read_text(encoding="utf-8")
    body = code[code.rindex('"""\n', 0, code.index("import ")) + 4 :].strip()
    assert body in PAGE.read_text(encoding="utf-8")


def test_the_page_names_every_option_and_no_other() -> None:
    shown = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    page = PAGE.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    assert options == set(re.findall(r"`(--[a-z][a-z-]+)", page))
