"""What llama.cpp calls the linear weights of a checkpoint: the names in its GGUF files.

Its converter stacks the experts of a layer, splits some fused weights and fuses others. What is
given the same inputs may stand for each other here: only columns are asked for, not rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from irq_convert.errors import UsageError

_ARCHITECTURES = {
    "cohere": "command-r",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "ernie45moe": "ernie4_5-moe",
    "glm": "chatglm",
    "gptbigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuanv1dense": "hunyuan-dense",
    "hunyuanv1moe": "hunyuan-moe",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen25vl": "qwen2vl",
}
"""By `model_type` without marks, where llama.cpp has another name."""
_COLUMNS_MOVE = ("plamo",)
"""Architectures whose converter moves columns of attention, too."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_FUSED = {
    ".gate_up_proj": (".gate_proj", ".up_proj"),
    ".input_linear": (".gate_proj", ".up_proj"),
}
"""Stacked weights of both gates, and what the maps of llama.cpp call each."""
_SAME_INPUTS = (
    ("attn_qkv", "attn_q", "attn_k", "attn_v"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)


_COLUMNS_STAY = ("attn_", "ffn_")
"""Of other weights, as those of linear attention, the converter of some models moves columns."""


@dataclass(frozen=True)
class LlamaCppName:
    """`names` that a weight may go by, the best first; `expert`: it is this one of a stack."""

    names: tuple[str, ...]
    expert: int | None = None


class LlamaCppNames:
    """The names of one architecture.

    `config` is config.json, `tensors` are all names of the checkpoint. Raises `UsageError` for an
    architecture that the package gguf does not know, and where that is missing.
    """

    def __init__(self, config: Mapping[str, Any] | None, tensors: Iterable[str]) -> None:
        try:
            import gguf
        except ImportError:
            raise UsageError(
                "an imatrix of llama.cpp needs the package gguf: pip install 'irq-convert[gguf]'"
            ) from None
        layers = [int(found[1]) for name in tensors if (found := _LAYER.search(name))]
        known = {_plain(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        kind = _model_type(config)
        plain = _plain(kind).removesuffix("text")
        arch = known.get(_plain(_ARCHITECTURES.get(plain, plain)))
        if arch is None or plain.startswith(_COLUMNS_MOVE):
            raise UsageError(
                f"llama.cpp's names for a model of type {kind!r} are not known: use "
                "`irq-convert measure`, which reads the model itself"
            )
        self._map = gguf.get_tensor_name_map(arch, max(layers, default=0) + 1)

    def find(self, tensor: str) -> LlamaCppName | None:
        """What `tensor` of the files may be called; None for what llama.cpp does not have."""
        expert = _EXPERT.search(tensor)
        name = _EXPERT.sub(".experts.", tensor).replace("language_model.", "")
        first = self._map.get_name(name, try_suffixes=(".weight",))
        if first is None:
            first = self._of_fused(name)
        if first is None:
            return None
        base = first.removesuffix(".weight")
        block, _, last = base.rpartition(".")
        if not last.startswith(_COLUMNS_STAY):
            return None
        alike = next((group for group in _SAME_INPUTS if last in group), (last,))
        names = (last, *(each for each in alike if each != last))
        return LlamaCppName(
            tuple(f"{block}.{each}.weight" for each in names),
            None if expert is None else int(expert[1]),
        )

    def _of_fused(self, name: str) -> str | None:
        plain = name.removesuffix(".weight")
        for ending, parts in _FUSED.items():
            if plain.endswith(ending):
                room = plain.removesuffix(ending)
                for top in (room, f"{room.rpartition('.')[0]}.mlp.experts"):
                    found = self._map.get_name(top + parts[0])
                    if found is not None:
                        return str(found)
        return None


def _model_type(config: Mapping[str, Any] | None) -> str:
    found = config or {}
    text = found.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    return str(inner or found.get("model_type"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
