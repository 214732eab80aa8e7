"""How a source's weights are stored is told everywhere: manifest, reports, dry run, inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import irq_convert
from irq_convert.artifact.manifest import stored_as
from irq_convert.cli.main import app
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.progress import Progress
from tests.checkpoint.meta_files import MetaModel, write_meta
from tests.checkpoint.narrow import BLOCKS, CHANNELS, MODELOPT, in_fp8, linear_names, to_fp8
from tests.folders import read_json
from tests.tiny import LLAMA, llama_tensors, write_source

from .test_decoded_sources import mxfp4


def plain(folder: Path) -> Path:
    return write_source(folder, files={})


def fp8(folder: Path, setting: Any, block: tuple[int, int]) -> Path:
    tensors = in_fp8(llama_tensors(torch.bfloat16), block)
    config = LLAMA | {"dtype": "bfloat16", "quantization_config": setting}
    return write_source(folder, tensors, config, shards=2, files={})


def of_blocks(folder: Path) -> Path:
    return fp8(folder, BLOCKS, (16, 8))


def of_blocks_as_large_as_the_smallest(folder: Path) -> Path:
    """k and v are one block each, which alone would be a scale of the tensor."""
    return fp8(folder, BLOCKS | {"weight_block_size": [32, 96]}, (32, 96))


def of_channels(folder: Path) -> Path:
    return renamed(folder, CHANNELS, lambda rows, cols: (1, cols))


def of_tensors(folder: Path) -> Path:
    return renamed(folder, MODELOPT, lambda rows, cols: (rows, cols))


def renamed(folder: Path, setting: Any, block: Callable[[int, int], tuple[int, int]]) -> Path:
    tensors = llama_tensors(torch.bfloat16)
    for name in linear_names(tensors):
        tensors[name], scale = to_fp8(tensors[name], block(*tensors[name].shape))
        tensors[f"{name}_scale"] = scale.reshape(()) if scale.numel() == 1 else scale
    config = LLAMA | {"dtype": "bfloat16", "quantization_config": setting}
    return write_source(folder, tensors, config, files={})


def pickle(folder: Path) -> Path:
    write_source(folder, {}, files={})
    (folder / "model.safetensors").unlink()
    torch.save(llama_tensors(), folder / "pytorch_model.bin")
    return folder


def pickled_fp8(folder: Path) -> Path:
    pickle(folder)
    torch.save(in_fp8(llama_tensors()), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": BLOCKS}))
    return folder


def meta(folder: Path) -> Path:
    write_meta(folder, MetaModel(parts=2, kv_heads=4))
    return folder


SOURCES: list[tuple[Callable[[Path], Path], dict[str, str]]] = [
    (plain, {}),
    (of_blocks, {"encoding": "fp8-block"}),
    (of_blocks_as_large_as_the_smallest, {"encoding": "fp8-block"}),
    (of_channels, {"encoding": "fp8-channel"}),
    (of_tensors, {"encoding": "fp8-tensor"}),
    (mxfp4, {"encoding": "mxfp4"}),
    (pickle, {"format": "pickle"}),
    (pickled_fp8, {"format": "pickle", "encoding": "fp8-block"}),
    (meta, {"format": "meta"}),
]
SUFFIXES = (".safetensors", ".bin", ".pth")


class Bytes(Progress):
    """What a bar would show."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def phase(self, name: str, tensors: int, nbytes: int) -> None:
        self.total, self.done = nbytes, 0

    def advance(self, nbytes: int, finished: int) -> None:
        self.done += nbytes


@pytest.mark.slow
@pytest.mark.parametrize(("make", "told"), SOURCES)
def test_each_format_is_named_and_weighed_by_its_files(
    tmp_path: Path, make: Callable[[Path], Path], told: dict[str, str]
) -> None:
    source, out, seen = make(tmp_path / "m"), tmp_path / "out", Bytes()
    dry = estimate_quantize(source, out)
    report = irq_convert.quantize(source, out, progress=seen)
    assert 0 < seen.total == seen.done
    found = read_json(out / "irq_manifest.json")["source"]
    assert {key: found[key] for key in ("format", "encoding") if key in found} == told
    words = ", ".join(told.values()) or "safetensors"
    assert report.source_format == dry.source_format == stored_as(found) == words
    files = [path for path in source.iterdir() if path.suffix in SUFFIXES]
    assert report.bytes_in == dry.bytes_in == sum(path.stat().st_size for path in files)
    again = Bytes()
    assert irq_convert.verify(out, source, progress=again).ok
    assert again.total == again.done


@pytest.mark.parametrize(("make", "words"), [(of_blocks, "fp8-block"), (plain, "safetensors")])
def test_the_commands_show_it(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    source, out = make(tmp_path / "m"), tmp_path / "out"
    run = CliRunner().invoke
    for command in (
        ["quantize", str(source), str(out), "--dry-run"],
        ["quantize", str(source), str(out)],
        ["inspect", str(out)],
    ):
        result = run(app, command)
        assert result.exit_code == 0, result
        assert words in result.stdout, command
    shown = json.loads(run(app, ["inspect", str(out), "--json"]).stdout)
    assert stored_as(shown["source"]) == words
