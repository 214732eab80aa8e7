"""Modules and tensors whose names differ, classes that nobody knows, layers that are no linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.artifact.adapter import open_adapter
from irq_convert.artifact.contents import open_artifact
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import model_names
from irq_convert.jobs.export.export import export
from irq_convert.jobs.merge.match import match
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions
from tests.folders import read_tensors

from .make import Q0, change_weights, exact_delta, linear_shapes, make_artifact, write_adapter

LAYERS = MergeOptions(check=Check.LAYERS)


def shortened(artifact: Path) -> dict[str, tuple[int, int, int | None]]:
    """Modules as a `LlamaModel` names them, without the prefix that the files have."""
    return {name.removeprefix("model."): v for name, v in linear_shapes(artifact).items()}


def test_a_checkpoint_whose_names_the_class_changes(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "art", architectures=["LlamaModel"])
    adapter = write_adapter(tmp_path / "adapter", artifact, shortened(artifact))
    opened = open_artifact(artifact)
    found = match(opened, open_adapter(adapter))
    assert found.layers[f"{Q0}.weight"].layer.module == Q0.removeprefix("model.")
    merge(artifact, adapter, tmp_path / "out", LAYERS)
    export(artifact, tmp_path / "base", to="dense")
    base, merged = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    for module, (_, cols, _) in shortened(artifact).items():
        if module.rsplit(".", 1)[-1] not in ("q_proj", "v_proj", "down_proj", "gate_proj"):
            continue
        wanted = base[f"model.{module}.weight"] + exact_delta(adapter, module, cols)
        assert torch.allclose(merged[f"model.{module}.weight"].double(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["NobodyKnowsThis"], "model_type": "of my own"},
        {"architectures": None, "model_type": "of my own"},
        {"hidden_size": "no number"},
    ],
)
def test_a_class_that_cannot_be_asked(tmp_path: Path, config: dict[str, Any]) -> None:
    artifact = make_artifact(tmp_path / "art", **config)
    names = model_names(open_artifact(artifact))
    assert not names.known
    assert Q0 in names.linears
    adapter = write_adapter(tmp_path / "adapter", artifact)
    report = merge(artifact, adapter, tmp_path / "out")
    assert len(report.layers) == 8
    assert report.logits.difference is None
    assert report.logits.reason
    other = write_adapter(tmp_path / "other", artifact, shortened(artifact))
    with pytest.raises(IrqError, match="is for layers"):
        merge(artifact, other, tmp_path / "no", LAYERS)


def test_the_class_tells_linears_and_ties(artifact: Path) -> None:
    names = model_names(open_artifact(artifact))
    assert names.known
    assert Q0 in names.linears
    assert "lm_head" in names.linears
    assert "model.embed_tokens" not in names.linears
    assert names.kinds["model.embed_tokens"] == "Embedding"
    assert not names.tied


def test_a_layer_that_is_no_linear(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter",
        artifact,
        linear_shapes(artifact) | {"model.embed_tokens": (80, 96, None)},
        target_modules=["q_proj", "embed_tokens"],
    )
    with pytest.raises(IrqError, match="a module Embedding as a linear layer: only linear"):
        merge(artifact, adapter, tmp_path / "out", LAYERS)


def test_the_head_is_merged_like_any_linear(artifact: Path, tmp_path: Path) -> None:
    shapes = linear_shapes(artifact) | {"lm_head": (80, 96, None)}
    adapter = write_adapter(
        tmp_path / "adapter", artifact, shapes, target_modules=["q_proj", "lm_head"]
    )
    report = merge(artifact, adapter, tmp_path / "out", LAYERS)
    assert "lm_head.weight" in {layer.tensor for layer in report.layers}
    before, after = read_tensors(artifact), read_tensors(tmp_path / "out")
    wanted = before["lm_head.weight"] + exact_delta(adapter, "lm_head", 96)
    assert torch.allclose(after["lm_head.weight"].double(), wanted, atol=1e-6)
    change_weights(adapter, lambda t: [t.pop(k) for k in list(t) if "lm_head" in k])
    with pytest.raises(IrqError, match="target_modules names lm_head"):
        merge(artifact, adapter, tmp_path / "no", LAYERS)
