"""Tiny random models of the architectures that the Hub holds, as checkpoints.

Every model is made from its configuration class, seeded, and saved with `save_pretrained`, which
writes the names and the layout of the Hub. Experts can also be written fused, as transformers
holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

SEED = 0
HIDDEN, WIDE, VOCABULARY, LAYERS = 32, 56, 96, 2
"""Small; 56 and, per expert, 24 are no multiples of a block."""
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
SHARED = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
}


@dataclass(frozen=True)
class Kind:
    """One architecture: its class, its configuration, and what is in it.

    `experts`: how the checkpoint holds them: "", "each" (a tensor an expert), "stacked" or
    "stacked, transposed". `fused`: they are written as transformers holds them, `flipped`: the
    other way round than it saves them. `turned`: 2-D weights are stored transposed. `vision`: it
    has a tower, `image`: and is given pictures, `towers`: which are quantized, too.
    """

    name: str
    model: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    experts: str = ""
    fused: bool = False
    flipped: bool = False
    turned: bool = False
    image: bool = False
    vision: bool = False
    towers: bool = False
    common: bool = True


def _moe(name: str, model: str, config: str, values: Mapping[str, Any]) -> tuple[Kind, Kind]:
    """A mixture as the Hub has it, and with the experts fused as transformers has them."""
    return (
        Kind(name, model, config, values, experts="each"),
        Kind(f"{name}, fused", model, config, values, experts="stacked", fused=True),
    )


GPT2 = {
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA4 = {
    "intermediate_size": 24,
    "intermediate_size_mlp": WIDE,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "head_dim": 8,
    "attention_chunk_size": 64,
}
LLAVA = {
    "text_config": {**COMMON, "model_type": "llama", "num_key_value_heads": 4},
    "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": HIDDEN},
    "image_token_index": 95,
    "vision_feature_layer": -1,
}

QWEN3_VL = {
    "text_config": {
        **COMMON,
        **EXPERTS,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 10000.0,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "patch_size": 8,
    },
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "tie_word_embeddings": False,
}

KINDS: tuple[Kind, ...] = (
    Kind("Llama 2", "LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 4}),
    Kind("Llama 3", "LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    Kind("Llama 4", "Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, experts="stacked, transposed"),
    Kind("Mistral", "MistralForCausalLM", "MistralConfig", {"sliding_window": 16}),
    *_moe("Mixtral", "MixtralForCausalLM", "MixtralConfig", LOCAL),
    Kind("Qwen 2", "Qwen2ForCausalLM", "Qwen2Config"),
    *_moe(
        "Qwen 2 MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    Kind("Qwen 3", "Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    *_moe("Qwen 3 MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    Kind(
        "Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "tie_word_embeddings": True}
    ),
    Kind(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"head_dim": 8, "tie_word_embeddings": True},
    ),
    Kind("Phi-3", "Phi3ForCausalLM", "Phi3Config"),
    Kind("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT2, turned=True, common=False),
    Kind("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    Kind("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config"),
    *_moe("OLMoE", "OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    *_moe(
        "DeepSeek V2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**EXPERTS, **MLA, **SHARED, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    ),
    *_moe(
        "DeepSeek V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**EXPERTS, **MLA, **SHARED, "n_group": 2, "topk_group": 1},
    ),
    Kind(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**LOCAL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        experts="stacked, transposed",
    ),
    Kind("Granite MoE", "GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL, experts="stacked"),
    Kind(
        "Qwen 3 VL MoE",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        QWEN3_VL,
        experts="stacked, transposed",
        flipped=True,
        vision=True,
        common=False,
    ),
    Kind(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        LLAVA,
        image=True,
        vision=True,
        common=False,
    ),
    Kind(
        "LLaVA, towers",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        LLAVA,
        image=True,
        vision=True,
        towers=True,
        common=False,
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def make_model(kind: Kind) -> PreTrainedModel:
    """The model in float32 with every parameter random, biases and routers too."""
    config_class = getattr(transformers, kind.config)
    values = {**COMMON, **kind.values} if kind.common else dict(kind.values)
    config = config_class(**values)
    torch.manual_seed(SEED)
    model: PreTrainedModel = getattr(transformers, kind.model)(config).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return model


def write_checkpoint(kind: Kind, folder: Path) -> Path:
    """Save the model of `kind` to `folder` as the Hub would have it."""
    model = make_model(kind)
    if not kind.fused:
        model.save_pretrained(folder)
        if kind.flipped:
            _flip_experts(folder / "model.safetensors")
        return folder
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": [kind.model]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tied = model.all_tied_weights_keys
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _flip_experts(file: Path) -> None:
    """Exchange inputs and outputs of stacked experts, as some files of the Hub have them."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 3 and "experts" in name:
            tensors[name] = tensor.mT.contiguous()
    save_file(tensors, file, {"format": "pt"})


def inputs(kind: Kind) -> dict[str, torch.Tensor]:
    """Two rows of tokens, with pictures where the model takes them."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, VOCABULARY - 2, (2, 12), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind.image:
        ids[:, 1:5] = 95
        found["pixel_values"] = torch.randn((2, 3, 16, 16), generator=generator)
    return found


def logits(model: Any, kind: Kind) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs(kind)).logits
    return out


Make = Callable[[Kind], Path]
