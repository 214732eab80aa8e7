"""Where config.json and the files differ, the files are believed, as transformers believes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf", reason="the package gguf is not installed")

from transformers import AutoModelForCausalLM

from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.head import head_differs
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.errors import UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from tests.jobs.export.gguf.make import (
    change_config,
    export_gguf,
    make_artifact,
    readable_model,
)

IDS = torch.tensor([[0, 5, 90, 700, 33, 512, 8, 1023, 64, 2, 19]])


@pytest.fixture
def called_tied(tmp_path: Path) -> Path:
    """A head of its own, which config.json calls tied."""
    make_artifact(tmp_path / "a", readable_model("llama", tied=False))
    change_config(tmp_path / "a", tie_word_embeddings=True)
    return tmp_path / "a"


def twin(artifact: Path) -> torch.Tensor:
    """Logits of the dense export in stock transformers."""
    out = artifact.with_name("twin")
    export(artifact, out, ExportOptions("dense", dtype="float32"))
    assert read_json_object(out / "config.json")["tie_word_embeddings"] is False
    with torch.no_grad():
        return torch.as_tensor(AutoModelForCausalLM.from_pretrained(out).eval()(IDS).logits[0])


def test_gguf_keeps_a_head_that_only_a_flag_calls_tied(called_tied: Path, tmp_path: Path) -> None:
    file, _ = export_gguf(called_tied, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    with torch.no_grad():
        found = theirs(IDS).logits[0]
    expected = twin(called_tied)
    assert float((found - expected).abs().max() / expected.abs().max()) < 4e-3


def test_mlx_keeps_a_head_that_only_a_flag_calls_tied(called_tied: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    load_model = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed").load_model
    export(called_tied, tmp_path / "out", ExportOptions("mlx", dtype="float32"))
    model, _ = load_model(tmp_path / "out")
    found = torch.tensor(model(mx.array(IDS.numpy())).astype(mx.float32).tolist())[0]
    expected = twin(called_tied)
    assert float((found - expected).abs().max() / expected.abs().max()) < 4e-3


def test_a_head_of_the_same_values_stays_tied(called_tied: Path, tmp_path: Path) -> None:
    for path in called_tied.glob("*.safetensors"):
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, {"format": "pt"})
    assert not head_differs(open_artifact(called_tied))
    export(called_tied, tmp_path / "out", ExportOptions("dense"))
    assert read_json_object(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_biases_that_the_class_does_not_have(tmp_path: Path, target: str) -> None:
    """transformers leaves them out, so the other engine must not add them."""
    make_artifact(tmp_path / "a", readable_model("llama", attention_bias=True))
    change_config(tmp_path / "a", attention_bias=False)
    with pytest.raises(UsageError, match=r"k_proj\.bias: config\.json gives k_proj no bias"):
        export(tmp_path / "a", tmp_path / "out", ExportOptions(target))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_biases_that_the_class_has_and_the_files_lack(tmp_path: Path, target: str) -> None:
    make_artifact(tmp_path / "a", readable_model("llama"))
    change_config(tmp_path / "a", attention_bias=True)
    with pytest.raises(UsageError, match=r"proj\.bias is missing: config\.json gives"):
        export(tmp_path / "a", tmp_path / "out", ExportOptions(target))


def test_names_that_mlx_lm_does_not_know(tmp_path: Path) -> None:
    model = readable_model("llama")
    make_artifact(tmp_path / "a", model.model)
    with pytest.raises(UsageError, match=r"mlx-lm knows llama tensors as model\.\* and lm_head"):
        export(tmp_path / "a", tmp_path / "out", ExportOptions("mlx"))
    assert not (tmp_path / "out").exists()
