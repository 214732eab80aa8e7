"""What is a linear layer: by class against real transformers models, by name where none is known.

The models are built and saved by transformers itself, so the names in the files are those that
`save_pretrained` writes, renamings included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from irq_convert.artifact.config import module_name
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.hf.linears import Linears, find_linears
from tests.tiny import (
    LINEARS,
    LLAMA,
    SMALL,
    UNKNOWN,
    VISION,
    llama_tensors,
    tiny_config,
    write_source,
)

from .models import open_meta

ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def linears_of(checkpoint: Checkpoint) -> Linears:
    return find_linears(checkpoint.config, checkpoint.tensors)


def save(model: Any, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def layers(prefix: str, names: list[str], count: int = 2) -> set[str]:
    return {f"{prefix}layers.{n}.{name}.weight" for n in range(count) for name in names}


def check_whole(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Each linear module is either quantized or named as kept, in the files' terms."""
    found = linears_of(checkpoint)
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    quantized = {module_name(name) for name in found.tensors}
    assert not quantized & set(found.modules_kept)
    assert len(quantized) + len(found.modules_kept) == len(linears)
    assert found.tensors <= checkpoint.tensors.keys()
    assert list(found.modules_kept) == sorted(found.modules_kept)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_dense_causal_models(tmp_path: Path, kind: str, tied: bool) -> None:
    config = tiny_config(kind.lower(), **SMALL, tie_word_embeddings=tied)
    model = getattr(tf, f"{kind}ForCausalLM")(config)
    checkpoint = save(model, tmp_path)
    found = linears_of(checkpoint)
    assert found.decided_by == f"the class {kind}ForCausalLM"
    assert found.tensors == layers("model.", ATTENTION + MLP)
    assert found.modules_kept == ("lm_head",)  # tied or not: the module is there
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    check_whole(checkpoint, model)


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    found = linears_of(save(tf.LlamaModel(tiny_config(**SMALL)), tmp_path))
    assert found.tensors == layers("", ATTENTION + MLP)
    assert found.modules_kept == ()


def test_files_of_a_base_model_under_the_config_of_the_whole(tmp_path: Path) -> None:
    tensors = {n.removeprefix("model."): t for n, t in llama_tensors().items() if "head" not in n}
    checkpoint = open_checkpoint(write_source(tmp_path / "m", tensors))
    found = linears_of(checkpoint)
    assert found.decided_by == "the class LlamaForCausalLM"
    assert found.tensors == layers("", list(LINEARS))
    assert found.modules_kept == ("lm_head",)


def test_mixture_of_experts_keeps_routers(tmp_path: Path) -> None:
    config = tiny_config(
        "qwen2_moe",
        **SMALL,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    )
    model = tf.Qwen2MoeForCausalLM(config)
    checkpoint = save(model, tmp_path)
    found = linears_of(checkpoint)
    shared = [f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
    own = [f"mlp.experts.{n}.{x}_proj" for n in range(4) for x in ("gate", "up", "down")]
    assert found.tensors == layers("model.", ATTENTION + shared + own)
    assert not found.transposed
    gates = [f"model.layers.{n}.mlp.shared_expert_gate" for n in range(2)]
    assert found.modules_kept == ("lm_head", *gates)
    assert found.tensors <= checkpoint.tensors.keys()


def test_convolutions_in_disguise_are_linears_the_other_way_round(tmp_path: Path) -> None:
    config = tf.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    found = linears_of(save(tf.GPT2LMHeadModel(config), tmp_path))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found.tensors == {f"transformer.h.{n}.{x}.weight" for n in range(2) for x in names}
    assert found.transposed == found.tensors
    assert found.modules_kept == ("lm_head",)


def test_towers_are_kept_and_renamed_modules_found(tmp_path: Path) -> None:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tiny_config(**SMALL)
    )
    model = tf.LlavaForConditionalGeneration(config)
    checkpoint = save(model, tmp_path)
    found = linears_of(checkpoint)
    # The files say language_model.model, the class model.language_model.
    assert found.tensors == layers("language_model.model.", ATTENTION + MLP)
    kept = set(found.modules_kept)
    assert "language_model.lm_head" in kept
    assert any(name.startswith("vision_tower.") and name.endswith("0.mlp.fc1") for name in kept)
    assert "multi_modal_projector.linear_1" in kept
    assert all(f"{name}.weight" in checkpoint.tensors for name in kept)
    check_whole(checkpoint, model)


