"""Damaged or foreign artifacts: one line that names the tensor, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError
from tests.folders import change_config, change_tensors
from tests.tiny import tiny_model

from .artifact import write_artifact

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


def refusal(folder: Path) -> str:
    with pytest.raises(IrqError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(f"{Q}_tau_grid"), [f"hold no {Q}_tau_grid", "as F32 [1, 2]"]),
        (lambda t: t.pop(f"{Q}_scale"), [f"hold no {Q}_scale,", "as U8 [96, 2]"]),
        (lambda t: t.pop(Q), [f"hold no {Q},", "as U8 [96, 48]"]),
        (
            lambda t: t.update({f"{Q}_tau": t[f"{Q}_tau"][:-1].clone()}),
            [f"{Q}_tau is U8 [95, 2]", "needs U8 [96, 2]", "model.safetensors"],
        ),
        (
            lambda t: t.update({f"{Q}_scale": t[f"{Q}_scale"].half()}),
            [f"{Q}_scale is F16 [96, 2]", "needs U8 [96, 2]"],
        ),
        (
            lambda t: t.update({f"{DOWN}_tau_grid": t[f"{DOWN}_tau_grid"].bfloat16()}),
            [f"{DOWN}_tau_grid is BF16", "needs F32"],
        ),
        (
            lambda t: t.update({Q: t[Q][:, :-1].clone()}),
            [f"{Q} is U8 [96, 47]", "[96, 96]", "needs U8 [96, 48]"],
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)],
            [f"hold no {Q}, which the model needs"],
        ),
        (
            lambda t: (
                [t.pop(name) for name in list(t) if name.startswith(Q)],
                t.update({Q: torch.randn(96, 96)}),
            ),
            [f"{Q} is F32 [96, 96] without {Q}_scale", "modules_to_not_convert does not name"],
        ),
        (
            lambda t: t.update(
                {
                    "model.extra.weight" + n.removeprefix(Q): t[n].clone()
                    for n in list(t)
                    if n.startswith(Q)
                }
            ),
            ["quantized tensor model.extra.weight [96, 48] belongs to no linear layer"],
        ),
    ],
)
def test_damaged_files(tmp_path: Path, change: Change, parts: list[str]) -> None:
    write_artifact(tmp_path, tiny_model())
    change_tensors(tmp_path, change)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.update(codebook="nf3", bits=3), ["q_proj.weight is U8", "nf3"]),
        (lambda c: c.update(block_size=32), ["_scale is U8", "blocks of 32"]),
        (lambda c: c.update(tau_dtype="float16"), ["_tau is U8 [96, 2]", "needs F16 [96, 2]"]),
        (lambda c: c.update(overrides={Q[:-7]: {"columns": 95}}), ["95 columns", "has 96"]),
        (
            lambda c: c["modules_to_not_convert"].append(Q[:-7]),
            [f"{Q}_scale is in the files, but modules_to_not_convert names {Q[:-7]}"],
        ),
        (lambda c: c.update(modules_to_not_convert=[]), ["lm_head.weight is F32 [80, 96] without"]),
        (lambda c: c.update(format_version=2), ["format version 2", "upgrade"]),
        (lambda c: c.update(surprise=1), ["unknown key 'surprise'"]),
        (lambda c: c.pop("group_size"), ["lacks 'group_size'"]),
    ],
)
def test_contradicting_configuration(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]
) -> None:
    write_artifact(tmp_path, tiny_model())
    change_config(tmp_path, change)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message


def test_superfluous_grid(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_tau")]:
            tensors[name] = tensors[name].half()

    change_tensors(tmp_path, widen)
    change_config(tmp_path, lambda raw: raw.update(tau_dtype="float16"))
    assert f"{Q}_tau_grid is in the files" in refusal(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    write_artifact(tmp_path, tiny_model())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "truncated" in refusal(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    write_artifact(tmp_path, tiny_model(), shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(second)
    tensors["model.norm.weight"] = torch.ones(96)
    tensors[Q] = torch.zeros(96, 48, dtype=torch.uint8)
    save_file(tensors, second, {"format": "pt"})
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())
    message = refusal(tmp_path)
    assert "is in both" in message
    assert first.name in message


def test_columns_that_the_width_does_not_tell(tmp_path: Path) -> None:
    """A width of 4n + 1 at 2 bits or 4 bits, odd, needs `columns`; without it loading stops."""
    sizes = {"hidden_size": 32, "intermediate_size": 67, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 40}
    name = "model.layers.0.mlp.down_proj"
    fmt = {name: ModuleFormat("nf4", 64, columns=67)}
    dense = write_artifact(tmp_path, tiny_model(**sizes), overrides=fmt)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = model.get_submodule(name)
    assert torch.equal(layer.dequantize(), dense[f"{name}.weight"])
    change_config(tmp_path, lambda raw: raw.update(overrides={}))
    assert "has 68 columns by quantization_config, the layer has 67" in refusal(tmp_path)
