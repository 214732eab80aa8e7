"""Packed embeddings in other engines' layouts, by these engines' own readers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import irq_convert
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from tests.folders import read_json, read_tensors
from tests.paths import DEMO
from tests.tiny import tiny_model

from .compare import decoded, our_logits, tokens

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with embeddings in int4, which all engines hold, and a tokenizer."""
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_model(
        spread={"norm": (1.0, 0.1), "": (0.0, 0.08)},
        intermediate_size=160,
        vocab_size=1024,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=request.param,
    )
    source.save_pretrained(folder / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / "source" / name)
    irq_convert.quantize(
        folder / "source", folder / "a", codebook="int4", zero_point="integer", block_size=32,
        include_embeddings=True, threads=1,
    )  # fmt: skip
    return folder / "a"


def is_tied(artifact: Path) -> bool:
    found = read_json(artifact / "config.json")["tie_word_embeddings"]
    assert isinstance(found, bool)
    return found


def assert_close(found: torch.Tensor, artifact: Path) -> None:
    wanted = our_logits(artifact)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 4e-3


def test_mlx_holds_them(packed: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    load_model = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed").load_model
    report = export(packed, tmp_path / "out", ExportOptions("mlx", dtype="float32"))
    assert max(each.relative_error for each in report.differences) < 1e-12
    model, _ = load_model(tmp_path / "out")
    assert type(model.model.embed_tokens).__name__ == "QuantizedEmbedding"
    assert hasattr(model, "lm_head") is not is_tied(packed)
    found = model(mx.array(tokens().numpy())).astype(mx.float32).tolist()
    assert_close(torch.tensor(found)[0], packed)


def test_gguf_holds_them(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    report = export(packed, tmp_path / "out", ExportOptions("gguf"))
    assert {storage.stored for storage in report.storages} == {"Q4_1"}
    (file,) = (tmp_path / "out").glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    with torch.no_grad():
        assert_close(model(tokens()).logits[0], packed)


def test_compressed_tensors_keeps_them_dense(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    report = export(packed, tmp_path / "out", ExportOptions("compressed-tensors"))
    assert any(storage.why == "it is an embedding or a head" for storage in report.storages)
    found = read_tensors(tmp_path / "out")
    for name in (TABLE,) if is_tied(packed) else (TABLE, HEAD):
        assert torch.equal(found[name], decoded(packed)[name])
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        assert_close(model(tokens()).logits[0], packed)


def test_dense_has_the_values_that_a_second_reader_finds(packed: Path, tmp_path: Path) -> None:
    export(packed, tmp_path / "out", ExportOptions("dense", dtype="float32"))
    found = read_tensors(tmp_path / "out")
    wanted = decoded(packed)
    assert (HEAD in wanted) is not is_tied(packed)
    assert TABLE in wanted
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is is_tied(packed)
