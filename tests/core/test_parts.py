"""The one list of a tensor's parts and that of the dtypes of statistics, against what uses them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.artifact.config import PART_SUFFIXES, ModuleFormat
from irq_convert.artifact.structure import part_specs
from irq_convert.core.blocks import BlockShape
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.parts import SUFFIXES, part_shapes, stored_parts
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import encode_statistic, expand_statistic, statistic_dtype
from irq_convert.core.statistic_dtypes import STATISTIC_DTYPES, StoredDtype
from irq_convert.errors import IrqError
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.packed import PARTS, named_parts

from .oracle import random_sample

DTYPES = st.sampled_from(["uint8", "float16", "float32"])


def test_order_of_a_file_and_of_a_layer() -> None:
    blocks = BlockShape(300, 100, 64, 3)
    found = stored_parts(blocks, (3, 100), "uint8", "uint8")
    assert list(found) == ["", "_scale", "_scale_grid", "_tau", "_tau_grid"]
    shapes = {suffix: part.shape for suffix, part in found.items()}
    assert shapes == {
        "": (3, 100, 38),
        "_scale": (3, 100, 2),
        "_scale_grid": (3, 2),
        "_tau": (3, 100, 2),
        "_tau_grid": (3, 2),
    }
    assert {suffix: shapes[suffix] for suffix in SUFFIXES} == part_shapes(blocks, (3, 100))
    assert ("", *PART_SUFFIXES) == SUFFIXES == ("", "_scale", "_tau", "_scale_grid", "_tau_grid")
    assert list(named_parts("w", (300,), 100, ModuleFormat("nf3", 64))) == [
        f"w{suffix}" for suffix in SUFFIXES
    ]


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 300), DTYPES, DTYPES, st.integers(0, 999))
def test_tensors_files_and_layers_agree(
    rows: int, cols: int, scale: str, tau: str, seed: int
) -> None:
    q = random_sample(seed, rows, cols, "int3", 32, scale, tau).q
    fmt = ModuleFormat("int3", 32, scale, tau)
    specs = part_specs("w", (rows, cols), fmt)
    wanted = named_parts("w", (rows,), cols, fmt)
    parts = {f"w{suffix}": part for suffix, part in q.parts().items()}
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == wanted
    layer = IrqLinear.from_quantized(q)
    assert layer.fmt.scale_dtype == scale
    assert layer.fmt.tau_dtype == tau
    assert list(layer.packed_parts()) == [f"weight{suffix}" for suffix in q.parts()]
    assert set(layer.packed_parts()) <= set(PARTS)
    assert {spec.name: spec.shape for spec in specs.values()} == {
        name: shape for name, (shape, _) in wanted.items()
    }
    names = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
    for spec in specs.values():
        assert names[spec.dtype] == wanted[spec.name][1]


def test_a_part_of_another_shape_is_named() -> None:
    parts = dict(random_sample(0, 4, 64).q.parts())
    order = [parts[suffix] for suffix in SUFFIXES]
    for at, suffix in enumerate(SUFFIXES):
        wrong = [part[:-1] if i == at else part for i, part in enumerate(order)]
        if suffix == "":  # the rows of the codes are those of the matrix
            wrong[0] = order[0][:, :-1]
        q = QuantizedTensor(*wrong, cols=64, codebook="nf4", block_size=64)
        with pytest.raises(IrqError, match=f"^w{suffix} has shape"):
            q.check("w")


def test_statistics_of_no_known_dtype_are_refused() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int8):
        with pytest.raises(IrqError, match="must be uint8, float16 or float32, not torch"):
            statistic_dtype(dtype)


def test_a_row_is_all_that_a_dtype_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATISTIC_DTYPES, "bfloat16", StoredDtype("bfloat16", "BF16"))
    sample = random_sample(1, 8, 200).q
    exact = expand_statistic(sample.tau, sample.tau_grid)
    tau, grid = encode_statistic(exact, torch.bfloat16)
    assert grid is None
    assert torch.equal(expand_statistic(tau, grid), exact.bfloat16().float())
    parts = (sample.codes, sample.scale, tau, sample.scale_grid, None)
    q = QuantizedTensor(*parts, cols=200, codebook="nf4", block_size=64)
    dense = dequantize_tensor(q, backend="numba")
    assert torch.equal(dense, dequantize_tensor(q, backend="torch"))
    layer = IrqLinear.from_quantized(q)
    assert layer.fmt.tau_dtype == "bfloat16"
    assert layer.part_dtypes()["weight_tau"] == torch.bfloat16
    assert layer.half().weight_tau.dtype == torch.bfloat16
    specs = part_specs("w", (8, 200), layer.fmt)
    assert [spec.dtype for spec in specs.values()] == ["U8", "U8", "F32", "BF16"]
