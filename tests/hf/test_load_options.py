"""What `load` takes, and what it says of a config.json that describes no model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import irq_convert
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf import quantizer
from tests.folders import assert_one_line, change_json
from tests.hf.artifact import write_artifact
from tests.paths import ROOT
from tests.tiny import tiny_model


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "a", tiny_model())
    return tmp_path / "a"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_by_both_its_names(artifact: Path, name: str, dtype: Any) -> None:
    model = irq_convert.load(artifact, **{name: dtype})
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_keys_of_the_configuration(artifact: Path) -> None:
    model = irq_convert.load(artifact, use_cache=False, num_labels=5, attn_implementation="eager")
    assert model.config.use_cache is False
    assert model.config.num_labels == 5
    assert model.config._attn_implementation == "eager"


def test_a_head_of_another_size_is_new_only_where_asked(artifact: Path, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(artifact, num_labels=2)
    whole.save_pretrained(tmp_path / "b")
    with pytest.raises(IrqError, match="ignore_mismatched_sizes"):
        irq_convert.load(tmp_path / "b", num_labels=3)
    found = irq_convert.load(tmp_path / "b", num_labels=3, ignore_mismatched_sizes=True)
    assert found.score.weight.shape == (3, 96)


def test_an_option_that_nobody_knows(artifact: Path) -> None:
    with pytest.raises(IrqError, match="unexpected keyword argument 'depth_of_field'") as error:
        irq_convert.load(artifact, depth_of_field=3)
    assert_one_line(str(error.value), str(artifact))


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", "3", '"words"', "null", "[" * 100_000, "\xff\xfe", '{"model_type": 5}']
)
def test_files_that_are_no_configuration(artifact: Path, text: str) -> None:
    (artifact / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(IrqError) as error:
        irq_convert.load(artifact)
    assert_one_line(str(error.value), str(artifact), "cannot be read as a model")


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda raw: raw.update(hidden_size="wide"), "hidden_size"),
    (lambda raw: raw.update(num_hidden_layers=[]), "num_hidden_layers"),
    (lambda raw: raw.update(rope_parameters=7), "rope_parameters"),
    (lambda raw: raw.update(vocab_size=-4), "-4"),
    (lambda raw: raw.update(quantization_config=3), "int"),
    (lambda raw: raw.update(architectures=[3]), "int"),
    (lambda raw: raw.update(dtype="nope"), "nope"),
]


@pytest.mark.parametrize(("change", "word"), CHANGES)
def test_values_of_a_wrong_type(artifact: Path, change: Any, word: str) -> None:
    change_json(artifact / "config.json", change)
    with pytest.raises(IrqError) as error:
        irq_convert.load(artifact)
    assert_one_line(str(error.value), str(artifact), word)


def test_a_model_that_is_not_quantized(artifact: Path) -> None:
    raw = json.loads((artifact / "config.json").read_text())
    del raw["quantization_config"]
    (artifact / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="not an irq artifact"):
        irq_convert.load(artifact)


def test_a_transformers_that_is_too_old(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = ".".join(map(str, quantizer.LEAST_TRANSFORMERS))
    assert f"transformers>={least},<6" in project["dependencies"]
    monkeypatch.setattr(quantizer, "TRANSFORMERS", "5.19.0")
    with pytest.raises(UsageError, match=r"need transformers 5\.\d+ or later, .* has 5\.19\.0"):
        irq_convert.load(artifact)
