"""The choice for every group of matrices that damages least within so many bytes.

A multiple-choice knapsack: of each group's options exactly one. Its linear relaxation takes the
steps of every group's lower convex hull in the order of damage saved a byte (Sinha and Zoltners,
1979); whole steps of it are within one step of the best. What room is left is filled by single
changes that save most, and the remaining trades of two groups are tried for small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TRADED = 64
"""Groups up to which trades of two are tried: their number grows with the square."""


@dataclass(frozen=True)
class Option:
    """What taking it costs, in `nbytes` (exact) and in expected `damage` (nats a token)."""

    nbytes: int
    damage: float


@dataclass(frozen=True)
class Solution:
    """`chosen[i]`: the number of the option of group i. `bound`: no choice has less damage."""

    chosen: tuple[int, ...]
    nbytes: int
    damage: float
    bound: float


def solve(groups: Sequence[Sequence[Option]], room: int) -> Solution | None:
    """The options of `groups` with the least sum of damage in `room` bytes; None when none fits.

    Deterministic: of equals the first group and the smaller option win. `damage` exceeds `bound`
    by less than the largest step between neighbours of a hull.
    """
    chosen = [_smallest(options) for options in groups]
    used = sum(options[at].nbytes for options, at in zip(groups, chosen, strict=True))
    if used > room:
        return None
    used, bound = _climb(groups, chosen, used, room)
    used = _fill(groups, chosen, used, room)
    if len(groups) <= TRADED:
        used = _trade(groups, chosen, used, room)
    damage = sum(options[at].damage for options, at in zip(groups, chosen, strict=True))
    return Solution(tuple(chosen), used, damage, min(bound, damage))


def hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull of damage over bytes, the smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].damage, i))
    found: list[int] = []
    for i in order:
        if found and options[i].damage >= options[found[-1]].damage:
            continue
        if found and options[i].nbytes == options[found[-1]].nbytes:
            continue
        while len(found) > 1 and _gain(options, found[-2], i) >= _gain(
            options, found[-2], found[-1]
        ):
            found.pop()
        found.append(i)
    return found


def frontier(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """(bytes, damage) of every point that the greedy ascent passes, the smallest first."""
    chosen = [_smallest(options) for options in groups]
    used = sum(options[at].nbytes for options, at in zip(groups, chosen, strict=True))
    damage = sum(options[at].damage for options, at in zip(groups, chosen, strict=True))
    points = [(used, damage)]
    for _, group, before, after in _steps(groups):
        options = groups[group]
        used += options[after].nbytes - options[before].nbytes
        damage += options[after].damage - options[before].damage
        points.append((used, max(0.0, damage)))
    return points


def _smallest(options: Sequence[Option]) -> int:
    return min(range(len(options)), key=lambda i: (options[i].nbytes, options[i].damage, i))


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """Damage saved a byte."""
    more = options[after].nbytes - options[before].nbytes
    return (options[before].damage - options[after].damage) / more


def _steps(groups: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int]]:
    """(gain, group, from, to) of all hulls, those that save most a byte first."""
    steps = []
    for number, options in enumerate(groups):
        corners = hull(options)
        for place, (before, after) in enumerate(pairwise(corners)):
            steps.append((-_gain(options, before, after), number, place, before, after))
    steps.sort()
    return [(-gain, number, before, after) for gain, number, _, before, after in steps]


def _climb(
    groups: Sequence[Sequence[Option]], chosen: list[int], used: int, room: int
) -> tuple[int, float]:
    """Take steps while they fit; returns bytes, and the damage of the relaxation."""
    damage = sum(options[at].damage for options, at in zip(groups, chosen, strict=True))
    bound = None
    stopped: set[int] = set()
    for gain, number, before, after in _steps(groups):
        options = groups[number]
        more = options[after].nbytes - options[before].nbytes
        if bound is None and used + more > room:
            bound = damage - gain * (room - used)
        if number in stopped or used + more > room:
            stopped.add(number)  # its later steps begin where this one ends
            continue
        chosen[number] = after
        used += more
        damage += options[after].damage - options[before].damage
    return used, damage if bound is None else bound


def _fill(groups: Sequence[Sequence[Option]], chosen: list[int], used: int, room: int) -> int:
    """Single changes of a group that fit and save damage, the one that saves most first."""
    while True:
        best: tuple[float, int, int] | None = None
        for number, options in enumerate(groups):
            now = options[chosen[number]]
            for at, option in enumerate(options):
                saved = now.damage - option.damage
                fits = used + option.nbytes - now.nbytes <= room
                if fits and saved > 0 and (best is None or saved > best[0]):
                    best = saved, number, at
        if best is None:
            return used
        _, number, at = best
        used += groups[number][at].nbytes - groups[number][chosen[number]].nbytes
        chosen[number] = at


def _trade(groups: Sequence[Sequence[Option]], chosen: list[int], used: int, room: int) -> int:
    """One group gives bytes so that another can take them, as long as that saves damage."""
    for _ in range(2 * len(groups)):
        best: tuple[float, int, int, int, int] | None = None
        moves = [_moves(options, chosen[number]) for number, options in enumerate(groups)]
        for giver, gives in enumerate(moves):
            for freed, lost, lower in ((-m, -s, at) for m, s, at in gives if m < 0):
                for taker, takes in enumerate(moves):
                    if taker == giver:
                        continue
                    for more, saved, upper in takes:
                        better = saved - lost
                        fits = more > 0 and used - freed + more <= room
                        if fits and better > 1e-15 and (best is None or better > best[0]):
                            best = better, giver, lower, taker, upper
        if best is None:
            return used
        for number, at in (best[1:3], best[3:5]):
            used += groups[number][at].nbytes - groups[number][chosen[number]].nbytes
            chosen[number] = at
    return used


def _moves(options: Sequence[Option], now: int) -> list[tuple[int, float, int]]:
    """(bytes more, damage saved, option) of every option on the hull beside the one taken."""
    here = options[now]
    return [
        (options[at].nbytes - here.nbytes, here.damage - options[at].damage, at)
        for at in hull(options)
        if at != now
    ]
