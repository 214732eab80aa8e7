"""`verify` counts the codes again: an entropy in the manifest that they do not have is found.

Each manifest is sealed anew after it was changed, its totals with it, so that nothing but counting
can tell.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irq_convert.artifact import values
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.recount import recount_entropy
from irq_convert.artifact.verify import verify_artifact
from irq_convert.core.search_plan import entropy_shift, entropy_table
from irq_convert.core.spec import BLOCK_SIZES, QuantSpec
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import assert_one_line, read_json
from tests.jobs.merge.make import write_adapter
from tests.tiny import tiny_model

from .helpers import DOWN0, change_manifest, flip, make_artifact, reseal


def noted(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "irq_manifest.json")["tensors"]
    return found


def assert_exact(folder: Path) -> None:
    """Every entropy counted again is the manifest's to the last bit."""
    entries = noted(folder)
    for tensor in open_artifact(folder).quantized:
        assert recount_entropy(tensor) == entries[tensor.name]["entropy"], tensor.name
    assert verify_artifact(folder).ok


def change_entropy(folder: Path, name: str, by: float) -> None:
    """Change one, and the mean of all of them with it."""
    weights = {tensor.name: tensor.weights for tensor in open_artifact(folder).quantized}

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][name]["entropy"] += by
        mean = sum(manifest["tensors"][n]["entropy"] * w for n, w in weights.items())
        manifest["totals"]["entropy"] = mean / sum(weights.values())

    change_manifest(folder, change)


@pytest.mark.parametrize("by", [1e-9, -0.25, 0.001])
def test_a_changed_entropy_is_found(by: float, artifact: Path) -> None:
    change_entropy(artifact, DOWN0, by)
    (line,) = verify_artifact(artifact).failures
    assert_one_line(line, f"tensors[{DOWN0}] says entropy", "its codes have")


def test_changed_codes_are_found(artifact: Path) -> None:
    """Another legal code is another entropy, where it is another count."""
    flip(artifact, DOWN0)
    reseal(artifact)
    (line,) = verify_artifact(artifact).failures
    assert_one_line(line, f"tensors[{DOWN0}] says entropy")


def test_another_writer_may_round_logarithms(artifact: Path) -> None:
    change_entropy(artifact, DOWN0, 1e-7)
    change_manifest(artifact, lambda manifest: manifest.update(producer="another 1"))
    assert verify_artifact(artifact).ok
    change_entropy(artifact, DOWN0, 1e-3)
    assert not verify_artifact(artifact).ok


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("codebook", "zero_point"), [("nf3", "float"), ("int4", "integer")])
def test_every_block_size(
    block_size: int, codebook: str, zero_point: str, source: Path, tmp_path: Path
) -> None:
    """Widths of 64 and 172: blocks that are short, and rows that are one short block."""
    spec = QuantSpec(codebook, block_size, zero_point=zero_point)
    assert_exact(make_artifact(source, tmp_path / "art", QuantizeOptions(spec, threads=1)))


def test_tiles_do_not_show(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "TILE_WEIGHTS", 1)
    assert_exact(pristine)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_oss"])
def test_transposed_layers_and_stacks_of_experts(family: str, tmp_path: Path) -> None:
    moe = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2} if family == "gpt2" else moe
    tiny_model(family, **{**sizes, "moe_intermediate_size": 48}).save_pretrained(tmp_path / "src")
    spec = QuantSpec("nf4", 32)
    quantize(str(tmp_path / "src"), tmp_path / "art", QuantizeOptions(spec, threads=1))
    assert any(
        tensor.format.transposed or len(tensor.leading) > 1 or "experts" in tensor.name
        for tensor in open_artifact(tmp_path / "art").quantized
    )
    assert_exact(tmp_path / "art")


@pytest.mark.parametrize("kind", ["block", "plain"])
def test_merged_artifacts(kind: str, tiny_nf4: Path, tmp_path: Path) -> None:
    """Moved taus leave codes alone, quantizing again counts them anew."""
    adapter = write_adapter(tmp_path / "adapter", tiny_nf4, kind=kind, size=0.2)
    merge(tiny_nf4, adapter, tmp_path / "out", to="irq", min_survival=-1e9, check="none")
    assert_exact(tmp_path / "out")


def test_the_table_is_the_same_on_every_machine() -> None:
    """No logarithm is so near a half that its last bit decides how it is rounded."""
    for block_size in BLOCK_SIZES:
        counts = np.arange(block_size + 1, dtype=np.float64)
        exact = counts * np.log2(np.maximum(counts, 1.0)) * 2.0 ** entropy_shift(block_size)
        away = np.abs(exact - np.floor(exact) - 0.5)
        assert away.min() > 8 * np.spacing(exact.max())
        wanted = [round(c * math.log2(c) * 2 ** entropy_shift(block_size)) for c in (1, 3, 7)]
        assert entropy_table(block_size)[[1, 3, 7]].tolist() == wanted


def test_memory_is_a_tiles(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda t: (seen.append(t.numel()), real(t))[1])
    monkeypatch.setattr(values, "TILE_WEIGHTS", 4096)
    for tensor in open_artifact(pristine).quantized:
        recount_entropy(tensor)
    assert max(seen) <= 4096 * 16
