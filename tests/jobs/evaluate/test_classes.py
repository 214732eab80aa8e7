"""Classes that predict no next token are refused; those that see pictures are measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import irq_convert
from irq_convert.errors import UsageError
from irq_convert.hf.causal_lm import load_causal_lm, load_config, require_causal_lm
from irq_convert.jobs.evaluate.evaluate import evaluate
from irq_convert.jobs.export.export import export
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import assert_one_line, change_json
from tests.tiny import SMALL, VISION, tiny_config

from .conftest import make_tokenizer

POSITIONS = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}}
HEADS: dict[str, dict[str, Any]] = {
    "LlamaModel": {},
    "LlamaForSequenceClassification": LABELS,
    "LlamaForTokenClassification": LABELS,
    "LlamaForQuestionAnswering": {},
    "BertForMaskedLM": {},
    "T5ForConditionalGeneration": {},
}


def save(folder: Path, name: str, **changes: Any) -> Path:
    """A random model of a class, with a tokenizer of 300 tokens."""
    cls = getattr(transformers, name)
    values = {**SMALL, **POSITIONS, "num_hidden_layers": 2, **changes}
    if name.startswith("T5"):
        values = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1}
    torch.manual_seed(3)
    cls(cls.config_class(**values)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """A random model that sees pictures and speaks."""
    text = tiny_config("llama", **{**SMALL, **POSITIONS, "initializer_range": 0.3})
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=299, vision_feature_layer=-1
    )
    torch.manual_seed(4)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_an_artifact_that_predicts_nothing_is_one_line(
    tmp_path: Path, text_file: Path, name: str
) -> None:
    source = save(tmp_path / "source", name, **HEADS[name])
    quantize(source, tmp_path / "out", bits=4, threads=1)
    for against in (None, source):
        with pytest.raises(UsageError) as caught:
            evaluate(tmp_path / "out", text_file, against=against)
        assert_one_line(str(caught.value), str(tmp_path / "out"), name, "ForCausalLM")


def test_the_reference_is_asked_too(tmp_path: Path, text_file: Path, model_folder: Path) -> None:
    source = save(tmp_path / "source", "BertForMaskedLM")
    change_json(source / "config.json", lambda raw: raw.update(architectures=["BertModel"]))
    with pytest.raises(UsageError) as caught:
        evaluate(
            model_folder, text_file, against=save(tmp_path / "t5", "T5ForConditionalGeneration")
        )
    assert_one_line(str(caught.value), "T5ForConditionalGeneration", str(tmp_path / "t5"))


def test_the_helper_refuses_before_any_weight_is_read(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "LlamaForSequenceClassification", **LABELS)
    quantize(source, tmp_path / "out", bits=4, threads=1)
    (tmp_path / "out" / "model.safetensors").unlink()
    config = load_config(tmp_path / "out")
    with pytest.raises(UsageError, match="LlamaForSequenceClassification"):
        require_causal_lm(tmp_path / "out", config)
    with pytest.raises(UsageError, match="LlamaForSequenceClassification"):
        load_causal_lm(tmp_path / "out")


def test_a_dense_base_model_with_a_tied_head_is_still_measured(
    tmp_path: Path, text_file: Path
) -> None:
    base = save(tmp_path / "base", "LlamaModel", tie_word_embeddings=True)
    whole = save(tmp_path / "whole", "LlamaForCausalLM", tie_word_embeddings=True)
    found, wanted = evaluate(base, text_file), evaluate(whole, text_file)
    assert found.tokens == wanted.tokens


def test_a_model_that_sees_pictures_is_measured_on_text(tmp_path: Path, text_file: Path) -> None:
    source = llava(tmp_path / "source")
    quantize(source, tmp_path / "out", bits=3, threads=1)
    twin = tmp_path / "twin"
    export(tmp_path / "out", twin, to="dense", dtype="float32")
    report = evaluate(tmp_path / "out", text_file, against=source, max_tokens=200)
    assert report.kl is not None
    assert report.kl > 1e-4
    same = evaluate(tmp_path / "out", text_file, against=twin, max_tokens=200)
    assert same.kl is not None
    assert abs(same.kl) < 1e-9
    assert same.top1 == 1.0
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(twin, dtype=torch.float32)
    loaded = load_causal_lm(twin)
    assert type(loaded) is type(stock)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = stock.eval()(input_ids=ids).logits[0, :-1].double()
        assert torch.equal(loaded(input_ids=ids).logits, stock(input_ids=ids).logits)
        packed = irq_convert.load(tmp_path / "out", dtype=torch.float32).eval()
        assert torch.allclose(packed(input_ids=ids).logits[0, :-1].double(), logits, atol=1e-4)
    assert math.isfinite(report.perplexity)
