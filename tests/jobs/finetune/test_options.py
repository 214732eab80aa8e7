"""Options refused, and the choices that the recipe makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.artifact.adapter_kinds import AdapterKind, Connection
from irq_convert.errors import UsageError
from irq_convert.jobs.finetune.options import (
    FinetuneOptions,
    Optimizer,
    TrainDtype,
)
from irq_convert.jobs.finetune.recipe import (
    Base,
    Recipe,
    decide,
    holdout_fraction,
    recipe_differences,
    sequence_length,
)

SMALL, LARGE = Base(6_738_415_616, 2048, 2), Base(32_528_943_616, 2048, 4)


def recipe(options: FinetuneOptions | None = None, base: Base = SMALL, **changes: Any) -> Recipe:
    facts: dict[str, Any] = {
        "examples": 100,
        "processes": 1,
        "device": "cpu",
        "bfloat16": False,
        "holdout": 0.05,
    }
    return decide(options or FinetuneOptions(), base, **{**facts, **changes})


def test_the_defaults_are_the_papers_recipe() -> None:
    found = recipe()
    assert (found.lora, found.connection, found.rank, found.alpha) == ("iec", "both", 64, 16.0)
    assert (found.dropout, found.learning_rate, found.steps) == (0.1, 2e-4, 10_000)
    assert (found.batch_size, found.max_grad_norm, found.warmup) == (16, 0.3, 0)
    assert found.micro_batch * found.accumulation == 16
    assert found.target_modules is None
    assert (found.dtype, found.optimizer, found.eval_every) == ("float32", "adamw", 1000)


# LLaMA-13B, and one with a larger vocabulary
@pytest.mark.parametrize("weights", [13_015_864_320, 13_476_839_424])
def test_thirteen_billion_is_small(weights: int) -> None:
    found = recipe(base=Base(weights, 2048, 3))
    assert (found.dropout, found.learning_rate) == (0.1, 2e-4)


def test_statistics_move_by_parts_of_the_distance_between_levels() -> None:
    options = FinetuneOptions(lora=AdapterKind.STATISTICS)
    rates = [recipe(options, Base(1, None, bits)).statistics_rate for bits in (2, 3, 4)]
    assert rates == [3e-3, 1.3e-3, 6e-4]
    mixed = recipe(options, Base(1, None, 2.5)).statistics_rate
    assert mixed is not None
    assert 1.3e-3 < mixed < 3e-3


def test_large_models_get_the_other_half_of_the_recipe() -> None:
    found = recipe(base=LARGE)
    assert (found.dropout, found.learning_rate) == (0.05, 1e-4)
    asked = recipe(FinetuneOptions(dropout=0.0, learning_rate=3e-4), base=LARGE)
    assert (asked.dropout, asked.learning_rate) == (0.0, 3e-4)


@given(
    share=st.integers(1, 64),
    processes=st.integers(1, 8),
)
def test_the_batch_is_what_was_asked_for(share: int, processes: int) -> None:
    options = FinetuneOptions(batch_size=share * processes)
    found = recipe(options, processes=processes)
    assert found.micro_batch * found.accumulation * processes == options.batch_size
    assert found.micro_batch <= 4


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match="--batch-size 16: 3 processes cannot share it"):
        recipe(processes=3)
    with pytest.raises(UsageError, match="--micro-batch 3: does not divide the 16"):
        recipe(FinetuneOptions(micro_batch=3))


@pytest.mark.parametrize(
    ("epochs", "processes", "steps"), [(1, 1, 7), (2, 1, 14), (0.5, 1, 4), (1, 2, 7), (1, 4, 7)]
)
def test_epochs_become_steps(epochs: float, processes: int, steps: int) -> None:
    assert recipe(FinetuneOptions(epochs=epochs), processes=processes).steps == steps


def test_bfloat16_where_the_device_is_good_at_it() -> None:
    assert recipe(bfloat16=True).dtype == "bfloat16"
    assert recipe(FinetuneOptions(dtype=TrainDtype.FLOAT32), bfloat16=True).dtype == "float32"


def test_paged_adamw_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match="CUDA device and the package bitsandbytes"):
        recipe(FinetuneOptions(optimizer=Optimizer.PAGED_ADAMW))


def test_sequence_length() -> None:
    assert sequence_length(FinetuneOptions(), 2048) == 512
    assert sequence_length(FinetuneOptions(), 256) == 256
    assert sequence_length(FinetuneOptions(), None) == 512
    assert sequence_length(FinetuneOptions(sequence_length=1024), 2048) == 1024
    with pytest.raises(UsageError, match="more than the model's 256 positions"):
        sequence_length(FinetuneOptions(sequence_length=257), 256)


def test_holdout() -> None:
    assert holdout_fraction(FinetuneOptions(), False) == 0.05
    assert holdout_fraction(FinetuneOptions(), True) == 0
    assert holdout_fraction(FinetuneOptions(holdout=0.0), False) == 0
    with pytest.raises(UsageError, match="--eval-data"):
        holdout_fraction(FinetuneOptions(holdout=0.1), True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "--rank 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"micro_batch": 0}, "--micro-batch 0"),
        ({"sequence_length": 1}, "--sequence-length 1: at least 2"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0: a positive"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"learning_rate": 1e36}, "--learning-rate 1e.36: beyond"),
        ({"alpha": 0.0}, "--alpha 0.0"),
        ({"epochs": float("inf")}, "--epochs inf"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"holdout": 1.0}, "--holdout 1.0"),
        ({"max_grad_norm": -0.1}, "--max-grad-norm -0.1"),
        ({"weight_decay": float("nan")}, "--weight-decay nan"),
        ({"warmup": -1}, "--warmup -1"),
        ({"save_every": 0}, "--save-every 0"),
        ({"steps": 5, "epochs": 1.0}, "--steps and --epochs"),
        ({"lora": AdapterKind.PLAIN, "connection": Connection.BOTH}, "--lora plain has no elastic"),
        ({"target_modules": ("q_proj", "")}, "an empty name"),
        ({"lora": "statistics", "rank": 8}, "--rank: --lora statistics has no matrices"),
        ({"lora": "statistics", "alpha": 8.0}, "--alpha: --lora statistics has no"),
        ({"lora": "statistics", "rslora": True}, "--rslora: --lora statistics has no"),
        ({"lora": "statistics", "dropout": 0.0}, "--dropout: --lora statistics has no"),
    ],
)
def test_refused_options(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FinetuneOptions(**changes)


def test_differences_name_the_option_and_both_values() -> None:
    old = recipe()
    assert recipe_differences(old.to_dict(), old.to_dict()) == []
    free = replace(old, eval_every=3, save_every=4, device="cuda:0")
    assert recipe_differences(old.to_dict(), free.to_dict()) == []
    assert recipe_differences(old.to_dict(), replace(old, processes=2).to_dict()) == [
        "the number of processes was 1 and is 2 now"
    ]
    other = replace(old, learning_rate=1e-3, target_modules=("q_proj",))
    assert recipe_differences(old.to_dict(), other.to_dict()) == [
        "--target-modules was None and is ['q_proj'] now",
        "--learning-rate was 0.0002 and is 0.001 now",
    ]
