"""The methods on layers as vLLM describes them: ranks, merged matrices, tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError
from tests.core.oracle import Sample, random_sample
from tests.vllm import engine

HEAD, COLS = 16, 128
FORMATS = (("nf3", 32), ("int4", 16), ("nf2", 64))


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engine.stand_in(monkeypatch)
    yield
    engine.forget(monkeypatch)


def matrices(*rows: int) -> list[Sample]:
    return [random_sample(at, n, COLS, *FORMATS[at]) for at, n in enumerate(rows)]


def load(layer: Any, sample: Sample, *shard: Any) -> None:
    """As vLLM does: each stored tensor to the parameter of its name, with the part it is of."""
    for suffix, part in sample.q.parts().items():
        parameter = getattr(layer, f"weight{suffix}")
        parameter.weight_loader(parameter, part, *shard)


def method(names: list[str], samples: list[Sample]) -> Any:
    from irq_convert.vllm.linear import IrqLinearMethod

    formats = tuple(ModuleFormat(s.q.codebook, s.q.block_size) for s in samples)
    return IrqLinearMethod(tuple(names), formats)


def run(how: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
    how.process_weights_after_loading(layer)
    found: torch.Tensor = how.apply(layer, x)
    return found


@pytest.mark.parametrize(("ranks", "kv"), [(1, 2), (2, 2), (4, 2)])
def test_q_k_and_v_over_ranks(ranks: int, kv: int) -> None:
    heads = 4
    samples = matrices(heads * HEAD, kv * HEAD, kv * HEAD)
    x = torch.randn(3, COLS)
    whole = [functional.linear(x, torch.from_numpy(s.dense)) for s in samples]
    own_kv, copies = max(1, kv // ranks), max(1, ranks // kv)
    sizes = [heads // ranks * HEAD, own_kv * HEAD, own_kv * HEAD]
    for rank in range(ranks):
        layer = engine.layer(
            *("QKVParallelLinear", rank, ranks),
            output_partition_sizes=sizes,
            output_size=sum(sizes) * ranks,
            num_kv_head_replicas=copies,
        )
        how = method(["q_proj", "k_proj", "v_proj"], samples)
        how.create_weights(layer, COLS, sizes, COLS, sum(sizes) * ranks, torch.float32)
        for shard, sample in zip("kvq", [samples[1], samples[2], samples[0]], strict=True):
            load(layer, sample, shard)
        starts = [rank * sizes[0], rank // copies * sizes[1], rank // copies * sizes[2]]
        wanted = [y[:, at : at + n] for y, at, n in zip(whole, starts, sizes, strict=True)]
        torch.testing.assert_close(run(how, layer, x), torch.cat(wanted, dim=-1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_gate_and_up_that_the_files_have_merged(ranks: int) -> None:
    (sample,) = matrices(2 * 48)
    x = torch.randn(2, COLS)
    gate, up = functional.linear(x, torch.from_numpy(sample.dense)).chunk(2, dim=-1)
    size = 48 // ranks
    for rank in range(ranks):
        layer = engine.layer(
            *("MergedColumnParallelLinear", rank, ranks),
            output_partition_sizes=[size, size],
            output_sizes=[48, 48],
            output_size=96,
        )
        how = method(["gate_up_proj"], [sample])
        how.create_weights(layer, COLS, [size, size], COLS, 96, torch.float32)
        load(layer, sample)
        own = slice(rank * size, (rank + 1) * size)
        wanted = torch.cat([gate[:, own], up[:, own]], dim=-1)
        torch.testing.assert_close(run(how, layer, x), wanted)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_columns_over_ranks_sum_up(ranks: int) -> None:
    (sample,) = matrices(40)
    x, total, own = torch.randn(2, COLS), torch.zeros(2, 40), COLS // ranks
    for rank in range(ranks):
        layer = engine.layer(
            "RowParallelLinear", rank, ranks, output_partition_sizes=[40], output_size=40
        )
        how = method(["down_proj"], [sample])
        how.create_weights(layer, own, [40], COLS, 40, torch.float32)
        load(layer, sample)
        total += run(how, layer, x[:, rank * own : (rank + 1) * own])
    torch.testing.assert_close(total, functional.linear(x, torch.from_numpy(sample.dense)))


def test_layers_that_are_not_known_are_served_by_one_rank() -> None:
    (sample,) = matrices(32)
    more = {"output_partition_sizes": [16], "output_size": 32}
    layer = engine.layer("OtherParallelLinear", 0, 2, **more)
    with pytest.raises(IrqError, match="how OtherParallelLinear is split over ranks"):
        method(["x_proj"], [sample]).create_weights(layer, COLS, [16], COLS, 32, torch.float32)


def test_parts_of_unknown_names_are_refused() -> None:
    samples = matrices(16, 16)
    more = {"output_partition_sizes": [16, 16], "output_size": 32}
    layer = engine.layer("MergedColumnParallelLinear", 0, 1, **more)
    how = method(["gate_proj", "up_proj"], samples)
    how.create_weights(layer, COLS, [16, 16], COLS, 32, torch.float32)
    with pytest.raises(IrqError, match="part 'index_q' of a layer of 2 matrices"):
        load(layer, samples[0], "index_q")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_table_is_padded_split_and_tied(ranks: int) -> None:
    from irq_convert.vllm.tables import IrqTableMethod

    vocabulary, padded = 70, 128
    (sample,) = matrices(vocabulary)
    dense = torch.from_numpy(sample.dense)
    x, logits = torch.randn(2, COLS), []
    fmt = ModuleFormat(sample.q.codebook, sample.q.block_size)
    for rank in range(ranks):
        embed, head = (engine.table(vocabulary, rank, ranks, padded) for _ in range(2))
        how = IrqTableMethod("embed_tokens", fmt)
        for layer in (embed, head):
            sizes = [padded // ranks]
            how.create_weights(layer, COLS, sizes, COLS, padded, torch.float32)
        assert how.tie_weights(head, embed) is head
        load(embed, sample)
        first = rank * padded // ranks
        mine = torch.arange(vocabulary)[first : first + padded // ranks]
        for layer in (embed, head):
            how.process_weights_after_loading(layer)
        assert torch.equal(how.embedding(embed, mine - first), dense[mine])
        logits.append(how.apply(head, x))
    whole = torch.cat(logits, dim=-1)
    assert whole.shape == (2, padded)
    torch.testing.assert_close(whole[:, :vocabulary], functional.linear(x, dense))
    assert not whole[:, vocabulary:].any()
