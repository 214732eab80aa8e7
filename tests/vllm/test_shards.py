"""What a rank holds decodes to exactly its rows and columns of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.statistic_dtypes import STATISTIC_DTYPES
from irq_convert.errors import UsageError
from irq_convert.vllm.shards import Shard, check_columns, cut, joined
from tests.core.oracle import Sample, random_sample


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    block = draw(st.sampled_from([16, 32, 64]))
    statistics = [draw(st.sampled_from([*STATISTIC_DTYPES])) for _ in range(2)]
    return random_sample(
        draw(st.integers(0, 99)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 5)) * block - draw(st.sampled_from([0, 8])),
        draw(st.sampled_from([*CODEBOOKS])),
        block,
        *statistics,
    )


def spans(draw: st.DrawFn, rows: int) -> tuple[tuple[int, int], ...]:
    edges = sorted(draw(st.lists(st.integers(0, rows), min_size=2, max_size=6)))
    return tuple(zip(edges[::2], edges[1::2], strict=False))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_is_that_of_the_dense_matrix(data: st.DataObject) -> None:
    sample = data.draw(samples())
    q = sample.q
    rows = spans(data.draw, q.codes.shape[0])
    edges = [*range(0, q.cols, q.block_size), q.cols]
    columns = data.draw(st.none() | st.tuples(st.sampled_from(edges), st.sampled_from(edges)))
    if columns is not None:
        columns = (min(columns), max(columns))
        if columns[0] == columns[1]:
            columns = (0, q.cols)
    shard = Shard(rows, columns)
    part = cut("matrix", q, shard)
    part.check()
    assert (part.codes.shape[0], part.cols) == (shard.height, shard.width(q.cols))
    whole = dequantize_tensor(q, backend="torch")
    wanted = torch.cat([whole[begin:end] for begin, end in rows])
    if columns is not None:
        wanted = wanted[:, slice(*columns)]
    assert torch.equal(dequantize_tensor(part, backend="torch"), wanted)


@given(st.data(), st.sampled_from([2, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_ranks_together_hold_the_whole(data: st.DataObject, ranks: int) -> None:
    sample = data.draw(samples())
    q, whole = sample.q, dequantize_tensor(sample.q, backend="torch")
    rows = q.codes.shape[0]
    parts = [((rows * r // ranks, rows * (r + 1) // ranks),) for r in range(ranks)]
    found = [cut("matrix", q, Shard(own)) for own in parts]
    dense = torch.cat([dequantize_tensor(part, backend="torch") for part in found])
    assert torch.equal(dense, whole)


def test_grids_stay_where_groups_stay_whole() -> None:
    q = random_sample(0, 64, 1024).q  # 16 blocks a row, 16 rows a group
    assert cut("matrix", q, Shard(((16, 48),))).scale_grid is not None
    assert cut("matrix", q, Shard(((0, 32), (32, 64)))).scale_grid is not None
    assert cut("matrix", q, Shard(((8, 48),))).scale_grid is None
    assert cut("matrix", q, Shard(((0, 16),), (0, 512))).scale_grid is None


def test_joined_spans() -> None:
    assert joined(((0, 2), (2, 5), (5, 5), (7, 9))) == ((0, 5), (7, 9))


def test_columns_inside_a_block_are_refused() -> None:
    shard = Shard(((0, 4),), (96, 192))
    with pytest.raises(UsageError, match=r"down_proj: 192 columns in blocks of 64 .* column 96"):
        check_columns("down_proj", shard, 192, 64)
    check_columns("down_proj", Shard(((0, 4),), (64, 100)), 100, 64)
