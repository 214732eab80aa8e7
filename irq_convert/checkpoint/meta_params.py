"""`params.json` of Meta's layout, and the config.json of transformers that says the same.

Some things stand in no file: how long a context LLaMA 1 and 2 were trained for, and by how much
3.1 and 3.2 stretch their rotary frequencies. They follow from the version, which the sizes, the
name of the repository or folder, or the user tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.float_dtypes import WORDS
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.errors import IrqError

VERSIONS = ("1", "2", "3", "3.1", "3.2", "code")
"""Of --llama-version; 3.3 has the settings of 3.1."""
CONTEXT = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072, "code": 16384}
_FACTOR = {"3.1": 8.0, "3.2": 32.0}
_STRETCHED = {
    (4096, 32): "3.1",
    (8192, 80): "3.1",
    (16384, 126): "3.1",
    (2048, 16): "3.2",
    (3072, 28): "3.2",
}
"""(dim, n_layers) of the models with `use_scaled_rope` that Meta has released."""
_TWO = re.compile(r"llama-?2", re.IGNORECASE)
_ONE = re.compile(r"llama-?1(?![\d.])", re.IGNORECASE)


@dataclass(frozen=True)
class MetaParams:
    """What params.json says; `ffn` is that of the tensors, and `vocab` where it does not say it."""

    path: Path
    dim: int
    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float | None
    stretched: bool
    vocab: int = 0
    ffn: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def read_params(folder: Path) -> MetaParams:
    """Read params.json; `IrqError` where it is damaged or lacks a size."""
    path = folder / "params.json"
    raw = read_json_object(path)
    raw = raw["model"] if isinstance(raw.get("model"), dict) else raw
    if "vision_chunk_size" in raw or "moe_args" in raw:
        raise IrqError(
            f"{path}: of a vision model or a mixture, whose layout is another: take the repository "
            "with config.json and safetensors"
        )
    sizes = {key: _size(path, raw, key) for key in ("dim", "n_layers", "n_heads")}
    kv_heads = _size(path, raw, "n_kv_heads") if raw.get("n_kv_heads") else sizes["n_heads"]
    if sizes["dim"] % (2 * sizes["n_heads"]) or sizes["n_heads"] % kv_heads:
        raise IrqError(
            f"{path}: {sizes['n_heads']} heads, {kv_heads} of keys, do not divide dim "
            f"{sizes['dim']}: it is damaged; get it again"
        )
    eps, theta = raw.get("norm_eps"), raw.get("rope_theta")
    if not isinstance(eps, float) or not isinstance(theta, int | float | None):
        raise IrqError(f"{path}: norm_eps or rope_theta is no number: get it again")
    return MetaParams(
        path,
        sizes["dim"],
        sizes["n_layers"],
        sizes["n_heads"],
        kv_heads,
        eps,
        None if theta is None else float(theta),
        bool(raw.get("use_scaled_rope")),
        _size(path, raw, "vocab_size") if raw.get("vocab_size", -1) != -1 else 0,
    )


def _size(path: Path, raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IrqError(f"{path}: {key} is {value!r}, no whole number above 0: get it again")
    return value


def find_version(params: MetaParams, hints: SourceHints) -> str | None:
    """The version by what was said, by the settings, or by the name; None where none tells it."""
    if hints.llama_version is not None:
        return hints.llama_version
    if params.stretched:
        return _STRETCHED.get((params.dim, params.layers))
    if params.theta is not None and params.theta != 10000.0:
        return "3" if params.theta == 500000.0 else "code"
    if _TWO.search(hints.called) or params.kv_heads != params.heads:
        return "2"
    return "1" if _ONE.search(hints.called) else None


def llama_config(
    params: MetaParams, dtype: str, hints: SourceHints
) -> tuple[dict[str, Any], str | None]:
    """config.json as transformers reads it, and what is missing in it, None where it is whole."""
    version = find_version(params, hints)
    third = version is not None and version.startswith("3")
    instruct = "instruct" in hints.called.lower()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 128000 if third else 1,
        "eos_token_id": ([128001, 128008, 128009] if instruct else 128001) if third else 2,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "intermediate_size": params.ffn,
        "mlp_bias": False,
        "num_attention_heads": params.heads,
        "num_hidden_layers": params.layers,
        "num_key_value_heads": params.kv_heads,
        "rms_norm_eps": params.eps,
        "rope_theta": params.theta or 10000.0,
        "tie_word_embeddings": version == "3.2",
        "torch_dtype": WORDS.get(dtype, "bfloat16"),
        "vocab_size": params.vocab,
    }
    if version is None:
        return config, _question(params)
    config["max_position_embeddings"] = CONTEXT[version]
    if params.stretched:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": _FACTOR.get(version, 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config, None


def _question(params: MetaParams) -> str:
    if params.stretched:
        return (
            f"{params.path}: asks for scaled rotary frequencies and does not say by how much: add "
            "--llama-version 3.1 (also for 3.3) or 3.2"
        )
    return (
        f"{params.path}: does not say whether the model is LLaMA 1 (with a context of 2048) or 2 "
        "(4096): add --llama-version 1 or 2"
    )
