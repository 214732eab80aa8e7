"""Which modules are packed, and how, under the names of vLLM."""

from __future__ import annotations

import pytest

from irq_convert.artifact.config import QuantizationConfig
from irq_convert.errors import IrqError
from irq_convert.vllm.modules import StoredModules

RAW = {
    "quant_method": "irq",
    "format_version": 1,
    "codebook": "nf3",
    "bits": 3,
    "block_size": 64,
    "group_size": 256,
    "scale_dtype": "uint8",
    "tau_dtype": "uint8",
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.v_proj"],
    "overrides": {
        "model.layers.0.self_attn.k_proj": {"codebook": "int4", "bits": 4},
        "model.layers.0.mlp.c_fc": {"transposed": True},
    },
}
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}
ATTENTION = "model.layers.0.self_attn"


def modules(**tensors: str) -> StoredModules:
    found = StoredModules(QuantizationConfig.from_dict(RAW))
    return found.with_tensors(tensors) if tensors else found


def packed(*names: str) -> dict[str, str]:
    parts = ("", "_scale", "_tau", "_scale_grid", "_tau_grid")
    return {
        f"{name}.weight{part}": "F32" if "grid" in part else "U8"
        for name in names
        for part in parts
    }


def test_merged_layers_keep_a_format_for_each_matrix() -> None:
    names = modules().matrices(f"{ATTENTION}.qkv_proj", MERGED)
    assert names == tuple(f"{ATTENTION}.{each}_proj" for each in "qkv")
    formats = [modules().format_of(name) for name in names]
    assert [fmt and fmt.codebook for fmt in formats] == ["nf3", "int4", None]


def test_matrices_that_the_files_have_merged() -> None:
    name = "model.layers.0.mlp.gate_up_proj"
    assert modules().matrices(name, MERGED) == (name,)
    own = modules(**packed(f"{ATTENTION}.qkv_proj"))
    assert own.matrices(f"{ATTENTION}.qkv_proj", MERGED) == (f"{ATTENTION}.qkv_proj",)


def test_headers_say_what_is_packed() -> None:
    q, o = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj"
    found = modules(**packed(q), **{f"{o}.weight": "U8"})  # bytes without statistics are no codes
    assert found.format_of(q) is not None
    assert found.format_of(o) is None


def test_tables_by_name_without_one_and_tied() -> None:
    found = modules(**packed("model.embed_tokens"))
    for prefix, head in (("model.embed_tokens", False), ("", False), ("lm_head", True)):
        table = found.table(prefix, head)
        assert table is not None
        assert table[0] == "model.embed_tokens"
    assert found.table("vision.embed", False) is None
    own = modules(**packed("model.embed_tokens"), **{"lm_head.weight": "BF16"})
    assert own.table("lm_head", True) is None
    assert modules().table("model.embed_tokens", False) is None  # nothing is known


def test_names_of_a_class_of_vllm() -> None:
    def rename(name: str) -> str | None:
        return None if name == "lm_head" else name.replace("model.", "language_model.model.")

    found = modules(**packed(f"{ATTENTION}.k_proj"), **{"lm_head.weight": "BF16"}).renamed(rename)
    fmt = found.format_of(f"language_model.{ATTENTION}.k_proj")
    assert fmt is not None
    assert fmt.codebook == "int4"
    assert found.format_of(f"{ATTENTION}.k_proj") is None
    assert "lm_head" not in found.config.dense_modules


def test_transposed_layers_are_refused_by_name() -> None:
    with pytest.raises(IrqError, match=r"model.layers.0.mlp.c_fc is stored transposed"):
        modules().format_of("model.layers.0.mlp.c_fc")
