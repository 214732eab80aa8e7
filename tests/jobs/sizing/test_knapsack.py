"""The solver against every choice there is, and against the bound that it gives itself."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.jobs.sizing.knapsack import Option, Solution, frontier, hull, solve

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=5,
)
GROUPS = st.lists(OPTIONS, min_size=1, max_size=5)


def cost(groups: list[list[Option]], chosen: tuple[int, ...]) -> tuple[int, float]:
    taken = [options[at] for options, at in zip(groups, chosen, strict=True)]
    return sum(o.nbytes for o in taken), sum(o.damage for o in taken)


def best(groups: list[list[Option]], room: int) -> float | None:
    """The least damage, by trying everything."""
    every = (cost(groups, chosen) for chosen in product(*(range(len(o)) for o in groups)))
    return min((damage for nbytes, damage in every if nbytes <= room), default=None)


@given(GROUPS, st.integers(0, 220))
@settings(max_examples=300, deadline=None)
def test_a_choice_fits_and_is_within_one_step_of_the_best(
    groups: list[list[Option]], room: int
) -> None:
    found, wanted = solve(groups, room), best(groups, room)
    if wanted is None:
        assert found is None
        return
    assert found is not None
    nbytes, damage = cost(groups, found.chosen)
    assert nbytes <= room
    assert (found.nbytes, found.damage) == (nbytes, damage)
    assert found.bound <= wanted + 1e-9
    steps = [
        options[a].damage - options[b].damage
        for options in groups
        for a, b in pairwise(hull(options))
    ]
    assert damage <= wanted + max(steps, default=0.0) + 1e-9


@given(GROUPS, st.integers(0, 220))
@settings(max_examples=100, deadline=None)
def test_no_single_change_that_fits_would_help(groups: list[list[Option]], room: int) -> None:
    found = solve(groups, room)
    if found is None:
        return
    for number, options in enumerate(groups):
        for at in range(len(options)):
            changed = (*found.chosen[:number], at, *found.chosen[number + 1 :])
            nbytes, damage = cost(groups, changed)
            assert nbytes > room or damage >= found.damage - 1e-12


@given(OPTIONS)
def test_the_hull_is_convex_and_nothing_lies_below_it(options: list[Option]) -> None:
    corners = [options[at] for at in hull(options)]
    slopes = [(a.damage - b.damage) / (b.nbytes - a.nbytes) for a, b in pairwise(corners)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)
    for option in options:
        for a, b in pairwise(corners):
            if a.nbytes <= option.nbytes <= b.nbytes:
                share = (option.nbytes - a.nbytes) / (b.nbytes - a.nbytes)
                assert option.damage >= a.damage + share * (b.damage - a.damage) - 1e-9


def test_a_trade_of_two_is_found() -> None:
    # By the hulls alone the second takes its only step, and leaves no room for the first.
    groups = [
        [Option(1, 10.0), Option(6, 1.0)],
        [Option(1, 6.0), Option(4, 0.5)],
        [Option(1, 0.0)],
    ]
    found = solve(groups, 8)
    assert found is not None
    assert found.chosen == (1, 0, 0)


def test_equals_go_to_the_smaller_and_the_first() -> None:
    same = [Option(4, 1.0), Option(2, 1.0), Option(2, 1.0)]
    assert solve([same], 10) == Solution((1,), 2, 1.0, 1.0)


def test_twenty_thousand_groups() -> None:
    options = [
        Option(2 * bits + wide, 4.0**-bits * (1 + wide)) for bits in (2, 3, 4) for wide in (0, 1)
    ]
    groups = [[Option(o.nbytes, o.damage * (1 + n % 7)) for o in options] for n in range(20_000)]
    found = solve(groups, 20_000 * 6)
    assert found is not None
    assert 20_000 * 6 - 8 < found.nbytes <= 20_000 * 6
    assert found.damage - found.bound < 1e-2


def test_the_frontier_goes_down_to_the_largest() -> None:
    groups = [[Option(2, 3.0), Option(3, 1.0), Option(4, 0.5)], [Option(1, 9.0), Option(5, 0.0)]]
    points = frontier(groups)
    assert points[0] == (3, 12.0)
    assert points[-1] == (9, 0.5)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert [p[1] for p in points] == sorted((p[1] for p in points), reverse=True)
