"""A tokenizer with a padding token that the model has no embedding for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.jobs.finetune.finetune import finetune
from tests.jobs.finetune.base import quick


@pytest.mark.slow
def test_padding_beyond_the_embedding_changes_nothing(
    artifact: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Batches of unequal examples train to the same loss as with a padding token that is there."""
    rows = [{"prompt": "Once", "completion": " a cat" * (1 + at % 5)} for at in range(12)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    options = quick(AdapterKind.PLAIN)
    plain = finetune(artifact, data, tmp_path / "plain", options)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path / "grown")
    grown = finetune(artifact, data, tmp_path / "grown-out", options, tokenizer=tmp_path / "grown")
    assert plain.after is not None
    assert grown.after is not None
    assert grown.after.mean == plain.after.mean
