"""Artifacts of classes that predict no next token are refused before any weight is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification, LlamaModel

from irq_convert.errors import UsageError
from irq_convert.jobs.finetune.estimate import estimate_finetune
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import assert_one_line
from tests.tiny import tiny_config


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize("job", [finetune, estimate_finetune])
def test_no_causal_language_model(tmp_path: Path, tales: Path, cls: type, job: object) -> None:
    cls(tiny_config()).save_pretrained(tmp_path / "source")  # type: ignore[attr-defined]
    quantize(tmp_path / "source", tmp_path / "a", block_size=32)
    where = [tmp_path / "out"] if job is finetune else []
    with pytest.raises(UsageError) as caught:
        job(tmp_path / "a", tales, *where)  # type: ignore[operator]
    assert_one_line(str(caught.value), cls.__name__, "no causal language model", "ForCausalLM")
    assert not (tmp_path / "out").exists()
