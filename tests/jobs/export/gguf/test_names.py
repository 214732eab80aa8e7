"""Names, shapes and the order of rows, against transformers' own way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="the package gguf is not installed")

from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from irq_convert.errors import UsageError
from irq_convert.jobs.export.gguf.family import read_model
from irq_convert.jobs.export.gguf.metadata import rope_divisors
from irq_convert.jobs.export.gguf.names import find_places, interleave

from .make import FAMILIES, readable_model


def raw_config(family: str = "llama", **changes: object) -> dict[str, object]:
    raw = readable_model(family).config.to_dict()
    return raw | {"architectures": [type(readable_model(family)).__name__]} | changes


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_interleaved_rows_find_back(heads: int, pairs: int, cols: int) -> None:
    rows = np.arange(heads * 2 * pairs * cols).reshape(-1, cols)
    there = interleave(rows, heads)
    assert (LlamaTensorProcessor()._reverse_permute_weights(there, heads) == rows).all()
    assert (interleave(torch.from_numpy(rows), heads).numpy() == there).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_its_place(family: str, tied: bool) -> None:
    model = readable_model(family, tied)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = find_places(read_model(raw_config(family, tie_word_embeddings=tied)), shapes)
    assert set(found) == set(shapes)
    names = {place.name for place in found.values()}
    assert len(names) == len(found)
    assert ("output.weight" in names) is not tied
    assert {"token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"} <= names
    turned = {name for name, place in found.items() if place.heads}
    if family in ("llama", "mistral"):
        assert {name.split(".")[-2] for name in turned} == {"q_proj", "k_proj"}
        assert found["model.layers.0.self_attn.k_proj.weight"].heads == 2
    else:
        assert not turned
    assert ("blk.0.attn_q.bias" in names) is (family == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in names) is (family == "qwen3")


def test_tensors_that_do_not_belong() -> None:
    model = read_model(raw_config())
    shapes = {name: tuple(p.shape) for name, p in readable_model("llama").named_parameters()}
    for extra, words in (
        ("model.layers.0.mlp.experts.0.up_proj.weight", "no mixtures of experts"),
        ("score.weight", "llama.cpp has no such tensor in llama"),
        ("model.layers.2.mlp.up_proj.weight", "llama.cpp has no such tensor"),
    ):
        with pytest.raises(UsageError, match=words):
            find_places(model, shapes | {extra: (1, 1)})
    with pytest.raises(UsageError, match="shape"):
        find_places(model, shapes | {"model.norm.weight": (95,)})
    with pytest.raises(UsageError, match=r"lm_head\.weight missing"):
        find_places(model, {k: v for k, v in shapes.items() if k != "lm_head.weight"})
    ignored = shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    assert set(find_places(model, ignored)) == set(shapes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, "llama, mistral, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "language models only"),
        ({"hidden_act": "gelu"}, "silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5 of a head"),
    ],
)
def test_configurations_without_a_place(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_model(raw_config(**changes))


def test_a_sliding_window_is_told() -> None:
    assert not read_model(raw_config("mistral", sliding_window=None)).notes
    (note,) = read_model(raw_config("mistral", sliding_window=64)).notes
    assert "-c 64" in note


def test_divisors_of_llama3_frequencies() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    raw = raw_config(rope_parameters=rope, head_dim=128, max_position_embeddings=131072)
    found = rope_divisors(read_model(raw))
    assert found is not None
    # Wave lengths under 2048 tokens are kept, over 8192 stretched by the factor.
    lengths = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(found.numpy()[lengths < 2048], 1, rtol=1e-5)
    np.testing.assert_allclose(found.numpy()[lengths > 8192], 8, rtol=1e-5)
    assert (found.diff() > -1e-5).all()
    assert rope_divisors(read_model(raw_config())) is None
