"""Which linear layers have a bias, as transformers' classes read config.json.

A bias that the files hold and the class does not ask for is left out by transformers and added by
other engines; one that the class asks for and the files lack is made up. Both are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from irq_convert.errors import UsageError

QUERY_KEY_VALUE = frozenset(("q_proj", "k_proj", "v_proj"))
ATTENTION = QUERY_KEY_VALUE | {"o_proj"}
MLP = frozenset(("gate_proj", "up_proj", "down_proj"))


def biased_modules(model_type: str, config: Mapping[str, Any]) -> frozenset[str] | None:
    """Last parts of the names of linear modules with a bias; None for a class not known here."""
    attention = ATTENTION if config.get("attention_bias") else frozenset()
    found: dict[str, frozenset[str]] = {
        "llama": attention | (MLP if config.get("mlp_bias") else frozenset()),
        "mistral": frozenset(),
        "qwen2": QUERY_KEY_VALUE,
        "qwen3": attention,
    }
    return found.get(model_type)


def check_biases(config: Mapping[str, Any], names: Iterable[str], engine: str) -> None:
    """Compare the biases in `names` of tensors with what the class has.

    Raises `UsageError` where a bias is there that the class does not have, or the other way round.
    """
    wanted = biased_modules(str(config.get("model_type")), config)
    if wanted is None:
        return
    present = set(names)
    for name in sorted(present):
        module, _, part = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last not in ATTENTION | MLP:
            continue
        if part == "bias" and last not in wanted:
            raise UsageError(
                f"{name}: config.json gives {last} no bias, so transformers leaves this one out "
                f"and {engine} would not: correct config.json, or use --to dense"
            )
        if part == "weight" and last in wanted and f"{module}.bias" not in present:
            raise UsageError(
                f"{module}.bias is missing: config.json gives {last} a bias; get the whole model"
            )
