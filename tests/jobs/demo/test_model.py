"""The shipped model: small, loadable, as good as its card says, and hurt by crude quantization."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from irq_convert.jobs.demo.corpus import heldout
from irq_convert.jobs.demo.train import perplexity
from tests.paths import DEMO

LEVELS = {
    2: [-1.0, -0.2526, 0.2526, 1.0],
    3: [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0],
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return AutoTokenizer.from_pretrained(DEMO)(heldout()).input_ids


def card_perplexity() -> float:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\| held-out perplexity \| ([\d.]+) \|$", card, re.MULTILINE)
    assert found
    return float(found[1])


def test_folder_is_ordinary_and_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1_900_000
    assert {path.name for path in files} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "license: apache-2.0" in (DEMO / "README.md").read_text(encoding="utf-8")


def test_config_has_tails_and_grouped_queries() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] % 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_linears_dominate(model: LlamaForCausalLM) -> None:
    linear = sum(m.weight.numel() for m in decoder_linears(model))
    assert linear > 0.8 * sum(p.numel() for p in model.parameters())


def test_perplexity_is_what_the_card_says(model: LlamaForCausalLM, ids: list[int]) -> None:
    assert perplexity(model, ids, 256) == pytest.approx(card_perplexity(), rel=0.05)


def test_a_story_is_told_to_its_end(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompt = "One day in spring, Mia met Tom at the bridge."
    given = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**given, do_sample=False)
    assert int(out[0, -1]) in model.generation_config.eos_token_id
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith(prompt)
    assert text.endswith("\n\n")
    assert "Mia" in text[len(prompt) :]
    assert "Tom" in text[len(prompt) :]


def test_crude_quantization_hurts(model: LlamaForCausalLM, ids: list[int]) -> None:
    """Round to nearest shows at 3 bits and is plain at 2, or the demo would show nothing."""
    base = perplexity(model, ids[:6000], 256)
    worse = {}
    for bits, levels in LEVELS.items():
        crude = copy.deepcopy(model)
        for linear in decoder_linears(crude):
            linear.weight.data = round_to_nearest(linear.weight.data, torch.tensor(levels))
        worse[bits] = perplexity(crude, ids[:6000], 256) / base
    assert worse[3] > 1.01
    assert worse[2] > 1.2


def decoder_linears(model: LlamaForCausalLM) -> list[torch.nn.Linear]:
    return [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]


def round_to_nearest(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    pieces = []
    for block in weight.split(64, dim=1):
        scale = block.abs().amax(1, keepdim=True)
        codes = ((block / scale)[..., None] - levels).abs().argmin(-1)
        pieces.append(levels[codes] * scale)
    return torch.cat(pieces, dim=1)
