"""`IecLoraConfig`: what it takes and refuses, and that a file gives it back."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from torch import nn

import irq_convert
from irq_convert import IecLoraConfig, UsageError
from irq_convert.adapters.peft_type import iec_lora
from irq_convert.adapters.register import register
from tests.fresh import Forks

from .helpers import artifact


def test_defaults() -> None:
    config = IecLoraConfig()
    assert config.peft_type == "IEC_LORA"
    assert (config.connection, config.pool) == ("both", None)
    assert config.block_size is None
    assert config.base_sha256 is None
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (LoraConfig().r, LoraConfig().lora_alpha)


def test_the_type_is_a_member_like_any_other() -> None:
    register()
    register()
    member = iec_lora()
    assert member is PeftType.IEC_LORA is PeftType("IEC_LORA") is PeftType["IEC_LORA"]
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert (member.name, member.value, str(member.value)) == ("IEC_LORA",) * 3
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "IEC_LORA"}'
    assert member != PeftType.LORA
    assert len({*PeftType}) == len(list(PeftType))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"connection": "left"}, r"connection 'left': choose one of both, input, output, none"),
        ({"connection": None}, "connection None"),
        ({"pool": "row"}, "pool 'row': choose 'block' or None"),
        ({"pool": "block", "block_size": 48}, r"block_size 48: choose one of 16, 32, 64, 128"),
        ({"pool": "block", "block_size": 0}, "block_size 0"),
        ({"block_size": 64}, "block_size is for adapters with pool='block'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weight"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "orthogonal"}, "orthogonal"),
        ({"lora_bias": True}, "does not take lora_bias"),
        ({"layer_replication": [(0, 1)]}, "does not take layer_replication"),
        ({"target_parameters": ["weight"]}, "does not take target_parameters"),
    ],
)
def test_refused_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        IecLoraConfig(**options)
    assert "\n" not in str(caught.value)


def target(**options: Any) -> IecLoraConfig:
    return IecLoraConfig(r=4, target_modules=["lin"], **options)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(32, 16)
        self.emb = nn.Embedding(8, 32)
        self.conv = nn.Conv2d(2, 2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "cannot be combined with DoraLinearVariant"),
        ({"target_modules": ["emb"]}, r"names a Embedding \(emb\): leave it out"),
        ({"target_modules": ["lin", "conv"]}, r"names a Conv2d \(conv\)"),
        ({"pool": "block"}, r"pool='block' on a dense layer \[16, 32\] needs block_size"),
    ],
)
def test_refused_on_a_model(options: dict[str, Any], words: str) -> None:
    config = IecLoraConfig(**{"r": 4, "target_modules": ["lin"]} | options)
    with pytest.raises(UsageError, match=words) as caught:
        get_peft_model(Toy(), config)
    assert "\n" not in str(caught.value)


def test_another_block_size_than_the_layers_is_refused(tmp_path: Path) -> None:
    model = irq_convert.load(artifact(tmp_path))
    with pytest.raises(UsageError, match=r"block_size 32 of the adapter, .* has blocks of 64"):
        irq_convert.attach(model, IecLoraConfig(pool="block", block_size=32))
    again = irq_convert.load(tmp_path)
    attached = irq_convert.attach(again, IecLoraConfig(pool="block", block_size=64))
    assert attached.peft_config["default"].block_size == 64


def test_variants_that_peft_refuses_itself_are_one_line_too() -> None:
    config = target(use_dora=True)
    config.alora_invocation_tokens = [1]
    with pytest.raises(UsageError, match="IEC-LoRA: ") as caught:
        get_peft_model(Toy(), config)
    assert "\n" not in str(caught.value)


def test_pooled_dense_layers_with_a_block_size() -> None:
    model = get_peft_model(Toy(), target(pool="block", block_size=16))
    assert model.base_model.model.lin.lora_A["default"].weight.shape == (4, 2)


def full() -> IecLoraConfig:
    return IecLoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"down_proj": 3},
        alpha_pattern={"down_proj": 5},
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
        connection="input",
        pool="block",
        block_size=64,
        base_sha256="ab" * 32,
    )


def same(found: Any, wanted: IecLoraConfig) -> bool:
    left, right = found.to_dict(), wanted.to_dict()
    for raw in (left, right):
        raw["target_modules"] = sorted(raw["target_modules"])
        raw.pop("inference_mode")
    return isinstance(found, IecLoraConfig) and left == right


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "replace"])
def test_copies(way: str) -> None:
    config = full()
    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda c: pickle.loads(pickle.dumps(c)),
        "replace": replace,
    }
    assert same(ways[way](config), config)


def test_saved_and_read_again(tmp_path: Path) -> None:
    config = full()
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "IEC_LORA"
    assert (raw["connection"], raw["pool"], raw["block_size"]) == ("input", "block", 64)
    assert raw["base_sha256"] == "ab" * 32
    assert same(PeftConfig.from_pretrained(tmp_path), config)
    assert same(IecLoraConfig.from_pretrained(tmp_path), config)


READ = """
import sys
{imports}
config = PeftConfig.from_pretrained(sys.argv[1])
print(type(config).__name__, config.connection, config.rank_pattern)
"""


@pytest.mark.slow
def test_read_in_a_fresh_process(python: Forks, tmp_path: Path) -> None:
    full().save_pretrained(tmp_path)
    imports = "import irq_convert; from transformers import Trainer; from peft import PeftConfig"
    done = python(READ.format(imports=imports), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "IecLoraConfig input {'down_proj': 3}"
    assert "cannot load IEC-LoRA" not in done.stderr


@pytest.mark.slow
def test_a_foreign_peft_does_not_reach_the_importer(python: Forks) -> None:
    done = python(
        "import sys\n"
        "sys.modules['irq_convert.adapters.peft_type'] = None\n"
        "import irq_convert, peft\n"
        "print('IEC_LORA' in peft.PeftType.__members__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert "cannot load IEC-LoRA" in done.stderr