def test_encoder_and_decoder(tmp_path: Path) -> None:
    config = tf.T5Config(d_model=64, d_ff=96, num_layers=1, num_heads=4, vocab_size=50, d_kv=16)
    model = tf.T5ForConditionalGeneration(config)
    checkpoint = save(model, tmp_path)
    found = linears_of(checkpoint)
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in found.tensors
    assert "decoder.block.0.layer.1.EncDecAttention.o.weight" in found.tensors
    assert "encoder.block.0.layer.1.DenseReluDense.wi.weight" in found.tensors
    assert not any("relative" in name or "shared" in name for name in found.tensors)
    # The class wants it in float32 and casts its input to whatever its weight is.
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in found.modules_kept
    check_whole(checkpoint, model)


def test_weights_without_elements_are_not_quantized(tmp_path: Path) -> None:
    tensors = llama_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(0, 96)
    found = linears_of(open_checkpoint(write_source(tmp_path / "m", tensors)))
    assert name not in found.tensors
    assert module_name(name) in found.modules_kept


SHAPES = {
    "tok_embeddings.weight": (80, 96),
    "layers.0.attention.wq.weight": (96, 96),
    "layers.0.attention.wq.bias": (96,),
    "layers.0.ffn.gate_proj.weight": (172, 96),
    "layers.0.ffn.gate.weight": (16, 96),
    "layers.0.router.weight": (16, 96),
    "layers.0.block_sparse_moe.experts.3.w1.weight": (64, 96),
    "layers.0.attention_norm.weight": (96,),
    "layers.0.conv.weight": (96, 96, 3),
    "layers.0.narrow.weight": (96, 15),
    "layers.0.narrowest.weight": (96, 16),
    "layers.0.rel_embedding.weight": (96, 96),
    "layers.0.lora_A": (96, 96),
    "visual.blocks.0.qkv.weight": (96, 96),
    "model.vision_tower.layers.0.fc.weight": (96, 96),
    "audio_encoder.layers.1.fc.weight": (96, 96),
    "supervision.0.fc.weight": (96, 96),
    "wpe.weight": (64, 96),
    "projector.weight": (96, 96),
    "output.weight": (80, 96),
    "lm_head.weight": (80, 96),
}
BY_NAME = {
    "layers.0.attention.wq.weight",
    "layers.0.ffn.gate_proj.weight",
    "layers.0.block_sparse_moe.experts.3.w1.weight",
    "layers.0.narrowest.weight",
    "supervision.0.fc.weight",
}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"architectures": [7]}, "names no architecture"),
        ({"architectures": ["MyOwnForCausalLM"]}, "does not know MyOwnForCausalLM"),
        ({"architectures": ["logging"]}, "cannot be built"),
        ({"architectures": ["AutoModel"]}, "cannot be built"),
        ({**LLAMA, "num_hidden_layers": "two"}, "cannot be built"),
        ({**LLAMA, "hidden_size": None}, "cannot be built"),
    ],
)
def test_unknown_classes_by_names_and_shapes(
    tmp_path: Path, config: dict[str, object], why: str
) -> None:
    found = linears_of(open_meta(tmp_path / "m", UNKNOWN | config, SHAPES))
    assert found.decided_by.startswith("names and shapes (")
    assert why in found.decided_by
    assert "\n" not in found.decided_by
    assert found.tensors == BY_NAME
    matrices = {n for n, s in SHAPES.items() if len(s) == 2 and n.endswith(".weight")}
    assert set(found.modules_kept) == {module_name(n) for n in matrices - BY_NAME}


def test_a_head_without_a_tensor_is_named_as_kept(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if "lm_head" not in name}
    assert "lm_head" in linears_of(open_meta(tmp_path / "m", UNKNOWN, shapes)).modules_kept


def test_transformers_is_quiet_and_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tf.utils.logging.get_verbosity()
    odd = LLAMA | {"bos_token_id": 99999, "torch_dtype": "float16", "unheard_of": 1}
    assert linears_of(open_checkpoint(write_source(tmp_path / "m", None, odd))).tensors
    assert capfd.readouterr() == ("", "")
    assert tf.utils.logging.get_verbosity() == before
