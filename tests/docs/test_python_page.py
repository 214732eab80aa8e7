"""docs/python.md, every block run in order; and the face of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import irq_convert
from tests.jobs.finetune.base import write_tales
from tests.paths import DEMO, ROOT

PAGE = ROOT / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def seed() -> Iterator[None]:
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)


@pytest.mark.slow
def test_every_block_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: None,
) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    write_tales(tmp_path / "wiki.txt", 3)
    write_tales(tmp_path / "data.txt", 6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert "model-irq-nf3: not empty; choose another folder, or --overwrite to replace it" in shown
    assert names["report"].bits_per_weight == pytest.approx(3.3, abs=0.2)
    assert names["result"].kl > 0
    assert names["merged"].to == "irq"
    assert "my-model" in names["pushed"].card


def test_the_page_shows_every_verb() -> None:
    page = PAGE.read_text()
    verbs = ("quantize", "inspect", "verify", "evaluate", "load", "attach", "finetune", "merge")
    verbs += ("export", "push", "measure", "estimate_quantize", "generate", "evaluate_tasks")
    for verb in verbs:
        assert f"irq_convert.{verb}(" in page


def test_names_come_from_their_modules_when_they_are_used() -> None:
    homes = irq_convert._HOMES
    assert set(irq_convert.__all__) == {*homes, "__version__"}
    for name, home in homes.items():
        assert getattr(irq_convert, name) is getattr(import_module(home), name)
    assert set(irq_convert.__all__) <= set(dir(irq_convert))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = irq_convert.nothing


def test_importing_the_package_is_cheap() -> None:
    """No library of numerics or of models is loaded: what makes an import slow."""
    code = (
        "import sys, irq_convert; "
        "print(sorted({'torch', 'numpy', 'transformers', 'peft', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_options_and_settings_exclude_each_other(tmp_path: Path) -> None:
    options = irq_convert.ExportOptions(to="dense")
    with pytest.raises(irq_convert.UsageError, match="either options or single settings"):
        irq_convert.export(tmp_path, tmp_path / "out", options, dtype="float16")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"to": "onnx"}, "--to onnx: choose one of dense, adapter, irq"),
        ({"to": "irq", "tau": "int4"}, "--tau int4: choose one of float32"),
        ({"resume": "perhaps"}, "--resume perhaps: choose one of auto, required, never"),
    ],
)
def test_words_that_mean_nothing(settings: dict[str, str], says: str) -> None:
    with pytest.raises(irq_convert.UsageError) as caught:
        irq_convert.MergeOptions(**settings)  # type: ignore[arg-type]
    assert str(caught.value).startswith(says)


def test_a_codebook_says_its_bits() -> None:
    of = irq_convert.QuantizeOptions.of
    assert of().spec.codebook == "nf4"
    assert of(bits=3).spec.codebook == "nf3"
    assert of(codebook="int2").spec.codebook == "int2"
    assert of(spec=irq_convert.QuantSpec("nf2"), keep=("a",)).keep == ("a",)
    with pytest.raises(irq_convert.UsageError, match="int2 has 2 bits, not 3"):
        of(codebook="int2", bits=3)
