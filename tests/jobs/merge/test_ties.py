"""Embeddings and heads that were trained, on models that tie the two and on models that do not.

Every result has the logits of the trained model: of stock PEFT on the dense twin, since the adapter
is put on that too, and of base plus adapter here.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

import irq_convert
from irq_convert.adapters.put_on import check_adapter, put_on
from irq_convert.errors import IrqError
from tests.folders import assert_one_line, change_tensors, read_json, read_tensors
from tests.tiny import tiny_model

from .make import change_settings
from .test_beside import SIZES, artifact, assert_merges, outputs, resized, train

WEIGHTS = "adapter_model.safetensors"
EMBED, HEAD = "embed_tokens", "lm_head"
KEEP = {"ensure_weight_tying": True}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "lora of the embedding": ({"target_modules": ["q_proj", EMBED]}, False),
    "the same, kept tied": ({"target_modules": ["q_proj", EMBED], **KEEP}, True),
    "lora of the head": ({"target_modules": ["q_proj", HEAD]}, False),
    "the same head, kept tied": ({"target_modules": ["q_proj", HEAD], **KEEP}, True),
    "lora of both": ({"target_modules": ["q_proj", EMBED, HEAD]}, False),
    "trained embedding": ({"modules_to_save": [EMBED]}, False),
    "trained embedding, kept tied": ({"modules_to_save": [EMBED], **KEEP}, True),
    "trained head": ({"modules_to_save": [HEAD]}, False),
    "trained head, kept tied": ({"modules_to_save": [HEAD], **KEEP}, True),
    "both trained": ({"modules_to_save": [EMBED, HEAD]}, False),
    "lora and trained head": (
        {"target_modules": ["q_proj", EMBED], "modules_to_save": [HEAD]},
        False,
    ),
    "trained embedding and lora": (
        {"target_modules": ["q_proj", HEAD], "modules_to_save": [EMBED]},
        False,
    ),
    "tokens": ({"trainable_token_indices": [3, 511, 100]}, True),
    "tokens of both": ({"trainable_token_indices": {EMBED: [3, 7, 100], HEAD: [3, 8]}}, False),
    "the same tokens of both": ({"trainable_token_indices": {EMBED: [3, 8], HEAD: [3, 8]}}, True),
    "tokens of the head": ({"trainable_token_indices": {HEAD: [3, 8]}}, False),
}
"""Settings of stock LoRA, and whether the head of a tied model is the embedding after training."""
ONCE = {(case, None) for case in CASES if case.endswith("kept tied")}
ONCE |= {("lora and trained head", 520), ("trained embedding and lora", 520)}
"""Left out: the parts of these are tried with new rows and without."""


@pytest.fixture(scope="module")
def arts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("ties")
    return {
        tied: artifact(folder / str(tied), tiny_model(tie_word_embeddings=tied, **SIZES))
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def embedding_lora(arts: dict[bool, Path]) -> dict[bool, Path]:
    """An adapter with LoRA of the embedding, for either model."""
    for art in arts.values():
        trained(art, {"target_modules": ["q_proj", EMBED]}, art.with_name("adapter"))
    return {tied: art.with_name("adapter") for tied, art in arts.items()}


def trained(
    art: Path, settings: dict[str, Any], folder: Path, rows: int | None = None
) -> torch.Tensor:
    """What a model gives whose adapter is in `folder`: the very one that stock PEFT loads again."""
    config = LoraConfig(r=4, **{"target_modules": ["q_proj"], **settings})
    model = train(resized(irq_convert.load(art), rows), config, folder)
    wanted = outputs(model, rows or 512)
    twin = transformers.AutoModelForCausalLM.from_pretrained(art.with_name("twin"))
    stock = PeftModel.from_pretrained(resized(twin, rows), folder)
    torch.testing.assert_close(outputs(stock, rows or 512), wanted, atol=1e-5, rtol=1e-5)
    return wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rows"),
    [(case, rows) for case in CASES for rows in (None, 520) if (case, rows) not in ONCE],
)
def test_a_tied_model(case: str, rows: int | None, arts: dict[bool, Path], tmp_path: Path) -> None:
    settings, tied = CASES[case]
    wanted = trained(arts[True], settings, tmp_path / "adapter", rows)
    assert_merges(arts[True], tmp_path / "adapter", wanted, rows)
    for name in ("dense", "irq"):
        assert read_json(tmp_path / name / "config.json")["tie_word_embeddings"] is tied
        found = read_tensors(tmp_path / name)
        assert ("lm_head.weight" in found) is not tied
    listed = read_json(tmp_path / "irq" / "config.json")["quantization_config"]
    assert "lm_head" in listed["modules_to_not_convert"]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 520])
@pytest.mark.parametrize("case", CASES)
def test_a_model_with_a_head_of_its_own(
    case: str, rows: int | None, arts: dict[bool, Path], tmp_path: Path
) -> None:
    settings, _ = CASES[case]
    wanted = trained(arts[False], settings, tmp_path / "adapter", rows)
    found = read_tensors(tmp_path / "adapter")
    if rows and not all(any(name in key for key in found) for name in (EMBED, HEAD)):
        with pytest.raises(IrqError) as error:
            irq_convert.merge(arts[False], tmp_path / "adapter", tmp_path / "o", any_base=True)
        assert_one_line(str(error.value), "520 rows", "new rows are lost")
        return
    irq_convert.merge(arts[False], tmp_path / "adapter", tmp_path / "out", any_base=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged, rows or 512), wanted, atol=1e-5, rtol=1e-5)


def test_the_change_is_pefts(arts: dict[bool, Path], tmp_path: Path) -> None:
    """Ranks and alphas by pattern, rsLoRA; the change against PEFT's own `get_delta_weight`."""
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", EMBED],
        rank_pattern={EMBED: 6},
        alpha_pattern={EMBED: 5},
        use_rslora=True,
    )
    model = train(irq_convert.load(arts[False]), config, tmp_path / "adapter")
    layer = model.base_model.model.model.embed_tokens
    assert layer.scaling["default"] == 5 / math.sqrt(6)
    report = irq_convert.merge(
        arts[False], tmp_path / "adapter", tmp_path / "out", any_base=True, to="dense"
    )
    before, after = read_tensors(arts[False]), read_tensors(tmp_path / "out")
    key = "model.embed_tokens.weight"
    torch.testing.assert_close(after[key], before[key] + layer.get_delta_weight("default").detach())
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert key in {layer.tensor for layer in report.layers if layer.check is not None}


