"""The contract with PEFT: everything its users do with an adapter, done to an IEC adapter."""

from __future__ import annotations

import copy
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert import IecLoraConfig
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.linear import IrqLinear
from tests.fresh import Forks
from tests.hf.artifact import read_config

from .helpers import (
    ALL_LINEAR,
    adapted_model,
    artifact,
    assert_near,
    iec_config,
    logits,
    packed_layers,
    randomize,
    tokens,
)

KINDS: dict[str, dict[str, Any]] = {
    "both": {},
    "none": {"connection": "none"},
    "block": {"pool": "block", "connection": "input"},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 5, r"layers.1.*q_proj": 4},
        "alpha_pattern": {"o_proj": 3},
        "lora_dropout": 0.1,
    },
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return artifact(tmp_path / "base", bias=True)


# Saving and restoring


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_restore(base: Path, kind: str, low_cpu_mem_usage: bool) -> None:
    model = adapted_model(base, **KINDS[kind])
    folder = base.parent / "adapter"
    model.save_pretrained(folder)
    found = PeftModel.from_pretrained(
        irq_convert.load(base), folder, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(found), logits(model))
    assert not torch.allclose(logits(found), logits(irq_convert.load(base)))
    wanted = {
        f"base_model.model.model.layers.{i}.{part}.{name}.{end}"
        for i in range(2)
        for part, names in (("self_attn", ALL_LINEAR[:4]), ("mlp", ALL_LINEAR[4:]))
        for name in names
        for end in ("lora_A.weight", "lora_B.weight", "lora_iec_beta")
        if not (end == "lora_iec_beta" and kind == "none")
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == wanted


def test_ranks_and_scales_follow_the_patterns(base: Path) -> None:
    model = adapted_model(base, **KINDS["patterns"])
    layers = model.base_model.model.model.layers
    attention = layers[1].self_attn
    assert layers[0].mlp.down_proj.r["default"] == 5
    assert attention.q_proj.r["default"] == 4
    assert layers[0].self_attn.q_proj.r["default"] == 6
    assert attention.o_proj.scaling["default"] == 3 / 6**0.5
    assert layers[0].mlp.down_proj.scaling["default"] == 9 / 5**0.5
    assert layers[0].mlp.down_proj.lora_A["default"].weight.shape == (5, 172)


RESTORE = """
import sys
import torch
ids = torch.load("ids.pt")
def run(model, out):
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, out)
    return type(model.get_base_model().model.layers[0].mlp.up_proj).__name__
"""
FIRST_PEFT = """
import peft, transformers, irq_convert
model = peft.PeftModel.from_pretrained(irq_convert.load("base"), "adapter")
print(run(model, "logits.pt"))
"""
NOTHING_FIRST = """
print(run(torch.load("model.pt", weights_only=False), "logits.pt"))
from peft import AutoPeftModelForCausalLM
print(run(AutoPeftModelForCausalLM.from_pretrained("adapter"), "auto.pt"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [FIRST_PEFT, NOTHING_FIRST], ids=["by hand", "pickled and auto"])
def test_restored_in_a_fresh_process(python: Forks, base: Path, code: str) -> None:
    here = base.parent
    model = adapted_model(base)
    model.save_pretrained(here / "adapter")
    torch.save(model, here / "model.pt")
    torch.save(tokens(), here / "ids.pt")
    done = python(RESTORE + code, cwd=here)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"IecLoraLinear"}
    for name in ("logits.pt", "auto.pt"):
        if name in code:
            assert torch.equal(torch.load(here / name), logits(model))


@pytest.mark.slow
def test_stock_peft_refuses_the_folder(python: Forks, base: Path) -> None:
    adapted_model(base).save_pretrained(base.parent / "adapter")
    done = python(
        "import sys\n"
        "from peft import PeftModel\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[1]))\n"
        "PeftModel.from_pretrained(model, sys.argv[2])",
        *(base, base.parent / "adapter"),
    )
    assert done.returncode != 0
    assert "KeyError" in done.stderr
    assert "IEC_LORA" in done.stderr


def test_auto_class(base: Path) -> None:
    model = adapted_model(base)
    model.save_pretrained(base.parent / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(base.parent / "adapter")
    assert torch.equal(logits(found), logits(model))
    trainable = AutoPeftModelForCausalLM.from_pretrained(base.parent / "adapter", is_trainable=True)
    names = {n.rsplit(".", 2)[1] for n, p in trainable.named_parameters() if p.requires_grad}
    assert names == {"default"}
    assert not any(p.requires_grad for p in found.parameters())


def test_transformers_own_loading_of_adapters(base: Path) -> None:
    model = adapted_model(base)
    model.save_pretrained(base.parent / "adapter")
    found = irq_convert.load(base)
    found.load_adapter(str(base.parent / "adapter"))
    assert torch.equal(logits(found), logits(model))
    assert torch.equal(logits(irq_convert.load(base)), logits(model.unload()))


# Files that do not fit


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


KEY = "base_model.model.model.layers.1.mlp.up_proj."
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no beta": (lambda t: t.pop(KEY + "lora_iec_beta"), r"lacks .*up_proj\.lora_iec_beta\."),
    "no A": (lambda t: t.pop(KEY + "lora_A.weight"), r"lacks .*up_proj\.lora_A"),
    "nothing": (lambda t: t.clear() or t.update(x=torch.ones(1)), "lacks .* and 41 more"),
    "another layer": (
        lambda t: t.update({KEY.replace("layers.1", "layers.7") + "lora_iec_beta": torch.ones(2)}),
        r"has the unknown .*layers\.7",
    ),
    "another kind": (
        lambda t: t.update({KEY + "lora_magnitude_vector": torch.ones(172)}),
        "has the unknown .*lora_magnitude_vector",
    ),
    "a stranger": (lambda t: t.update({KEY + "gate": torch.ones(2)}), r"unknown .*up_proj\.gate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_missing_and_unknown_tensors_are_refused(base: Path, kind: str, way: str) -> None:
    folder = base.parent / "adapter"
    adapted_model(base).save_pretrained(folder)
    change, words = DAMAGES[kind]
    damage(folder, change)
    model: Any = irq_convert.load(base)
    load = PeftModel.from_pretrained
    if way == "load_adapter":
        model, load = get_peft_model(model, iec_config()), PeftModel.load_adapter
    with pytest.raises(IrqError, match=words) as caught:
        load(model, folder, "second")
    assert "\n" not in str(caught.value)


def test_betas_where_the_settings_know_none(base: Path) -> None:
    folder = base.parent / "adapter"
    adapted_model(base).save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw["connection"] = "none"
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(IrqError, match=r"unknown .*lora_iec_beta"):
        PeftModel.from_pretrained(irq_convert.load(base), folder)


def test_a_wrong_shape_is_refused(base: Path) -> None:
    folder = base.parent / "adapter"
    adapted_model(base).save_pretrained(folder)
    damage(folder, lambda t: t.update({KEY + "lora_iec_beta": torch.ones(3)}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(irq_convert.load(base), folder)


@pytest.mark.parametrize("name", ["mlp", "layers", "weight_2", "lora_A"])
def test_adapters_named_like_modules(base: Path, name: str) -> None:
    folder = base.parent / "adapter"
    adapted_model(base).save_pretrained(folder)
    model = PeftModel.from_pretrained(irq_convert.load(base), folder)
    wanted = logits(model)
    if name == "lora_A":  # PEFT's own limit: the name of the adapter hides in the key
        return
    model.load_adapter(folder, name)
    model.set_adapter(name)
    assert torch.equal(logits(model), wanted)


def test_whole_modules_and_biases_are_kept(base: Path) -> None:
    folder = base.parent / "adapter"
    model = get_peft_model(
        irq_convert.load(base), iec_config(modules_to_save=["norm", "lm_head"], bias="lora_only")
    ).eval()
    randomize(model, size=0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.norm.weight" in keys
    assert any(key.endswith("q_proj.base_layer.bias") for key in keys)
    found = PeftModel.from_pretrained(irq_convert.load(base), folder)
    assert torch.equal(logits(found), logits(model))


# Several adapters


@pytest.fixture
def three(base: Path) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Adapters of two ranks and a pooled one, and the logits of each alone."""
    model = adapted_model(base)
    model.add_adapter("small", iec_config(r=3, connection="output", target_modules=["q_proj"]))
    model.add_adapter("pooled", iec_config(pool="block", r=4))
    wanted = {}
    for seed, name in enumerate(("default", "small", "pooled")):
        randomize(model, seed, name, size=0.05)
        model.set_adapter(name)
        wanted[name] = logits(model)
    with model.disable_adapter():
        wanted["__base__"] = logits(model)
    model.set_adapter("default")
    return model.eval(), wanted


def test_switching(base: Path, three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, wanted = three
    assert torch.equal(wanted["__base__"], logits(irq_convert.load(base)))
    values = list(wanted.values())
    for i, left in enumerate(values):
        assert not any(torch.allclose(left, right) for right in values[i + 1 :])
    for name in ("pooled", "small", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted[name])
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {name}
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted["__base__"])
    assert torch.equal(logits(model), wanted["default"])


def test_each_is_saved_and_loaded_by_name(
    base: Path, three: tuple[PeftModel, dict[str, torch.Tensor]]
) -> None:
    model, wanted = three
    folder = base.parent / "adapters"
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"small", "pooled"}
    found = PeftModel.from_pretrained(irq_convert.load(base), folder)
    found.load_adapter(folder / "small", "first")
    found.load_adapter(folder / "pooled", "second")
    for name, own in (("first", "small"), ("second", "pooled"), ("default", "default")):
        found.set_adapter(name)
        assert torch.equal(logits(found), wanted[own])


