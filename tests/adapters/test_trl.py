"""Preferences with TRL: an adapter that is trained further is its own reference."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import irq_convert

from .helpers import randomize

ROWS = [
    {"prompt": f"Count {n}. ", "chosen": f"{n} cats.", "rejected": f"{n} dogs."} for n in range(8)
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("options", [{"r": 4}, {"r": 0, "statistics": "both"}])
def test_the_reference_is_a_copy(demo_nf3: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = irq_convert.IecLoraConfig(task_type="CAUSAL_LM", **options)
    model = irq_convert.attach(irq_convert.load(demo_nf3, dtype=torch.float32), config)
    randomize(model, size=0.05)
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
        max_length=64, bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(demo_nf3),
    )  # fmt: skip
    trainer.train()
    first, second = (step["loss"] for step in trainer.state.log_history if "loss" in step)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert second < first
