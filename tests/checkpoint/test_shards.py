"""Cutting into shards: every tensor once, in order, within the limit, no needless shard."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.checkpoint.files import write_json_atomic
from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_plan(sizes: list[int], limit: int) -> None:
    named = [(f"t{k}", size) for k, size in enumerate(sizes)]
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == [name for name, _ in named]
    weights = [sum(dict(named)[name] for name in shard) for shard in shards]
    for shard, weight, following in zip(shards, weights, [*shards[1:], None], strict=False):
        assert weight <= limit or len([n for n in shard if dict(named)[n]]) == 1
        if following is not None:
            assert weight + dict(named)[following[0]] > limit


def test_plan_example() -> None:
    sizes = [("a", 4), ("b", 5), ("big", 20), ("c", 1), ("d", 9)]
    assert plan_shards(sizes, 10) == [["a", "b"], ["big"], ["c", "d"]]
    assert plan_shards([], 10) == []


def test_wrong_plans() -> None:
    for sizes, limit in (([("a", 1), ("a", 2)], 5), ([("a", -1)], 5), ([("a", 1)], 0)):
        with pytest.raises(ValueError, match=r"twice|negative|at least 1"):
            plan_shards(sizes, limit)


def test_names() -> None:
    assert shard_name(1, 1) == "model.safetensors"
    assert shard_name(2, 12) == "model-00002-of-00012.safetensors"
    assert shard_name(100000, 100000) == "model-100000-of-100000.safetensors"
    for number, count in ((0, 1), (2, 1), (1, 0)):
        with pytest.raises(ValueError, match="does not exist"):
            shard_name(number, count)


def test_plan_write_index_open(tmp_path: Path) -> None:
    specs = {f"t{k}": TensorSpec(f"t{k}", "F16", (k, 3)) for k in range(9)}
    shards = plan_shards([(name, spec.nbytes) for name, spec in specs.items()], 60)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = shard_name(number, len(shards))
        with ShardWriter(tmp_path / file, [specs[name] for name in names]) as writer:
            for name in names:
                writer.write(name, bytes(specs[name].nbytes))
                weight_map[name] = file
    total = sum(spec.nbytes for spec in specs.values())
    index = build_index(weight_map, total)
    assert list(index["weight_map"]) == sorted(specs)
    write_json_atomic(tmp_path / INDEX_NAME, index)
    opened = open_checkpoint(tmp_path)
    assert opened.nbytes == total == opened.index_metadata["total_size"]
    assert {name: info.shape for name, info in opened.tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert json.loads((tmp_path / INDEX_NAME).read_text()) == index
