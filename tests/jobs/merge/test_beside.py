"""What PEFT saves beside A and B, merged: embeddings, larger vocabularies, heads of a task.

Every result is compared with base plus adapter through PEFT, on the artifact and on its dense twin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import irq_convert
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import assert_one_line, change_tensors, read_json, read_tensors
from tests.tiny import tiny_config, tiny_model

WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, Callable[..., LoraConfig]] = {
    "plain": LoraConfig,
    "iec": irq_convert.IecLoraConfig,
}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def artifact(folder: Path, model: Any) -> Path:
    """`model` quantized, and its dense twin beside it."""
    model.save_pretrained(folder / "source")
    quantize(
        str(folder / "source"), folder / "art", QuantizeOptions(QuantSpec("nf4", 32), threads=1)
    )
    irq_convert.export(folder / "art", folder / "twin", to="dense", dtype="float32")
    return folder / "art"


@pytest.fixture(scope="module", params=["own head", "tied"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    return artifact(folder, tiny_model(tie_word_embeddings=request.param == "tied", **SIZES))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("untied"), tiny_model(**SIZES))


def resized(model: Any, rows: int | None) -> Any:
    if rows is not None:
        torch.manual_seed(1)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train(model: Any, config: LoraConfig, folder: Path, **saving: Any) -> Any:
    """`model` with every trained number moved, its adapter saved in `folder`."""
    found = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    found.eval().save_pretrained(folder, **saving)
    return found


def outputs(model: nn.Module, rows: int = 512) -> torch.Tensor:
    ids = torch.randint(1, rows, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids)[0]
    return found


def assert_merges(art: Path, adapter: Path, wanted: torch.Tensor, rows: int | None) -> None:
    """Merged all three ways it computes `wanted`; `irq` up to quantizing again.

    The program's own look at logits is left to one of the two others, with new rows or without.
    """
    out, size = adapter.parent, rows or 512
    folded, again = ("layers", "auto") if rows is None else ("auto", "layers")
    config = read_json(art / "config.json")
    cls = getattr(transformers, config["architectures"][0])
    irq_convert.merge(art, adapter, out / "dense", to="dense", any_base=True)
    merged = cls.from_pretrained(out / "dense")
    torch.testing.assert_close(outputs(merged, size), wanted, atol=1e-5, rtol=1e-5)
    assert merged.config.vocab_size == size
    assert merged.get_input_embeddings().weight.shape[0] == size
    irq_convert.merge(art, adapter, out / "folded", to="adapter", any_base=True, check=folded)
    for base in (irq_convert.load(art), cls.from_pretrained(art.with_name("twin"))):
        plain = PeftModel.from_pretrained(resized(base, rows), out / "folded")
        torch.testing.assert_close(outputs(plain, size), wanted, atol=1e-5, rtol=1e-5)
    low = {"check": again, "min_survival": -1e9}
    irq_convert.merge(art, adapter, out / "irq", to="irq", any_base=True, **low)
    packed = irq_convert.load(out / "irq")
    assert packed.config.vocab_size == size
    assert float((outputs(packed, size) - wanted).abs().max()) < 0.2 * float(wanted.abs().max())
    assert irq_convert.verify(out / "irq").ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_vocabulary_beside_an_adapter(kind: str, causal: Path, tmp_path: Path) -> None:
    config = KINDS[kind](r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = train(resized(irq_convert.load(causal), 520), config, tmp_path / "adapter")
    assert_merges(causal, tmp_path / "adapter", outputs(model, 520), 520)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows", "saved"),
    [
        ("plain", None, ["embed_tokens"]),
        ("iec", 520, ["embed_tokens"]),
        ("plain", 520, ["lm_head"]),
        ("iec", None, ["lm_head"]),
        ("plain", None, ["embed_tokens", "lm_head"]),
        ("iec", 520, ["embed_tokens", "lm_head"]),
    ],
)
def test_trained_embeddings_and_heads(
    kind: str, rows: int | None, saved: list[str], untied: Path, tmp_path: Path
) -> None:
    """Every two of the three."""
    config = KINDS[kind](r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = train(resized(irq_convert.load(untied), rows), config, tmp_path / "adapter")
    assert_merges(untied, tmp_path / "adapter", outputs(model, rows or 512), rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_the_head_with_a_copy_of_its_base(kind: str, untied: Path, tmp_path: Path) -> None:
    config = KINDS[kind](r=4, target_modules=["q_proj", "lm_head"])
    model = train(irq_convert.load(untied), config, tmp_path / "adapter")
    assert "base_model.model.lm_head.base_layer.weight" in read_tensors(tmp_path / "adapter")
    assert_merges(untied, tmp_path / "adapter", outputs(model), None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_a_head_that_grew(kind: str, untied: Path, tmp_path: Path) -> None:
    config = KINDS[kind](r=4, target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    model = train(resized(irq_convert.load(untied), 520), config, tmp_path / "adapter")
    assert_merges(untied, tmp_path / "adapter", outputs(model, 520), 520)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_saved_unchanged(kind: str, causal: Path, tmp_path: Path) -> None:
    config = KINDS[kind](r=4, target_modules=["q_proj"])
    adapter = tmp_path / "adapter"
    model = train(irq_convert.load(causal), config, adapter, save_embedding_layers=True)
    assert_merges(causal, adapter, outputs(model), None)


def test_a_half_grown_vocabulary_is_refused(untied: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    train(resized(irq_convert.load(untied), 520), config, tmp_path / "adapter")
    with pytest.raises(IrqError) as error:
        irq_convert.merge(untied, tmp_path / "adapter", tmp_path / "out", any_base=True, to="dense")
    assert_one_line(
        str(error.value), "520 rows of lm_head.weight", "512", "embed_tokens.weight", "lost"
    )


def spoil(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    return lambda adapter: change_tensors(adapter, lambda t: change(t[key]), WEIGHTS)


HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (spoil(f"{HEAD}.modules_to_save.weight", lambda t: t.add_(1)), "differ"),
        (
            lambda adapter: change_tensors(adapter, lambda t: t.pop(f"{HEAD}.weight"), WEIGHTS),
            "stands beside nothing",
        ),
        (
            lambda adapter: change_tensors(
                adapter,
                lambda t: t.update({f"{HEAD}.original_module.weight": torch.ones(3, 64)}),
                WEIGHTS,
            ),
            "stands beside [520, 64]",
        ),
        (
            lambda adapter: change_tensors(
                adapter, lambda t: t.update({f"{EMBED}.weight": torch.ones(516, 64)}), WEIGHTS
            ),
            "516",
        ),
    ],
)
def test_files_that_contradict_themselves(
    damage: Callable[[Path], None], words: str, untied: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    train(resized(irq_convert.load(untied), 520), config, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(IrqError) as error:
        irq_convert.merge(untied, tmp_path / "adapter", tmp_path / "out", any_base=True, to="dense")
    assert_one_line(str(error.value), words)


def test_a_base_that_is_not_the_artifacts_is_refused(untied: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"])
    train(irq_convert.load(untied), config, tmp_path / "adapter")
    spoil(f"{HEAD}.base_layer.weight", lambda t: t.add_(1))(tmp_path / "adapter")
    with pytest.raises(IrqError) as error:
        irq_convert.merge(untied, tmp_path / "adapter", tmp_path / "out", any_base=True, to="dense")
    assert_one_line(str(error.value), "lm_head.base_layer.weight", "[512, 64]", "other weights")


TASKS = {
    "SEQ_CLS": "LlamaForSequenceClassification",
    "TOKEN_CLS": "LlamaForTokenClassification",
    "QUESTION_ANS": "LlamaForQuestionAnswering",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_heads_of_a_task(task: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = getattr(transformers, TASKS[task])
    art = artifact(tmp_path / "base", cls(tiny_config(**SIZES, num_labels=3)))
    config = KINDS[kind](r=4, target_modules=["q_proj"], task_type=task)
    model = train(irq_convert.load(art), config, tmp_path / "adapter")
    assert_merges(art, tmp_path / "adapter", outputs(model), None)
    names = [n for n in read_tensors(tmp_path / "adapter") if "lora" not in n]
    change_tensors(tmp_path / "adapter", lambda t: [t.pop(name) for name in names], WEIGHTS)
    with pytest.raises(IrqError, match=r"its file holds nothing for it|no tensor of it"):
        irq_convert.merge(art, tmp_path / "adapter", tmp_path / "no", to="dense", any_base=True)


def test_a_head_that_the_artifact_does_not_have(untied: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(untied)
    train(model, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"), tmp_path / "adapter")
    with pytest.raises(IrqError) as error:
        irq_convert.merge(untied, tmp_path / "adapter", tmp_path / "out", any_base=True, to="dense")
    assert_one_line(str(error.value), "score.weight", "[2, 64]", "new head")
