"""Experts of a mixture: each token's weighted sum over those that it chose."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError
from irq_convert.vllm.held import HeldWeights, Piece
from irq_convert.vllm.held_experts import HeldExperts
from irq_convert.vllm.shards import Shard
from tests.core.oracle import random_sample

EXPERTS, COLS, INNER = 3, 64, 32


def weights(name: str, rows: int, cols: int, seeds: list[int]) -> HeldWeights:
    shard = Shard(((0, rows),))
    pieces = tuple(Piece(f"{name}.{s}", cols, shard, ModuleFormat("nf3", 32)) for s in seeds)
    held = HeldWeights(pieces, torch.float32)
    for at, seed in enumerate(seeds):
        sample = random_sample(seed, rows, cols, "nf3", 32)
        for suffix, part in sample.q.parts().items():
            held.take(at, suffix, part)
    held.finish()
    return held


def act(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * up


def mixture(name: str) -> HeldExperts:
    first = [weights("up", INNER, COLS, [10 + e, 20 + e]) for e in range(EXPERTS)]
    second = [weights("down", COLS, INNER, [30 + e]) for e in range(EXPERTS)]
    return HeldExperts(name, first, second, act)


def test_each_token_gets_the_experts_it_chose() -> None:
    experts = mixture("layers.0")
    x, ids = torch.randn(5, COLS), torch.tensor([[0, 2], [1, 0], [2, 1], [2, -1], [-1, -1]])
    chosen = torch.rand(5, 2)
    wanted = torch.zeros(5, COLS)
    for token in range(5):
        for slot in range(2):
            e = int(ids[token, slot])
            if e >= 0:  # the others are another rank's
                up, down = (
                    each[e].dense(torch.float32) for each in (experts.first, experts.second)
                )
                y = functional.linear(act(functional.linear(x[token], up)), down)
                wanted[token] += chosen[token, slot] * y
    torch.testing.assert_close(experts(x, chosen, ids), wanted)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, chosen, ids), wanted)
    torch._dynamo.reset()


def test_layers_are_found_by_their_names() -> None:
    first = mixture("layers.1")
    with pytest.raises(IrqError, match=r"layers.1: two mixtures"):
        mixture("layers.1")
    del first
