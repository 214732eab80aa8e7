"""Every tuner of the installed PEFT on a packed model: as on the dense twin, or it says why not.

test_other_tuners.py has those that would write into packed layers. Here are the others, which leave
layers alone: prompts, biases, routers, rows of embeddings.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import irq_convert
from irq_convert.errors import UsageError
from tests.folders import assert_one_line

from .test_other_tuners import (
    COMPUTING,
    FAILING,
    IDS,
    MERGING,
    SETTINGS,
    artifact,  # noqa: F401 - the fixture
    dense_twin,
)

VIRTUAL = {"num_virtual_tokens": 4}
WORKING: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 16},
    "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 2},
    "CARTRIDGE": VIRTUAL,
    "CPT": {
        "cpt_token_ids": [1, 2, 3, 4],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "BEFT": {},
    "LILY": {},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4], "target_modules": ["embed_tokens"]},
    "IEC_LORA": {"r": 4},
}
"""Tuners that do on a packed model what they do on a dense one."""
ELSEWHERE = {
    "XLORA": "needs adapters to choose from: test_a_mixture_of_adapters",
    "GLORA": "asks for plain linear layers: test_a_tuner_that_names_the_layer_it_does_not_know",
    "SHADOW": "fails on the dense twin too: test_shadow_fails_as_on_the_dense_twin",
    "ADAMSS": "needs scikit-learn, which is not installed",
}


def test_every_type_of_peft_is_accounted_for() -> None:
    known = {*WORKING, *ELSEWHERE, *MERGING, *COMPUTING, *(kind for kind, _ in FAILING.values())}
    assert {kind.name for kind in peft.PeftType} <= known | {"IEC_LORA"}


def settings(kind: str, **more: Any) -> Any:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    known = inspect.signature(config.__init__).parameters
    given = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    given = {key: value for key, value in given.items() if key in known}
    return config(**{**given, **SETTINGS.get(kind, {}), **WORKING.get(kind, {}), **more})


def inputs(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if kind in ("MULTITASK_PROMPT_TUNING", "POLY"):
        found["task_ids"] = torch.tensor([0, 1])
    if kind == "CPT":
        found["input_type_mask"] = torch.full_like(IDS, 4)
    return found


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs(kind)).logits
    return found


def stepped(model: Any, kind: str) -> Any:
    """`model` after one step of training, which has to reach something."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    model.train()(**inputs(kind), labels=IDS).loss.backward()
    torch.optim.SGD(trained, 1.0).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    return model.eval()


def packed(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.dtype == torch.uint8]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKING)
def test_a_tuner_that_leaves_layers_alone(
    kind: str,
    artifact: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = irq_convert.load(artifact)
    codes, untouched = packed(base), logits(base, "LORA")
    model = stepped(get_peft_model(base, settings(kind)), kind)
    wanted = logits(model, kind)
    assert wanted.shape[0] == 2
    assert wanted.shape != untouched.shape or not torch.equal(wanted, untouched)
    model.save_pretrained(tmp_path / "adapter")
    for fresh in (irq_convert.load(artifact), dense_twin(artifact)):
        again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(logits(again, kind), wanted, atol=1e-5, rtol=1e-5)
    after = packed(model)
    assert len(after) == len(codes)
    assert all(torch.equal(a, b) for a, b in zip(after, codes, strict=True))


@pytest.mark.parametrize("kind", ["BEFT", "LILY", "POLY", "PROMPT_TUNING", "CARTRIDGE"])
def test_what_never_merges_says_so_in_pefts_words(
    kind: str,
    artifact: Path,  # noqa: F811
) -> None:
    words = []
    for base in (irq_convert.load(artifact), dense_twin(artifact)):
        model = stepped(get_peft_model(base, settings(kind)), kind)
        with pytest.raises((AttributeError, NotImplementedError, ValueError)) as error:
            model.merge_and_unload()
        words.append(str(error.value))
    assert words[0] == words[1]


def test_rows_of_the_embedding_merge(artifact: Path) -> None:  # noqa: F811
    kind = "TRAINABLE_TOKENS"
    model = stepped(get_peft_model(irq_convert.load(artifact), settings(kind)), kind)
    wanted = logits(model, kind)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, kind), wanted, atol=1e-5, rtol=1e-5)


def test_norms_can_be_tuned(artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    config = LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    model = stepped(get_peft_model(irq_convert.load(artifact), config), "LORA")
    model.save_pretrained(tmp_path / "adapter")
    twin = PeftModel.from_pretrained(dense_twin(artifact), tmp_path / "adapter")
    wanted = logits(model, "LORA")
    torch.testing.assert_close(logits(twin, "LORA"), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), "LORA"), wanted)


def test_a_mixture_of_adapters(artifact: Path, tmp_path: Path) -> None:  # noqa: F811
    found = []
    for base in (irq_convert.load(artifact), dense_twin(artifact)):
        base.config.use_cache = False
        adapters = {}
        for number in range(2):
            torch.manual_seed(number)
            config = LoraConfig(
                r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
            )
            folder = tmp_path / str(number)
            get_peft_model(dense_twin(artifact), config).save_pretrained(folder)
            adapters[str(number)] = str(folder)
        torch.manual_seed(0)
        mixture = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters=adapters
        )
        found.append(logits(stepped(get_peft_model(base, mixture), "LORA"), "LORA"))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_tuner_that_names_the_layer_it_does_not_know(artifact: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError) as error:
        get_peft_model(irq_convert.load(artifact), settings("GLORA"))
    assert_one_line(str(error.value), "Glora", "IrqLinear", "irq-convert export --to dense")


def test_shadow_fails_as_on_the_dense_twin(artifact: Path) -> None:  # noqa: F811
    words = []
    for base in (irq_convert.load(artifact), dense_twin(artifact)):
        with pytest.raises(AttributeError) as error:
            stepped(get_peft_model(base, settings("SHADOW")), "SHADOW")
        words.append(str(error.value))
    assert words[0] == words[1]


def test_two_ways_to_train_one_embedding_are_pefts_own_mistake(
    artifact: Path,  # noqa: F811
) -> None:
    """A dense model would not help, so nothing is said of one."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], trainable_token_indices=[3, 7]
    )
    with pytest.raises(TypeError, match=r"^trainable_token_indices cannot be applied"):
        get_peft_model(irq_convert.load(artifact), config)
