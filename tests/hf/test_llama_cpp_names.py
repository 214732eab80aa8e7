"""What llama.cpp calls the linear weights of each architecture, against names written out."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest

from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import UsageError
from irq_convert.hf.linears import find_linears
from irq_convert.hf.llama_cpp_names import LlamaCppNames
from tests.architectures.zoo import KINDS, Kind, write_checkpoint

L = "model.layers.1"


@pytest.mark.parametrize(
    ("kind", "tensor", "name", "expert"),
    [
        ("llama", f"{L}.self_attn.q_proj.weight", "blk.1.attn_q.weight", None),
        ("llama", f"{L}.self_attn.o_proj.weight", "blk.1.attn_output.weight", None),
        ("mistral", f"{L}.mlp.down_proj.weight", "blk.1.ffn_down.weight", None),
        ("mixtral", f"{L}.block_sparse_moe.experts.3.w2.weight", "blk.1.ffn_down_exps.weight", 3),
        ("mixtral", f"{L}.block_sparse_moe.experts.0.w1.weight", "blk.1.ffn_gate_exps.weight", 0),
        ("mixtral", f"{L}.mlp.experts.gate_up_proj", "blk.1.ffn_gate_exps.weight", None),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight", None),
        ("phi3", f"{L}.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight", None),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "blk.1.ffn_up.weight", None),
        ("qwen3_moe", f"{L}.mlp.experts.7.up_proj.weight", "blk.1.ffn_up_exps.weight", 7),
        ("gpt_oss", f"{L}.mlp.experts.down_proj", "blk.1.ffn_down_exps.weight", None),
        ("deepseek_v3", f"{L}.self_attn.kv_b_proj.weight", "blk.1.attn_kv_b.weight", None),
        ("granitemoe", f"{L}.block_sparse_moe.input_linear.weight",
         "blk.1.ffn_gate_exps.weight", None),
    ],
)  # fmt: skip
def test_names(kind: str, tensor: str, name: str, expert: int | None) -> None:
    found = LlamaCppNames({"model_type": kind}, [tensor]).find(tensor)
    assert found is not None
    assert (found.names[0], found.expert) == (name, expert)


def test_inputs_that_are_the_same_stand_for_each_other() -> None:
    tensor = f"{L}.self_attn.k_proj.weight"
    found = LlamaCppNames({"model_type": "llama"}, [tensor]).find(tensor)
    assert found is not None
    assert set(found.names) == {f"blk.1.attn_{part}.weight" for part in ("k", "q", "v", "qkv")}


@pytest.mark.parametrize("tensor", ["x.1.unknown.weight", f"{L}.linear_attn.out_proj.weight"])
def test_what_it_does_not_have(tensor: str) -> None:
    for kind in ("llama", "qwen3_next"):
        assert LlamaCppNames({"model_type": kind}, [tensor]).find(tensor) is None


def test_a_text_model_inside() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    tensor = "language_model.model.layers.0.mlp.up_proj.weight"
    found = LlamaCppNames(config, [tensor]).find(tensor)
    assert found is not None
    assert found.names[0] == "blk.0.ffn_up.weight"


@pytest.mark.parametrize("config", [None, {}, {"model_type": "of my own"}, {"model_type": "plamo"}])
def test_an_architecture_that_is_not_known(config: dict | None) -> None:
    with pytest.raises(UsageError, match="are not known: use `irq-convert measure`"):
        LlamaCppNames(config, ["a.0.weight"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'irq-convert\[gguf\]'"):
        LlamaCppNames({"model_type": "llama"}, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in KINDS])
def test_every_linear_weight_has_a_name(kind: Kind, tmp_path: Path) -> None:
    """But the dense layers of Qwen 2 MoE, which its converter does not know."""
    write_checkpoint(kind, tmp_path / "source")
    opened = open_checkpoint(tmp_path / "source")
    names = LlamaCppNames(opened.config, opened.tensors)
    known = {f"{name.format(bid=layer)}.weight" for name in gguf.TENSOR_NAMES.values()
             for layer in range(2)}  # fmt: skip
    for tensor in find_linears(opened.config, opened.tensors).tensors:
        found = names.find(tensor)
        if found is None:
            assert kind.name.startswith("Qwen 2 MoE")
            assert ".layers.0.mlp." in tensor
        else:
            assert found.names[0] in known
