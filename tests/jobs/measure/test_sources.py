"""Sources in other formats are measured as the dense models that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from irq_convert.artifact.importance import read_importance
from irq_convert.artifact.manifest import read_manifest
from irq_convert.errors import UsageError
from irq_convert.jobs.measure.measure import estimate_measure, measure
from irq_convert.jobs.quantize.quantize import quantize
from tests.checkpoint.meta_files import MetaModel, converted, whole_tensors, write_meta
from tests.hf.test_meta_tokenizer import train_pieces
from tests.jobs.finetune.base import write_tales

SMALL = {"tokens": 256, "window": 32, "threads": 1}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_tales(tmp_path / "tales.txt", 12)
    return tmp_path / "tales.txt"


def test_metas_files(tmp_path: Path, text: Path) -> None:
    """Against their twin in safetensors, with the tokenizer that a conversion makes."""
    model = MetaModel(parts=2, kv_heads=4, vocab=340)
    source, made, twin = (tmp_path / name for name in ("Llama-2", "made", "twin"))
    write_meta(source, model)
    train_pieces(source / "tokenizer.model", model.vocab)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    measure(source, files[0], text=text, **SMALL)
    quantize(source, made, importance=files[0])
    shutil.copytree(made, twin, ignore=shutil.ignore_patterns("model.*", "irq_*"))
    save_file(converted(whole_tensors(model), model), twin / "model.safetensors", {"format": "pt"})
    config = json.loads((twin / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    measure(twin, files[1], text=text, **SMALL)
    one, other = map(read_importance, files)
    assert one.tokens_sha256 == other.tokens_sha256
    assert one.source["format"] == "meta"
    assert one.source["tensors_sha256"] == read_manifest(made)["source"]["tensors_sha256"]
    for name, values in other.values.items():
        np.testing.assert_allclose(one.values[name], values, rtol=1e-6)


def test_a_version_that_nobody_tells_is_asked_for(tmp_path: Path, text: Path) -> None:
    write_meta(tmp_path / "13B", MetaModel())
    for job in (measure, estimate_measure):
        with pytest.raises(UsageError, match="--llama-version 1 or 2"):
            job(tmp_path / "13B", tmp_path / "out", text=text)
    assert not (tmp_path / "out").exists()
