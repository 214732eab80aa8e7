"""The model families that llama.cpp computes as transformers does, and the numbers it needs.

A model is taken only when every number and switch of its configuration has a place in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH
from transformers import CONFIG_MAPPING, PreTrainedConfig

from irq_convert.errors import UsageError
from irq_convert.jobs.export.biases import ATTENTION, MLP, QUERY_KEY_VALUE


@dataclass(frozen=True)
class ModelFamily:
    """One `model_type` of transformers.

    `arch` is llama.cpp's name for it. `interleaved`: rotary pairs are neighbours there, not halves
    of a head, so rows of q_proj and k_proj change places. `biases` are the linear modules that may
    have one; `head_norms`: q_norm and k_norm are there. `square`: q_proj must be square.
    """

    model_type: str
    classes: tuple[str, ...]
    arch: MODEL_ARCH
    interleaved: bool = False
    biases: frozenset[str] = QUERY_KEY_VALUE
    head_norms: bool = False
    square: bool = False


_LLAMA_BIASES = ATTENTION | MLP
FAMILIES = {
    family.model_type: family
    for family in (
        ModelFamily("llama", ("LlamaForCausalLM",), MODEL_ARCH.LLAMA, True, _LLAMA_BIASES),
        ModelFamily("mistral", ("MistralForCausalLM",), MODEL_ARCH.LLAMA, True, _LLAMA_BIASES),
        ModelFamily("qwen2", ("Qwen2ForCausalLM",), MODEL_ARCH.QWEN2, square=True),
        ModelFamily("qwen3", ("Qwen3ForCausalLM",), MODEL_ARCH.QWEN3, head_norms=True),
    )
}


@dataclass(frozen=True)
class Model:
    """A checked configuration. Lengths in numbers, `context` in tokens; `rope` as transformers
    spells it, with `rope_type` and `rope_theta`; `notes` for a person."""

    family: ModelFamily
    config: PreTrainedConfig
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    tied: bool
    rope: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_model(raw: Mapping[str, Any] | None) -> Model:
    """Check `config.json`; `UsageError` names what the four families in GGUF do not have."""
    family = _family(raw or {})
    assert raw is not None
    known = {key: value for key, value in raw.items() if key != "quantization_config"}
    try:
        config = CONFIG_MAPPING[family.model_type].from_dict(known)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"config.json: transformers cannot read it: {detail}") from error
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    model = Model(
        family=family,
        config=config,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        ffn=int(config.intermediate_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        eps=float(config.rms_norm_eps),
        tied=bool(config.tie_word_embeddings),
        rope=_rope(config),
        notes=_window(config),
    )
    _check(model)
    return model


def _family(raw: Mapping[str, Any]) -> ModelFamily:
    model_type, classes = raw.get("model_type"), raw.get("architectures") or [None]
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UsageError(
            f"config.json says model_type {model_type!r}: --to gguf knows {', '.join(FAMILIES)}; "
            "use --to dense for other models"
        )
    if classes[0] is not None and classes[0] not in family.classes:
        raise UsageError(
            f"config.json says architecture {classes[0]!r}: --to gguf writes language models only, "
            f"{', '.join(name for f in FAMILIES.values() for name in f.classes)}; use --to dense"
        )
    return family


_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": frozenset(("factor", "beta_fast", "beta_slow")),
}
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters; `UsageError` for a kind that has no place in the file."""
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    share = rope.pop("partial_rotary_factor", None) or 1
    if kind not in _ROPE_KEYS or share != 1:
        what = f"rope type {kind!r}" if kind not in _ROPE_KEYS else f"rope on {share:g} of a head"
        raise UsageError(
            f"config.json asks for {what}: --to gguf can say {', '.join(_ROPE_KEYS)}, on whole "
            "heads; use --to dense"
        )
    for key, value in rope.items():
        if key not in _ROPE_KEYS[kind] | _ROPE_COMMON and value is not None:
            raise UsageError(
                f"config.json: rope parameter {key!r} of type {kind!r} has no place in a GGUF "
                "file: use --to dense"
            )
    return rope


def _window(config: PreTrainedConfig) -> tuple[str, ...]:
    """llama.cpp gives these families full attention."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return ()
    if window >= config.max_position_embeddings:
        return ()
    return (
        f"the model attends to the last {window} tokens only, llama.cpp to all of them: "
        f"results are the same in contexts of up to {window} tokens (-c {window})",
    )


def _check(model: Model) -> None:
    config, family = model.config, model.family
    if config.hidden_act != "silu":
        raise UsageError(
            f"config.json says hidden_act {config.hidden_act!r}: llama.cpp computes "
            f"{family.model_type} with silu; use --to dense"
        )
    if family.square and model.heads * model.head_dim != model.hidden:
        raise UsageError(
            f"config.json: {model.heads} heads of {model.head_dim} are not hidden_size "
            f"{model.hidden}, which llama.cpp takes for granted in {family.model_type}: use "
            "--to dense"
        )
    if model.head_dim % 2:
        raise UsageError(f"config.json: heads of {model.head_dim} have no rotary pairs")
