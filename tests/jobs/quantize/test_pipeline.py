"""One shard as a stream: the bytes are those of the whole tensor, however it is cut."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from irq_convert.checkpoint import planned_folder
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.errors import IrqError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.pipeline import quantize_shard
from irq_convert.jobs.quantize.plan import QuantizePlan, plan_quantize
from irq_convert.progress import Progress
from tests.tiny import UNKNOWN, write_source

SHAPES = {"layers.0.a": (300, 172), "layers.0.b": (520, 64), "layers.1.c": (64, 1100)}


class Heard(Progress):
    """Notes what a person would have been told."""

    def __init__(self) -> None:
        self.bytes = self.finished = 0

    def advance(self, nbytes: int, finished: bool) -> None:
        self.bytes += nbytes
        self.finished += finished


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    } | {"embed.weight": torch.randn(90, 64, generator=generator), "steps": torch.tensor(3)}


def plan_of(
    folder: Path, tensors: dict[str, torch.Tensor], options: QuantizeOptions
) -> QuantizePlan:
    return plan_quantize(open_checkpoint(write_source(folder, tensors, UNKNOWN)), options)


@pytest.mark.slow
@pytest.mark.parametrize("tile_weights", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "spec"),
    [
        (torch.float32, QuantSpec("nf3")),
        (torch.bfloat16, QuantSpec("int2", 32)),
        (torch.float16, QuantSpec("nf4", 16, "mse")),
        (torch.float64, QuantSpec("nf2", 128, "entropy", 2)),
    ],
    ids=["float32", "bfloat16", "float16", "float64"],
)
def test_bytes_are_those_of_the_whole_tensor(
    tmp_path: Path, dtype: torch.dtype, spec: QuantSpec, threads: int, tile_weights: int
) -> None:
    tensors = tensors_of(dtype)
    options = QuantizeOptions(spec, threads=threads, tile_weights=tile_weights)
    plan = plan_of(tmp_path / "m", tensors, options)
    heard = Heard()
    stats = quantize_shard(plan.folder.shards[0], tmp_path, options, heard)
    stored = load_file(tmp_path / "model.safetensors")
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in SHAPES:
            expected[name] = tensor
            continue
        whole, seen = quantize_with_stats(tensor, spec)
        expected |= {name + suffix: part for suffix, part in whole.parts().items()}
        assert_same(stats.pop(name), seen)
    assert not stats
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    assert heard.bytes == plan.checkpoint.nbytes
    assert heard.finished == len(tensors)


def assert_same(tiles: TensorStats, whole: TensorStats) -> None:
    assert tiles.shape == whole.shape
    assert (tiles.plain, tiles.stored) == (whole.plain, whole.stored)
    assert tiles.energies.tobytes() == whole.energies.tobytes()
    assert tiles.entropy == whole.entropy
    assert tiles.relative_error == whole.relative_error


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e300])
@pytest.mark.parametrize("tile_weights", [1, 1 << 30])
def test_weights_that_no_block_holds_name_the_tensor(
    tmp_path: Path, bad: float, tile_weights: int
) -> None:
    tensors = tensors_of(torch.float64)
    tensors["layers.1.c.weight"][63, 1099] = bad
    options = QuantizeOptions(tile_weights=tile_weights)
    plan = plan_of(tmp_path / "m", tensors, options)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IrqError, match=r"layers\.1\.c\.weight .*--keep"):
        quantize_shard(plan.folder.shards[0], out, options, Progress())
    assert not list(out.iterdir())
    assert not [
        t
        for t in threading.enumerate()
        if t.name.startswith(("irq-reader", "irq-writer", "irq-checksum"))
    ]


def test_bad_numbers_in_copied_tensors_are_copied(tmp_path: Path) -> None:
    tensors = tensors_of(torch.float32)
    tensors["embed.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    plan = plan_of(tmp_path / "m", tensors, QuantizeOptions())
    quantize_shard(plan.folder.shards[0], tmp_path, QuantizeOptions(), Progress())
    stored = load_file(tmp_path / "model.safetensors")["embed.weight"]
    assert stored.numpy().tobytes() == tensors["embed.weight"].numpy().tobytes()


def test_copies_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_folder, "COPY_CHUNK", 1000)
    tensors = tensors_of(torch.float32)
    plan = plan_of(tmp_path / "m", tensors, QuantizeOptions())
    heard = Heard()
    quantize_shard(plan.folder.shards[0], tmp_path, QuantizeOptions(), heard)
    stored = load_file(tmp_path / "model.safetensors")["embed.weight"]
    assert torch.equal(stored, tensors["embed.weight"])
    assert heard.finished == len(tensors)


def cut(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40_000])


def vanish(source: Path) -> None:
    (source / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, vanish])
def test_a_source_that_changes_meanwhile(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    plan = plan_of(tmp_path / "m", tensors_of(torch.float32), QuantizeOptions())
    damage(tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IrqError, match=r"model\.safetensors"):
        quantize_shard(plan.folder.shards[0], out, QuantizeOptions(), Progress())
    assert not list(out.iterdir())


def test_the_tile_of_a_huge_row_is_one_group_of_rows(tmp_path: Path) -> None:
    """Blocks a row and blocks a group share no factor: a tile is 256 rows and never less."""
    tensor = torch.randn(300, 80, generator=torch.Generator().manual_seed(0))
    options = QuantizeOptions(QuantSpec("nf4", 16), tile_weights=1)  # 5 blocks a row
    plan = plan_of(tmp_path / "m", {"layers.0.w.weight": tensor}, options)
    assert plan.folder.tensors[0].shape.tile_rows(1) == 256
    quantize_shard(plan.folder.shards[0], tmp_path, options, Progress())
    stored = load_file(tmp_path / "model.safetensors")
    for suffix, part in quantize_tensor(tensor, options.spec).parts().items():
        assert torch.equal(stored[f"layers.0.w.weight{suffix}"], part)
