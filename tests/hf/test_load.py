"""Loading, running, saving and dequantizing artifacts through transformers, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import irq_convert
from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.linear import IrqLinear
from tests.folders import change_config, change_tensors, read_tensors
from tests.tiny import tiny_model

from .artifact import NF4, dense_model, linear_names, read_config, write_artifact

MIXED = {
    "model.layers.0.mlp.down_proj": ModuleFormat("nf2", 32),
    "model.layers.1.self_attn.q_proj": ModuleFormat("int3", 16),
    "model.layers.1.mlp.up_proj": ModuleFormat("int4", 64),
}
IDS = torch.tensor([[1, 5, 7, 9, 11, 2, 3]])


def assert_exact(model: torch.nn.Module, dense: dict[str, torch.Tensor]) -> None:
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, IrqLinear)}
    assert set(layers) == {name for name in dense if name.endswith("proj.weight")}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), dense[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_logits_are_those_of_the_decoded_weights(
    tmp_path: Path, tied: bool, device_map: Any
) -> None:
    source = tiny_model(tie_word_embeddings=tied)
    dense = write_artifact(tmp_path, source, overrides=MIXED, shards=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert_exact(model, dense)
    twin = dense_model(source, dense)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_proj." in n)
    assert model.lm_head.weight.requires_grad
    made = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(made, twin.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", "bfloat16"])
def test_dtypes_leave_the_packed_parts_alone(tmp_path: Path, dtype: Any) -> None:
    source = tiny_model(attention_bias=True)
    dense = write_artifact(tmp_path, source, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = torch.float16 if dtype is torch.float16 else torch.bfloat16
    assert model.dtype == wanted
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.bias.dtype == wanted
    assert layer.weight_scale_grid.dtype == torch.float32
    assert_exact(model, dense)
    assert model(IDS).logits.dtype == wanted
    model.to(torch.float32)
    assert_exact(model, dense)
    twin = dense_model(source, dense)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_saving_gives_the_same_bytes(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    write_artifact(tmp_path / "a", tiny_model(tie_word_embeddings=tied), overrides=MIXED)
    model = irq_convert.load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert read_config(tmp_path / "a") == read_config(tmp_path / "b")
    again = irq_convert.load(tmp_path / "b")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_disk_offload(tmp_path: Path) -> None:
    source = tiny_model()
    dense = write_artifact(tmp_path / "a", source, overrides=MIXED)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = irq_convert.load(
        tmp_path / "a", device_map=device_map, offload_folder=str(tmp_path / "off")
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    twin = dense_model(source, dense)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(IrqError, match="is offloaded to disk"):
        model.dequantize()
    model.save_pretrained(tmp_path / "b")
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [None, torch.float32, "bfloat16"])
def test_dequantize_gives_a_plain_model(tmp_path: Path, dtype: Any) -> None:
    dense = write_artifact(tmp_path / "a", tiny_model(attention_bias=True), overrides=MIXED)
    model = irq_convert.load(tmp_path / "a")
    plain = model.dequantize(dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert not any(isinstance(module, IrqLinear) for module in plain.modules())
    state = plain.state_dict()
    for name in linear_names(tiny_model()):
        assert torch.equal(state[name], dense[name].to(wanted))
    assert {p.dtype for p in plain.parameters()} == {wanted}
    assert plain(IDS).logits.dtype == wanted
    plain.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    assert not hasattr(again.config, "quantization_config")


def test_base_model_alone_and_its_saved_configuration(tmp_path: Path) -> None:
    dense = write_artifact(tmp_path / "a", tiny_model(), overrides=MIXED)
    base = AutoModel.from_pretrained(tmp_path / "a")
    assert type(base).__name__ == "LlamaModel"
    without = {name.removeprefix("model."): tensor for name, tensor in dense.items()}
    assert_exact(base, without)
    assert base.layers[0].mlp.down_proj.fmt.codebook == "nf2"
    base.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    assert_exact(again, without)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert_exact(whole, dense)


def test_another_head_starts_fresh(tmp_path: Path) -> None:
    dense = write_artifact(tmp_path, tiny_model())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert_exact(model, dense)


def test_saving_a_partly_dense_model_says_so(tmp_path: Path) -> None:
    dense = write_artifact(tmp_path / "a", tiny_model(), overrides=MIXED)
    model = irq_convert.load(tmp_path / "a")
    name = "model.layers.1.mlp.up_proj"
    layer = torch.nn.Linear(96, 172, bias=False)
    layer.weight.data = dense[f"{name}.weight"] + 1
    model.set_submodule(name, layer)
    model.save_pretrained(tmp_path / "b")
    saved = read_config(tmp_path / "b")
    assert saved["modules_to_not_convert"] == ["lm_head", name]
    assert set(saved["overrides"]) == set(MIXED) - {name}
    again = irq_convert.load(tmp_path / "b")
    assert torch.equal(again.get_submodule(name).weight, layer.weight)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_training_an_input_embedding_through_packed_layers(tmp_path: Path) -> None:
    source = tiny_model()
    dense = write_artifact(tmp_path, source)
    model = irq_convert.load(tmp_path).train()
    twin = dense_model(source, dense).train()
    for own in (model, twin):
        own(IDS, labels=IDS).loss.backward()
    wanted = twin.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, wanted, atol=1e-5, rtol=1e-4)
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    grads = []
    for enabled in (False, True):
        model = irq_convert.load(tmp_path).train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(grads[0], grads[1])


def test_deepcopy(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    model = irq_convert.load(tmp_path)
    twin = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    assert twin.config.quantization_config == model.config.quantization_config


def test_float_statistics(tmp_path: Path) -> None:
    """Artifacts of other writers: statistics as they are, in either dtype."""
    dense = write_artifact(tmp_path, tiny_model())
    from irq_convert.core.scales import expand_statistic

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_grid")]:
            part = name.removesuffix("_grid")
            tensors[part] = expand_statistic(tensors[part], tensors.pop(name))

    change_tensors(tmp_path, widen)
    change_config(tmp_path, lambda raw: raw.update(scale_dtype="float32", tau_dtype="float32"))
    model = irq_convert.load(tmp_path, dtype=torch.bfloat16)
    assert_exact(model, dense)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_proj." in n)


def test_load_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match=r"not an irq artifact \(not quantized\)"):
        irq_convert.load(tmp_path / "dense")
    with pytest.raises(IrqError, match="cannot be read as a model") as caught:
        irq_convert.load(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_load_refuses_a_missing_dense_tensor(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(IrqError, match=r"missing keys: model\.norm\.weight: the artifact"):
        irq_convert.load(tmp_path)


def test_load_takes_the_options_of_from_pretrained(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    model, info = irq_convert.load(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert model.config._attn_implementation == "eager"


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    from irq_convert.hf import IrqConfig

    tiny_model().save_pretrained(tmp_path / "dense")
    write_artifact(tmp_path / "irq", tiny_model(), NF4)
    config = IrqConfig(**read_config(tmp_path / "irq"))
    with pytest.raises(UsageError, match="irq-convert quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