def test_deleting(three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, wanted = three
    model.delete_adapter("default")
    assert not any(n.endswith("default") or ".default." in n for n in model.state_dict())
    for name in ("small", "pooled"):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted[name])
    model.add_adapter("default", iec_config(r=2))
    model.set_adapter("default")
    assert torch.equal(logits(model), wanted["__base__"])


def test_mixed_batch(three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, wanted = three
    for names in (["default", "small"], ["pooled", "__base__"], ["pooled", "pooled"]):
        found = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            assert_near(found[row], wanted[name][row])


def test_several_at_once(three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, _ = three
    model.base_model.set_adapter(["default", "small", "pooled"])
    together = logits(model)
    model.merge_adapter()
    assert_near(logits(model), together)
    model.unmerge_adapter()
    assert torch.equal(logits(model), together)


def test_adding_up_is_refused(three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, _ = three
    with pytest.raises(UsageError, match="cannot be added up: fold each"):
        model.add_weighted_adapter(["default", "small"], [0.5, 0.5], "sum", "linear")
    assert "sum" not in model.peft_config


def test_status(three: tuple[PeftModel, dict[str, torch.Tensor]]) -> None:
    model, _ = three
    status = model.get_model_status()
    assert status.peft_types == dict.fromkeys(("default", "small", "pooled"), "IEC_LORA")
    assert status.active_adapters == ["default"]
    assert status.num_adapter_layers == 14
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


# Merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merged_saved_and_loaded(base: Path, kind: str, dtype: torch.dtype | None) -> None:
    model = adapted_model(base, dtype=dtype, **KINDS[kind])
    kept = {n: copy.deepcopy(m) for n, m in packed_layers(model).items()}
    before = logits(model)
    merged = model.merge_and_unload()
    assert_near(logits(merged), before, 1e-5 if dtype is None else 0.03)
    merged.save_pretrained(base.parent / "merged")
    again = irq_convert.load(base.parent / "merged")
    assert torch.equal(logits(again), logits(merged))
    raw = read_config(base.parent / "merged")
    assert not any(p.requires_grad for p in merged.parameters())
    if kind != "block":
        assert not packed_layers(again)
        assert {type(m) for m in again.modules() if "up_proj" in repr(type(m))} <= {IrqLinear}
        assert again.model.layers[0].mlp.up_proj.weight.dtype == (dtype or torch.float32)
        return
    assert "float32" in json.dumps(raw)
    for name, layer in packed_layers(again).items():
        old = kept[f"base_model.model.{name}.base_layer"]
        assert layer.weight_tau.dtype == torch.float32
        assert torch.equal(layer.weight, old.weight)
        assert torch.equal(layer.weight_scale, old.weight_scale)
        assert torch.equal(layer.weight_scale_grid, old.weight_scale_grid)


def test_part_of_the_layers_merged_saved_and_loaded(base: Path) -> None:
    model = adapted_model(base, target_modules=["q_proj", "down_proj"])
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(base.parent / "merged")
    again = irq_convert.load(base.parent / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert len(packed_layers(again)) == 10


@pytest.mark.parametrize("pool", [None, "block"])
def test_merge_adapter_and_back(base: Path, pool: str | None) -> None:
    model = adapted_model(base, pool=pool)
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert_near(logits(model), before)
    with pytest.raises(ValueError, match="adapter_names"):
        logits(model, adapter_names=["default", "default"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert {n: t.dtype for n, t in state.items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_a_broken_adapter_is_not_merged(base: Path) -> None:
    model = adapted_model(base)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0] = float(
            "nan"
        )
    with pytest.raises(IrqError, match="gives NaN or infinite weights: the adapter is broken"):
        model.merge_and_unload(safe_merge=True)


# Attaching


def test_attach_by_default(base: Path) -> None:
    model = irq_convert.attach(irq_convert.load(base))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.connection) == (64, 16, "both")
    assert {name.rsplit(".")[-1] for name in config.target_modules} == set(ALL_LINEAR)
    layers = [m for m in model.modules() if isinstance(m, IecLoraLinear)]
    assert len(layers) == 14
    assert not isinstance(model.get_output_embeddings(), IecLoraLinear)
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    with pytest.raises(UsageError, match="has an adapter already"):
        irq_convert.attach(model)  # type: ignore[arg-type]


def test_the_adapter_is_float32_on_a_short_model(base: Path) -> None:
    model = irq_convert.attach(irq_convert.load(base, dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    assert model(input_ids=tokens()).logits.dtype == torch.bfloat16
    base_model = model.get_base_model()
    assert base_model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_stock_lora_on_the_artifact(base: Path) -> None:
    model = irq_convert.attach(irq_convert.load(base), LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert not [m for m in model.modules() if isinstance(m, IecLoraLinear)]
    randomize(model, size=0.05)
    model.eval().save_pretrained(base.parent / "adapter")
    raw = json.loads((base.parent / "adapter" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA"
    assert "connection" not in raw
    found = PeftModel.from_pretrained(irq_convert.load(base), base.parent / "adapter")
    assert torch.equal(logits(found), logits(model))
    with pytest.raises(UsageError, match="irq-convert merge"):  # codes are no weights to add to
        model.merge_and_unload()


def test_plain_iec_equals_stock_lora(base: Path) -> None:
    """A file of connection "none" is a stock LoRA's but for its settings."""
    folder = base.parent / "adapter"
    model = adapted_model(base, connection="none")
    model.save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    for key in ("connection", "pool", "block_size", "statistics", "base_sha256"):
        del raw[key]
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"peft_type": "LORA"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = PeftModel.from_pretrained(irq_convert.load(base), folder)
    assert_near(logits(found), logits(model))


# Copies of the whole model


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_of_the_model(base: Path, way: str) -> None:
    model = adapted_model(base, lora_dropout=0.1)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    shutil.rmtree(base)
    assert torch.equal(logits(twin), logits(model))
    twin.merge_adapter()
    assert not model.base_model.model.model.layers[0].mlp.up_proj.merged
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), logits(model))
    assert isinstance(twin.peft_config["default"], IecLoraConfig)
