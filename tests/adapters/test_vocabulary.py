"""Adapters whose model got a larger vocabulary, and saves embeddings: loaded again, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import irq_convert
from irq_convert.errors import IrqError
from tests.adapters.helpers import artifact, iec_config
from tests.folders import assert_one_line, change_tensors

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.embed_tokens"
IDS = torch.arange(70, 88).reshape(2, 9)  # the new tokens among them


@pytest.fixture(params=["own head", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return artifact(tmp_path / "base", tied=request.param == "tied")


def grown(base: Path) -> Any:
    model = irq_convert.load(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(88, mean_resizing=False)
    return model


def adapted(base: Path, saved: list[str]) -> PeftModel:
    model = get_peft_model(grown(base), iec_config(modules_to_save=saved))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_what_was_saved_is_loaded(base: Path, saved: list[str], tmp_path: Path) -> None:
    model = adapted(base, saved)
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / WEIGHTS).keys()
    assert any(".modules_to_save." in key for key in keys)  # what a second copy is called
    found = PeftModel.from_pretrained(grown(base), tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model))


def test_copies_that_differ_are_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, ["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    copy = f"{KEY}.modules_to_save.weight"
    change_tensors(tmp_path / "adapter", lambda tensors: tensors[copy].add_(1), WEIGHTS)
    with pytest.raises(IrqError) as error:
        PeftModel.from_pretrained(grown(base), tmp_path / "adapter")
    assert_one_line(str(error.value), copy, f"{KEY}.weight", "[88, 96]", "differ")


def test_a_copy_of_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, ["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    other = KEY.replace("embed_tokens", "norm") + ".modules_to_save.weight"
    change_tensors(
        tmp_path / "adapter", lambda tensors: tensors.update({other: torch.ones(96)}), WEIGHTS
    )
    with pytest.raises(IrqError, match=r"unknown .*norm"):
        PeftModel.from_pretrained(grown(base), tmp_path / "adapter")


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_training_goes_on_and_ends_with_the_best(base: Path, tmp_path: Path) -> None:
    whole = trainer(adapted(base, ["embed_tokens"]), tmp_path / "whole", 3)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    part = trainer(adapted(base, ["embed_tokens"]), tmp_path / "part", 3)
    part.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-1"))
    torch.testing.assert_close(logits(part.model), logits(whole.model), atol=1e-5, rtol=1e-5)
    stored = load_file(tmp_path / "part" / "checkpoint-3" / WEIGHTS)[f"{KEY}.weight"]
    wanted = load_file(tmp_path / "whole" / "checkpoint-3" / WEIGHTS)[f"{KEY}.weight"]
    torch.testing.assert_close(stored, wanted, atol=1e-5, rtol=1e-5)
