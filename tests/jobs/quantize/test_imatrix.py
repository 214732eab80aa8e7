"""`--importance` with llama.cpp's imatrix, in both forms: the same bytes as with a file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irq_convert.artifact.importance import Importance, read_importance, write_importance
from irq_convert.artifact.manifest import fingerprint, read_manifest
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.quantize import quantize
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.artifact.imatrix_files import LLAMA_CPP, llama_cpp_values, write_gguf, write_list
from tests.folders import listing
from tests.tiny import LLAMA, llama_tensors, write_source

from .test_importance import Notes, Values, make_importance


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    make_importance(source, tmp_path / "i.safetensors")
    return tmp_path / "i.safetensors"


@pytest.mark.parametrize("write", [write_list, write_gguf])
def test_an_imatrix_gives_what_our_own_file_gives(
    tmp_path: Path, source: Path, file: Path, write: Any
) -> None:
    values = read_importance(file).values
    notes = Notes()
    path = write(
        tmp_path / "imatrix", llama_cpp_values(values) | {"output.weight": np.ones((1, 96))}
    )
    quantize(source, tmp_path / "own", importance=file)
    quantize(source, tmp_path / "theirs", importance=path, progress=notes)
    assert notes.lines == []
    one, other = (listing(tmp_path / name) for name in ("own", "theirs"))
    assert one["model.safetensors"] == other["model.safetensors"]
    record = read_manifest(tmp_path / "theirs")["importance"]
    assert (record["kind"], record["file"], record["text"]) == ("imatrix", "imatrix", "wiki.txt")
    assert record["tokens"] == (None if write is write_list else 4096)


@pytest.mark.parametrize("name", ["Mixtral", "Mixtral, fused"])
@pytest.mark.parametrize("write", [write_list, write_gguf])
def test_experts_of_an_imatrix(tmp_path: Path, name: str, write: Any) -> None:
    source = write_checkpoint(BY_NAME[name], tmp_path / "source")
    random = np.random.default_rng(0)
    own: Values = {}
    theirs: Values = {}
    for layer in range(2):
        top = f"model.layers.{layer}"
        for module, called in list(LLAMA_CPP.items())[:4]:
            own[f"{top}.{module}.weight"] = np.exp(random.normal(0, 3, 32))
            theirs[f"blk.{layer}.{called}.weight"] = own[f"{top}.{module}.weight"][None]
        up, down = (np.exp(random.normal(0, 3, (4, cols))) for cols in (32, 56))
        for part, values in (("gate", up), ("up", up), ("down", down)):
            theirs[f"blk.{layer}.ffn_{part}_exps.weight"] = values
        if name == "Mixtral":
            for part, values in (("w1", up), ("w3", up), ("w2", down)):
                for expert in range(4):
                    key = f"{top}.block_sparse_moe.experts.{expert}.{part}.weight"
                    own[key] = values[expert]
        else:
            own[f"{top}.mlp.experts.gate_up_proj"] = up
            own[f"{top}.mlp.experts.down_proj"] = down
    told = {"model": "m", "revision": None}
    told["tensors_sha256"] = fingerprint(open_checkpoint(source).tensors.values())
    write_importance(tmp_path / "own.safetensors", Importance(own, "t", 1, 1, "", told))
    write(tmp_path / "imatrix", theirs)
    for file in ("own.safetensors", "imatrix"):
        quantize(source, tmp_path / f"out-{file}", importance=tmp_path / file, block_size=16)
    one, other = (listing(tmp_path / f"out-{file}") for file in ("own.safetensors", "imatrix"))
    assert one["model.safetensors"] == other["model.safetensors"]


def test_an_imatrix_of_another_model(tmp_path: Path, source: Path, file: Path) -> None:
    values = llama_cpp_values(read_importance(file).values)
    up = values.pop("blk.0.ffn_up.weight")
    short = write_gguf(tmp_path / "short", {**values, "blk.0.ffn_gate.weight": up[:, :-1]})
    with pytest.raises(UsageError, match=r"has importance 95 numbers as blk\.0\.ffn_gate"):
        quantize(source, tmp_path / "out", importance=short)
    values = {name: own for name, own in values.items() if "blk.1.attn_output" not in name}
    less = write_list(tmp_path / "less", values | {"blk.7.attn_q.weight": up})
    with pytest.raises(UsageError, match=r"lacks 1 of the 14 .* model\.layers\.1\.self_attn\.o_p"):
        quantize(source, tmp_path / "out", importance=less)
    notes = Notes()
    estimate_quantize(
        source, tmp_path / "out", importance=less, keep=("1.self_attn.o_proj",), progress=notes
    )
    assert notes.lines == [f"{less}: 1 names in it are not used, the first is blk.7.attn_q.weight"]


def test_an_imatrix_for_a_model_without_names(tmp_path: Path, file: Path) -> None:
    config = {**LLAMA, "architectures": ["OtherForCausalLM"], "model_type": "of my own"}
    source = write_source(tmp_path / "other", llama_tensors(torch.float32), config)
    path = write_list(tmp_path / "imatrix", {"blk.0.attn_q.weight": np.ones((1, 96))})
    with pytest.raises(UsageError, match="a model of type 'of my own' are not known"):
        quantize(source, tmp_path / "out", importance=path)