def test_rows_alone_are_replaced(arts: dict[bool, Path], tmp_path: Path) -> None:
    tokens = [9, 3, 200]
    trained(arts[True], {"trainable_token_indices": tokens}, tmp_path / "adapter")
    report = irq_convert.merge(arts[True], tmp_path / "adapter", tmp_path / "out", any_base=True)
    assert report.saved == ("model.embed_tokens.weight",)
    before, after = (
        read_tensors(f)["model.embed_tokens.weight"] for f in (arts[True], tmp_path / "out")
    )
    rows = read_tensors(tmp_path / "adapter")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert torch.equal(after[tokens], rows)
    others = [row for row in range(512) if row not in tokens]
    assert torch.equal(after[others], before[others])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "names", "changes"),
    [
        ("gpt2", ["c_attn", "wte"], {"n_embd": 64, "n_head": 4, "n_layer": 2}),
        ("gemma3_text", ["q_proj", EMBED], {"head_dim": 16}),
        ("qwen3", ["q_proj", EMBED], {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_other_families(
    family: str, names: list[str], changes: dict[str, Any], tokens: bool, tmp_path: Path
) -> None:
    """Names without a prefix, and embeddings that are scaled when they are looked up."""
    art = artifact(
        tmp_path / "base", tiny_model(family, tie_word_embeddings=True, **{**SIZES, **changes})
    )
    settings: dict[str, Any] = {"target_modules": names}
    if tokens:
        settings = {"target_modules": names[:1], "trainable_token_indices": {names[1]: [5, 6]}}
    wanted = trained(art, settings, tmp_path / "adapter")
    assert_merges(art, tmp_path / "adapter", wanted, None)
    config = read_json(tmp_path / "dense" / "config.json")
    assert config["tie_word_embeddings"] is tokens


BASE = f"base_model.model.model.{EMBED}.base_layer.weight"
A, B = (f"base_model.model.model.{EMBED}.lora_embedding_{x}" for x in "AB")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[BASE].add_(1), ("embed_tokens.base_layer.weight", "other weights")),
        (lambda t: t.pop(B), (B, "missing")),
        (lambda t: t.update({A: torch.ones(4, 511)}), ("[4, 511]", "[512, 64]")),
        (lambda t: [t.pop(A), t.pop(B), t.pop(BASE)], ("target_modules names", EMBED)),
        (lambda t: t[A][0].fill_(float("nan")), (A, "NaN")),
    ],
)
def test_files_that_cannot_be_right(
    tied: bool, change: Any, words: tuple[str, ...], arts: dict[bool, Path],
    embedding_lora: dict[bool, Path], tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(embedding_lora[tied], tmp_path / "adapter")
    change_tensors(tmp_path / "adapter", change, WEIGHTS)
    with pytest.raises(IrqError) as error:
        irq_convert.merge(arts[tied], tmp_path / "adapter", tmp_path / "out", any_base=True)
    assert_one_line(str(error.value), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("indices", "words"),
    [([3], ("1 tokens",)), ([3, 512], ("token 512", "[512, 64]")), ([3, -1], ("list of tokens",))],
)
def test_tokens_that_cannot_be_right(
    indices: list[int], words: tuple[str, ...], arts: dict[bool, Path], tmp_path: Path
) -> None:
    trained(arts[True], {"trainable_token_indices": [3, 5]}, tmp_path / "adapter")
    change_settings(tmp_path / "adapter", trainable_token_indices=indices)
    with pytest.raises(IrqError) as error:
        irq_convert.merge(arts[True], tmp_path / "adapter", tmp_path / "out", any_base=True)
    assert_one_line(str(error.value), *words)


def test_a_model_that_cannot_be_untied(
    arts: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that ties whatever config.json says: there is no dense model, but an adapter."""
    trained(arts[True], {"modules_to_save": [EMBED]}, tmp_path / "adapter")
    always = staticmethod(lambda config: frozenset({"lm_head.weight"}))
    monkeypatch.setattr("irq_convert.jobs.merge.ties.tied_without_flag", always)
    with pytest.raises(IrqError) as error:
        irq_convert.merge(arts[True], tmp_path / "adapter", tmp_path / "out", any_base=True)
    assert_one_line(str(error.value), "lm_head.weight", "ties", "--to adapter")
    irq_convert.merge(
        arts[True], tmp_path / "adapter", tmp_path / "out", to="adapter", any_base=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 520])
@pytest.mark.parametrize("saved", [[EMBED], [HEAD]])
def test_trained_embeddings_beside_iec(
    saved: list[str], rows: int | None, arts: dict[bool, Path], tmp_path: Path
) -> None:
    config = irq_convert.IecLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = train(resized(irq_convert.load(arts[True]), rows), config, tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        resized(irq_convert.load(arts[True]), rows), tmp_path / "adapter"
    )
    wanted = outputs(model, rows or 512)
    assert torch.equal(outputs(again, rows or 512), wanted)
    assert_merges(arts[True], tmp_path / "adapter", wanted, rows)


def test_tokens_beside_iec(arts: dict[bool, Path], tmp_path: Path) -> None:
    config = irq_convert.IecLoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]
    )
    model = train(irq_convert.load(arts[True]), config, tmp_path / "adapter")
    irq_convert.merge(arts[True], tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 520])
@pytest.mark.parametrize("case", ["lora of both", "trained embedding", "tokens"])
def test_such_an_adapter_can_be_evaluated(
    case: str, rows: int | None, arts: dict[bool, Path], tmp_path: Path
) -> None:
    """`eval --adapter` puts on what PEFT saves beside A and B, and gives the model its rows."""
    wanted = trained(arts[True], CASES[case][0], tmp_path / "adapter", rows)
    found = put_on(
        irq_convert.load(arts[True]), check_adapter(tmp_path / "adapter", arts[True], any_base=True)
    )
    torch.testing.assert_close(outputs(found, rows or 512), wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_with_half_of_the_new_rows_is_not_evaluated(
    arts: dict[bool, Path], tmp_path: Path
) -> None:
    trained(arts[False], {"target_modules": ["q_proj", HEAD]}, tmp_path / "adapter", 520)
    with pytest.raises(IrqError) as error:
        put_on(
            irq_convert.load(arts[False]),
            check_adapter(tmp_path / "adapter", arts[False], any_base=True),
        )
    assert_one_line(str(error.value), "520 rows of lm_head.weight", "model.embed_tokens", "lost")
