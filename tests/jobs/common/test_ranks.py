"""Shares of the work: every part once, and the largest share as small as it can be."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.errors import UsageError
from irq_convert.jobs.common.ranks import Ranks, split

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 4))
def test_split_against_all_ways_to_cut(sizes: list[int], count: int) -> None:
    runs = split(sizes, count)
    assert len(runs) == count
    assert [at for run in runs for at in run] == list(range(len(sizes)))
    cuts = combinations_with_replacement(range(len(sizes) + 1), count - 1)
    best = min(
        max(sum(sizes[a:b]) for a, b in zip((0, *cut), (*cut, len(sizes)), strict=True))
        for cut in cuts
    )
    assert max(sum(sizes[at] for at in run) for run in runs) == best


@pytest.mark.parametrize(
    ("count", "shares"), [(1, [12]), (2, [6, 6]), (3, [4, 4, 4]), (4, [3, 3, 3, 3])]
)
def test_equal_parts_make_equal_shares(count: int, shares: list[int]) -> None:
    assert [len(run) for run in split([7] * 12, count)] == shares
    assert [len(run) for run in split([5] * 4, 3)] == [1, 2, 1]  # nobody idle


def test_what_cannot_be_split() -> None:
    for sizes, count in (([1], 0), ([-1], 1)):
        with pytest.raises(ValueError, match="cannot cut"):
            split(sizes, count)


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Ranks:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return Ranks.from_environment()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch) == Ranks()
    assert environment(monkeypatch, RANK="1", WORLD_SIZE="2") == Ranks()  # not torchrun's
    assert environment(monkeypatch, RANK="x", WORLD_SIZE="2", LOCAL_RANK="0") == Ranks()
    found = environment(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert found == Ranks(3, 4, 1, 2)
    assert not found.first
    assert not found.alone
    with pytest.raises(UsageError, match="torchrun"):
        environment(monkeypatch, RANK="2", WORLD_SIZE="2", LOCAL_RANK="0")


def test_a_device_for_each() -> None:
    assert Ranks().device("cuda:1") == "cuda:1"
    assert Ranks(3, 4, 1, 2).device("cuda") == "cuda:1"
    assert Ranks(3, 4, 1, 2).device("cpu") == "cpu"
    with pytest.raises(UsageError, match="say cuda"):
        Ranks(3, 4, 1, 2).device("cuda:0")


def test_threads_are_shared_out() -> None:
    assert Ranks().threads(None) is None
    assert Ranks(0, 2, 0, 2).threads(5) == 5
    whole, half = Ranks(0, 2, 0, 1).threads(None), Ranks(0, 2, 0, 2).threads(None)
    assert whole is not None
    assert half == max(1, whole // 2)
    assert Ranks(0, 999, 0, 999).threads(None) == 1
