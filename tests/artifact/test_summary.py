"""Rows of an artifact by layer, kind and tensor, and the plot of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irq_convert.artifact.contents import Artifact, open_artifact
from irq_convert.artifact.plot import plot_summary
from irq_convert.artifact.summary import (
    Row,
    kind_name,
    layer_name,
    natural_key,
    summarize,
    summarize_all,
)
from irq_convert.errors import UsageError
from tests.folders import assert_one_line

from .helpers import DOWN0, HIDDEN, LINEARS, VOCABULARY, WIDE, source_tensors

QUANTIZED = sum(rows * cols for rows, cols in LINEARS.values())


@pytest.fixture(scope="module")
def opened(pristine: Path) -> Artifact:
    return open_artifact(pristine)


def entries(artifact: Artifact) -> dict[str, dict[str, Any]]:
    assert artifact.manifest is not None
    return artifact.manifest["tensors"]


def test_layers_in_order_with_everything_else_last(opened: Artifact) -> None:
    rows = summarize(opened)
    assert [row.name for row in rows] == ["model.layers.0", "model.layers.1", "other"]
    first, _, other = rows
    assert (first.tensors, first.weights, first.quantized_weights) == (
        len(LINEARS) + 1,
        QUANTIZED + HIDDEN,
        QUANTIZED,
    )
    assert first.share == QUANTIZED / (QUANTIZED + HIDDEN)
    assert first.codebooks == ("nf3", "nf4")
    assert (other.tensors, other.quantized_weights) == (5, 0)
    assert other.weights == 2 * VOCABULARY * HIDDEN + HIDDEN + 1 + 7
    assert (other.bits_per_weight, other.entropy, other.relative_error) == (None, None, None)


@pytest.mark.parametrize("by", ["layer", "kind", "tensor"])
def test_rows_add_up_to_the_total(opened: Artifact, by: str) -> None:
    rows, total = summarize(opened, by), summarize_all(opened)
    for field in ("tensors", "weights", "quantized_weights", "bytes"):
        assert sum(getattr(row, field) for row in rows) == getattr(total, field)
    assert total.weights == sum(t.numel() for t in source_tensors().values())
    assert total.bytes == opened.checkpoint.nbytes
    assert opened.manifest is not None
    noted = opened.manifest["totals"]
    for field in ("bits_per_weight", "entropy_plain", "entropy", "relative_error"):
        assert getattr(total, field) == pytest.approx(noted[field], rel=1e-12)


def test_means_are_weighted_by_weights(opened: Artifact) -> None:
    first = summarize(opened)[0]
    for field in ("entropy_plain", "entropy", "relative_error"):
        mean = np.average(
            [entries(opened)[f"model.layers.0.{name}.weight"][field] for name in LINEARS],
            weights=[rows * cols for rows, cols in LINEARS.values()],
        )
        assert getattr(first, field) == pytest.approx(mean)


def test_kinds_gather_the_layers(opened: Artifact) -> None:
    rows = {row.name: row for row in summarize(opened, "kind")}
    assert list(rows) == ["down_proj", "q_proj", "up_proj", "v_proj", "other"]
    down = rows["down_proj"]
    assert (down.tensors, down.weights, down.share) == (2, 2 * HIDDEN * WIDE, 1.0)
    assert down.bytes == 2 * (HIDDEN * (65 + 3 + 3) + 16)
    assert down.bits_per_weight == 8 * (HIDDEN * 71 + 16) / (HIDDEN * WIDE)
    assert rows["other"].tensors == 7


def test_tensors_each_have_a_row(opened: Artifact) -> None:
    rows = {row.name: row for row in summarize(opened, "tensor")}
    assert len(rows) == 2 * len(LINEARS) + 1
    row, entry = rows[DOWN0.removesuffix(".weight")], entries(opened)[DOWN0]
    assert row.codebooks == ("nf3",)
    assert (row.entropy_plain, row.entropy) == (entry["entropy_plain"], entry["entropy"])
    assert row.relative_error == entry["relative_error"]


def test_without_a_manifest_sizes_are_still_known(artifact: Path) -> None:
    (artifact / "irq_manifest.json").unlink()
    total = summarize_all(open_artifact(artifact))
    assert total.bits_per_weight is not None
    assert (total.entropy_plain, total.entropy, total.relative_error) == (None, None, None)
    with pytest.raises(UsageError) as error:
        plot_summary(open_artifact(artifact), artifact / "plot.png")
    assert_one_line(str(error.value), "irq_manifest.json")


def test_an_unknown_grouping_is_refused(opened: Artifact) -> None:
    with pytest.raises(UsageError, match="layer, kind, tensor"):
        summarize(opened, "shard")


@pytest.mark.parametrize(
    ("tensor", "layer", "kind"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11", "q_proj"),
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers.3", "w1"),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3", "gate_up_proj"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2", "q"),
        ("h.0.attn.c_attn.weight", "h.0", "c_attn"),
        ("0.weight", "0", "0.weight"),
        ("lm_head.weight", "other", "lm_head"),
        ("model.norm2.weight", "other", "norm2"),
    ],
)
def test_names_of_layers_and_kinds(tensor: str, layer: str, kind: str) -> None:
    assert (layer_name(tensor), kind_name(tensor)) == (layer, kind)


def test_natural_order() -> None:
    names = ["other", "model.layers.10", "a.1.b", "model.layers.2", "a", "a.b"]
    assert sorted(names, key=natural_key) == [
        "a",
        "a.1.b",
        "a.b",
        "model.layers.2",
        "model.layers.10",
        "other",
    ]


def test_a_row_is_ready_for_json(opened: Artifact) -> None:
    row = summarize_all(opened)
    assert isinstance(row, Row)
    assert row.to_dict()["share"] == row.share


def test_the_plot_is_a_png_with_colours(opened: Artifact, tmp_path: Path) -> None:
    from matplotlib.image import imread

    file = tmp_path / "plot.png"
    plot_summary(opened, file)
    image = imread(file)
    assert image.shape[0] > 900
    assert image.shape[1] > 1200
    # Points as stored are blue, and those before calibration orange rings.
    for colour in ("#0072B2", "#D55E00"):
        rgb = [int(pair, 16) / 255 for pair in re.findall("[0-9A-F]{2}", colour)]
        assert (np.abs(image[:, :, :3] - rgb).max(axis=2) < 0.01).sum() > 100
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_the_plot_needs_a_png_name(opened: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        plot_summary(opened, tmp_path / "plot.svg")


def test_without_matplotlib_the_way_out_is_named(
    opened: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as error:
        plot_summary(opened, tmp_path / "plot.png")
    assert_one_line(str(error.value), "pip install 'irq-convert[plot]'")
    assert not list(tmp_path.iterdir())
