"""The weights of a layer: gathered in any order, of several widths, one operator for all."""

from __future__ import annotations

import random

import pytest
import torch

from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError, UsageError
from irq_convert.vllm.held import HeldWeights, Piece
from irq_convert.vllm.shards import Shard
from tests.core.oracle import random_sample

COLS = 192
KINDS = (("nf2", 64, "uint8", "uint8"), ("int4", 32, "float16", "float32"), None)


def layer(rows: int = 40) -> tuple[HeldWeights, torch.Tensor, list[tuple[int, str, torch.Tensor]]]:
    """Three matrices one below the other, the last dense; their dense rows; all stored parts."""
    pieces, dense, parts = [], [], []
    for at, kind in enumerate(KINDS):
        shard = Shard(((0, rows),))
        if kind is None:
            weight = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(at))
            pieces.append(Piece("v_proj", COLS, shard, None))
            parts.append((at, "", weight))
        else:
            sample = random_sample(at, rows, COLS, *kind)
            pieces.append(Piece(f"{kind[0]}_proj", COLS, shard, ModuleFormat(*kind)))
            parts += [(at, suffix, part) for suffix, part in sample.q.parts().items()]
            weight = torch.from_numpy(sample.dense)
        dense.append(weight)
    return HeldWeights(tuple(pieces), torch.float32), torch.cat(dense), parts


def filled(seed: int = 0) -> tuple[HeldWeights, torch.Tensor]:
    held, dense, parts = layer()
    random.Random(seed).shuffle(parts)
    for part in parts:
        held.take(*part)
    held.finish()
    return held, dense


@pytest.mark.parametrize("seed", range(3))
def test_parts_come_in_any_order(seed: int) -> None:
    held, dense = filled(seed)
    assert torch.equal(held.dense(torch.float32), dense)


def test_one_product_of_several_widths() -> None:
    held, dense = filled()
    x, bias = torch.randn(3, COLS), torch.randn(len(dense))
    torch.testing.assert_close(held(x, bias), torch.nn.functional.linear(x, dense, bias))
    assert held(x).shape == (3, len(dense))


def test_the_operator_keeps_its_contract_and_compiles() -> None:
    held, _ = filled()
    x = torch.randn(3, COLS)
    arguments = (x, None, held.parts(), held.rows, held.codebooks, held.block_sizes)
    torch.library.opcheck(
        torch.ops.irq.served_linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch.inference_mode():
        compiled = torch.compile(held, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), held(x))
    torch._dynamo.reset()


def test_what_is_missing_is_named() -> None:
    held, _, parts = layer()
    for part in parts:
        if part[:2] != (1, "_tau"):
            held.take(*part)
    with pytest.raises(IrqError, match=r"int4_proj.weight_tau is not in the files"):
        held.finish()


def test_no_weights_at_all_are_zeros() -> None:
    held, dense, _ = layer()
    held.finish(empty=True)
    assert not held.dense(torch.float32).any()
    assert held.dense(torch.float32).shape == dense.shape


def test_parts_of_another_kind_are_refused() -> None:
    held, _, _ = layer()
    with pytest.raises(IrqError, match=r"int4_proj.weight_tau_grid is not a part"):
        held.take(1, "_tau_grid", torch.zeros(1, 2))
    with pytest.raises(IrqError, match=r"v_proj.weight has shape \[40, 7\]"):
        held.take(2, "", torch.zeros(40, 7))


def test_a_split_inside_a_block_is_refused_before_loading() -> None:
    fmt = ModuleFormat("nf4", 64)
    with pytest.raises(UsageError, match="cannot be split at column 96"):
        Piece("down_proj", COLS, Shard(((0, 8),), (0, 96)), fmt)
