"""`IrqEmbedding`: looked up rows are those of the decoded table, in every dtype and layout."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.errors import UsageError
from irq_convert.nn.embedding import IrqEmbedding, dense_embedding
from irq_convert.nn.packed import PARTS
from tests.core.oracle import Sample, random_sample


def make(
    rows: int = 40, cols: int = 172, dtype: torch.dtype | None = None, **options: Any
) -> tuple[IrqEmbedding, Sample]:
    sample = random_sample(rows + cols, rows, cols, **options)
    return IrqEmbedding.from_quantized(sample.q, dtype), sample


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("cols", [64, 172, 1023])
@pytest.mark.parametrize(
    "stored",
    [{}, {"scale_dtype": "float16", "tau_dtype": "float32"}, {"block_size": 16}],
    ids=["grids", "floats", "small blocks"],
)
def test_rows_are_those_of_the_table(codebook: str, cols: int, stored: dict[str, Any]) -> None:
    layer, sample = make(300, cols, codebook=codebook, **stored)  # groups end within rows
    table = torch.from_numpy(sample.dense)
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        found = layer(ids)
        assert found.dtype == dtype
        assert torch.equal(found, nn.functional.embedding(ids, table.to(dtype)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3, 5)])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_shapes_and_kinds_of_numbers(shape: tuple[int, ...], kind: torch.dtype) -> None:
    layer, sample = make()
    ids = torch.full(shape, 39, dtype=kind)
    found = layer(ids)
    assert found.shape == (*shape, 172)
    assert torch.equal(found, torch.from_numpy(sample.dense)[39].expand(found.shape))


@pytest.mark.parametrize("wrong", [-1, 40])
def test_a_number_that_is_no_row(wrong: int) -> None:
    layer, _ = make()
    with pytest.raises(IndexError):
        layer(torch.tensor([0, wrong]))


def test_only_the_rows_that_are_asked_for_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make()
    seen = []
    stock = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda t, d, i: seen.append(len(i)) or stock(t, d, i)
    )
    layer(torch.tensor([[3, 5]]))
    assert set(seen) == {2, 2 * 3}  # rows, and their blocks among the grids


def test_the_dtype_that_a_model_has_is_that_of_its_rows() -> None:
    layer, _ = make(dtype=torch.bfloat16)
    dtypes = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    layer.half()
    assert layer(torch.tensor([1])).dtype == torch.float16
    assert layer.weight_scale_grid is not None
    assert layer.weight_scale_grid.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # as with a dense table, nothing is cast
        assert layer(torch.tensor([1])).dtype == torch.float16


def test_names_are_those_of_the_file_and_load_again() -> None:
    layer, sample = make()
    state = layer.state_dict()
    assert set(state) == set(PARTS)
    twin = IrqEmbedding(40, 172, layer.fmt)
    twin.load_state_dict(state)
    for each in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(each(torch.arange(40)), torch.from_numpy(sample.dense))
    with pytest.raises(RuntimeError, match="weight_tau"):
        twin.load_state_dict({n: t for n, t in state.items() if n != "weight_tau"})


def test_the_codes_are_no_weight_and_cannot_be_trained() -> None:
    layer, _ = make()
    assert isinstance(layer, nn.Embedding)
    assert layer.weight.shape[0] == layer.num_embeddings == 40
    with pytest.raises(UsageError, match=r"the weight \[40, 172\] in nf4 is packed"):
        layer.weight * 2.0
    with pytest.raises(UsageError, match="requires_grad_"):
        layer.requires_grad_()


def test_a_compiled_lookup() -> None:
    layer, sample = make()
    found = torch.compile(lambda ids: layer(ids) * 2, fullgraph=True, backend="eager")
    ids = torch.tensor([[3, 1], [0, 39]])
    assert torch.equal(found(ids), torch.from_numpy(sample.dense)[ids] * 2)


class Scaled(nn.Embedding):
    """As the classes of transformers that scale rows."""

    def __init__(self, rows: int, cols: int, scale: float) -> None:
        super().__init__(rows, cols, padding_idx=3)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_that_scales_its_rows(dtype: torch.dtype) -> None:
    layer, sample = make()
    layer.padding_idx = 3
    layer.wrap(Scaled(40, 172, 9.8))
    layer.to(dtype)
    dense = Scaled(40, 172, 9.8)
    dense.weight.data = torch.from_numpy(sample.dense)
    dense.to(dtype)
    ids = torch.tensor([[3, 1, 39, 3]])
    assert torch.equal(layer(ids), dense(ids))
    assert layer(ids).dtype == dtype
    assert set(layer.state_dict()) == set(PARTS)
    again = dense_embedding(layer, nn.Parameter(layer.dequantize(dtype)))
    assert type(again) is Scaled
    assert again.padding_idx == 3
    assert torch.equal(again(ids), dense(ids))
