"""Sources that transformers does not read as they lie, loaded for `eval` as their dense twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.causal_lm import load_causal_lm, load_config, load_tokenizer
from tests.checkpoint.meta_files import MetaModel, write_meta
from tests.checkpoint.narrow import BLOCKS, decoded, in_fp8
from tests.checkpoint.test_decoded_values import DEEPSEEK, saved
from tests.folders import assert_one_line
from tests.jobs.quantize.test_decoded_sources import fp8, modelopt, mxfp4
from tests.jobs.quantize.test_source_names import pickle
from tests.tiny import write_source

from .test_meta_tokenizer import train_pieces

MODEL = MetaModel(parts=2, kv_heads=4, vocab=340)


def meta(folder: Path) -> Path:
    write_meta(folder, MODEL)
    train_pieces(folder / "tokenizer.model", MODEL.vocab)
    return folder


def deepseek(folder: Path) -> Path:
    tensors, config = saved(folder.with_name("dense"), "deepseek_v3", "bfloat16", **DEEPSEEK)
    config["quantization_config"] = BLOCKS
    return write_source(folder, in_fp8(tensors), config, shards=3, files={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [meta, pickle, fp8, modelopt, deepseek, mxfp4])
def test_it_is_the_dense_model(
    tmp_path: Path, make: Callable[[Path], Path], dtype: torch.dtype
) -> None:
    source = make(tmp_path / "m")
    twin = write_source(tmp_path / "twin", decoded(source), open_checkpoint(source).config)
    found, wanted = load_causal_lm(source, dtype), load_causal_lm(twin, dtype)
    assert type(found) is type(wanted)
    states: list[dict[str, Any]] = [model.state_dict() for model in (found, wanted)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert tensor.dtype == states[1][name].dtype, name
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_the_tokenizer_of_metas_files_is_made(tmp_path: Path) -> None:
    source = meta(tmp_path / "m")
    assert load_tokenizer(source)("The cat")["input_ids"][0] == 1
    assert [path.name for path in source.glob("*.json")] == ["params.json"]


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    scaled = {"rope_theta": 500000.0, "use_scaled_rope": True}
    write_meta(tmp_path / "m", MetaModel(more=scaled))
    with pytest.raises(UsageError) as refused:
        load_config(tmp_path / "m")
    assert_one_line(str(refused.value), str(tmp_path / "m"), "which LLaMA", "config.json")


def test_a_damaged_source_is_one_line(tmp_path: Path) -> None:
    source = meta(tmp_path / "m")
    (source / "consolidated.01.pth").unlink()
    for load in (load_config, load_causal_lm):
        with pytest.raises(IrqError) as error:
            load(source)
        assert_one_line(str(error.value), "consolidated.01.pth is missing")
