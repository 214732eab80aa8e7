"""Adapter folders read without PEFT, by PEFT's rules; what is wrong with one is named."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.artifact.adapter import adapter_identity, open_adapter, read_layer
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError, UsageError
from tests.jobs.merge.make import (
    PREFIX,
    Q0,
    WEIGHTS,
    change_settings,
    change_weights,
    write_adapter,
)

SHAPES: dict[str, tuple[int, int, int | None]] = {
    Q0: (96, 96, 32),
    "model.layers.0.mlp.down_proj": (96, 172, 32),
    "model.layers.1.mlp.down_proj": (96, 172, 32),
}
A = f"{PREFIX}{Q0}.lora_A.weight"
B = f"{PREFIX}{Q0}.lora_B.weight"
BETA = f"{PREFIX}{Q0}.lora_iec_beta"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", None, SHAPES, base="ab" * 32)


def refused(kind: type[IrqError], folder: Path, *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_adapter(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def test_what_an_adapter_holds(adapter: Path) -> None:
    found = open_adapter(adapter)
    assert set(found.layers) == set(SHAPES)
    assert found.config.kind == "iec"
    assert found.config.base_sha256 == "ab" * 32
    layer = found.layers[Q0]
    assert (layer.a.shape, layer.b.shape, layer.rank, layer.scaling) == ((8, 96), (96, 8), 8, 2.0)
    assert found.nbytes == sum(4 * (8 * (out + cols) + 2) for out, cols, _ in SHAPES.values())
    with TileReader() as reader:
        values = read_layer(reader, found.config, layer)
    assert values.a.dtype == values.b.dtype == torch.float64
    assert all(values.beta)


@pytest.mark.parametrize(
    ("connection", "kept"), [("both", (1, 1)), ("input", (1, 0)), ("output", (0, 1))]
)
def test_betas_that_are_switched_off_count_as_zero(
    tmp_path: Path, connection: str, kept: tuple[int, int]
) -> None:
    folder = write_adapter(tmp_path / "adapter", None, SHAPES, connection=connection)
    found = open_adapter(folder)
    with TileReader() as reader:
        values = read_layer(reader, found.config, found.layers[Q0])
    assert tuple(int(beta != 0) for beta in values.beta) == kept


def test_the_identity_is_that_of_the_specification(adapter: Path) -> None:
    lines = ""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        lines += f"{name}\t{hashlib.sha256((adapter / name).read_bytes()).hexdigest()}\n"
    before = adapter_identity(adapter)
    assert before == hashlib.sha256(lines.encode()).hexdigest() == open_adapter(adapter).sha256
    (adapter / "README.md").write_text("beside it")
    assert adapter_identity(adapter) == before
    change_settings(adapter, lora_alpha=3)
    assert adapter_identity(adapter) != before


def test_the_note_says_the_base_of_a_plain_lora(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", None, SHAPES, kind="plain", base="cd" * 32)
    assert open_adapter(folder).config.base_sha256 == "cd" * 32
    (folder / "irq_adapter.json").unlink()
    assert open_adapter(folder).config.base_sha256 is None


@pytest.mark.slow
def test_nothing_heavy_is_imported(adapter: Path) -> None:
    code = (
        "import sys; from irq_convert.artifact.adapter import open_adapter; "
        f"open_adapter({str(adapter)!r}); "
        "print([m for m in ('peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.stdout == "[]\n"


# What is refused.


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias 'all'"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_what_cannot_be_merged_is_named(adapter: Path, changes: dict[str, Any], word: str) -> None:
    refused(UsageError, change_settings(adapter, **changes), word, "adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": 0}, "r 0"),
        ({"r": "8"}, "r '8'"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj 1.5"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 3}}, "'('"),
        ({"target_modules": "["}, "'['"),
        ({"target_modules": [3]}, "target_modules [3]"),
        ({"connection": "sideways"}, "sideways"),
        ({"pool": "row"}, "pool 'row'"),
        ({"block_size": 33}, "block_size 33"),
        ({"base_sha256": 7}, "base hash 7"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices ['a']"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "list of tokens"),
        ({"trainable_token_indices": [1, 2]}, "no rows of tokens"),
    ],
)
def test_settings_that_make_no_sense(adapter: Path, changes: dict[str, Any], word: str) -> None:
    refused(IrqError, change_settings(adapter, **changes), word)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{PREFIX}{Q0}.lora_magnitude_vector", "DoRA"),
        (f"{PREFIX}{Q0}.lora_B.bias", "a bias of LoRA"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "0 tokens"),
        (f"{PREFIX}{Q0}.token_adapter.trainable_tokens_delta", "trainable tokens of a module"),
        (f"{PREFIX}model.norm.weight", "nor a tensor of modules_to_save"),
        ("q_proj.lora_A.weight", "does not begin with base_model.model."),
    ],
)
def test_tensors_that_nothing_accounts_for(adapter: Path, key: str, words: str) -> None:
    change_weights(adapter, lambda t: t.update({key: torch.ones(4, 4)}))
    refused(IrqError, adapter, key, words, "F32 [4, 4]")


@pytest.mark.parametrize("key", [A, B, BETA])
def test_half_of_a_pair(adapter: Path, key: str) -> None:
    change_weights(adapter, lambda t: t.pop(key))
    refused(IrqError, adapter, f"{key} is missing", "is there")


def test_betas_where_there_must_be_none(adapter: Path) -> None:
    refused(IrqError, change_settings(adapter, peft_type="LORA"), "lora_iec_beta", "type LORA")


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (A, (7, 96), "8 rank in dimension 0"),
        (B, (96, 9), "8 rank in dimension 1"),
        (A, (8,), "8 rank"),
        (A, (8, 0), "8 rank"),
        (BETA, (3,), "2 betas"),
    ],
)
def test_shapes_that_the_settings_contradict(
    adapter: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    change_weights(adapter, lambda t: t.update({key: torch.ones(shape)}))
    refused(IrqError, adapter, key, words)


def test_numbers_that_are_none(adapter: Path) -> None:
    change_weights(adapter, lambda t: t[A][3].fill_(float("nan")))
    found = open_adapter(adapter)
    with TileReader() as reader, pytest.raises(IrqError, match="NaN or infinite") as caught:
        read_layer(reader, found.config, found.layers[Q0])
    assert A in str(caught.value)


def test_integers_are_no_matrix(adapter: Path) -> None:
    change_weights(adapter, lambda t: t.update({A: torch.ones(8, 96, dtype=torch.int32)}))
    refused(IrqError, adapter, A, "I32", "must be one of")


def test_a_module_that_was_to_be_saved_is_missing(adapter: Path) -> None:
    refused(IrqError, change_settings(adapter, modules_to_save=["lm_head"]), "lm_head")


def test_folders_that_hold_no_adapter(adapter: Path, tmp_path: Path) -> None:
    refused(UsageError, tmp_path / "nothing", "no such folder")
    refused(UsageError, tmp_path, "adapter_config.json")
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-10])
    refused(IrqError, adapter, WEIGHTS)
    (adapter / WEIGHTS).write_bytes(whole[:100])
    refused(IrqError, adapter, WEIGHTS)
    (adapter / WEIGHTS).unlink()
    refused(IrqError, adapter, "no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"")
    refused(IrqError, adapter, "pickled")
    (adapter / "adapter_config.json").write_text("{")
    refused(IrqError, adapter, "not JSON")


def test_an_adapter_of_nothing(adapter: Path) -> None:
    change_weights(adapter, lambda t: t.clear())
    refused(IrqError, adapter, "holds no tensor")
