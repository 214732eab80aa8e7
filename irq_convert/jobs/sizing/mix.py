"""The mix that fits, and the best that one choice for all does in as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from irq_convert.artifact.sensitivity import EXPECTED, Sensitivity, View
from irq_convert.jobs.sizing.choices import DENSE, Choice
from irq_convert.jobs.sizing.knapsack import Option, frontier, solve
from irq_convert.jobs.sizing.rules import Group

Bytes = Callable[[str, Choice], int]
"""What a tensor takes in the artifact when a choice is taken."""


@dataclass(frozen=True)
class Mix:
    """A choice for every tensor; `nbytes` of them all, and the KL that is `expected` of it."""

    choices: Mapping[str, Choice]
    nbytes: int
    expected: float

    @property
    def uniform(self) -> Choice | None:
        """The one choice that all have; None where they differ."""
        found = set(self.choices.values())
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class Market:
    """Groups of tensors with what every choice costs them and damages."""

    groups: tuple[Group, ...]
    sensitivity: Sensitivity
    nbytes: Bytes

    def options(self, view: View) -> list[list[Option]]:
        """What each of a group's choices costs, in their order, for all groups."""
        return [
            [self._option(group, choice, view) for choice in group.choices] for group in self.groups
        ]

    def _option(self, group: Group, choice: Choice, view: View) -> Option:
        cost = sum(self.nbytes(name, choice) for name in group.tensors)
        damage = sum(self._damage(name, choice, view) for name in group.tensors)
        return Option(cost, damage)

    def _damage(self, name: str, choice: Choice, view: View) -> float:
        if choice == DENSE:
            return 0.0
        return self.sensitivity.damage(name, str(choice), choice.bits, view)

    @cached_property
    def table(self) -> list[list[Option]]:
        """The options of all groups, by the damage that is expected."""
        return self.options(EXPECTED)

    @property
    def smallest(self) -> Mix:
        """The mix of the fewest bytes."""
        sizes = [[option.nbytes for option in options] for options in self.table]
        return self._mix([own.index(min(own)) for own in sizes])

    def best(self, room: int, view: View = EXPECTED) -> Mix | None:
        """The mix that damages least in `room` bytes; None where nothing fits."""
        found = solve(self.table if view == EXPECTED else self.options(view), room)
        return None if found is None else self._mix(found.chosen)

    def best_uniform(self, room: int) -> Mix | None:
        """The least damage that one choice for all does, wherever rules leave it."""
        candidates = []
        for choice in dict.fromkeys(c for group in self.groups for c in group.choices):
            if choice != DENSE:
                chosen = [_nearest(group.choices, choice) for group in self.groups]
                candidates.append(self._mix(chosen))
        fitting = [mix for mix in candidates if mix.nbytes <= room]
        return min(fitting, key=lambda mix: (mix.expected, mix.nbytes), default=None)

    def _mix(self, chosen: Sequence[int]) -> Mix:
        taken = [options[at] for options, at in zip(self.table, chosen, strict=True)]
        choices = {
            name: group.choices[at]
            for group, at in zip(self.groups, chosen, strict=True)
            for name in group.tensors
        }
        return Mix(choices, sum(o.nbytes for o in taken), sum(o.damage for o in taken))

    def frontier(self, most: int = 12) -> list[tuple[int, float]]:
        """About `most` points of the best mixes, (bytes, expected KL), the smallest first.

        Evenly spaced up to where weights are left as they are; then halfway, and the end.
        """
        points = frontier(self.table)
        first, last = points[0][0], points[-1][0]
        dense = self._largest_quantized
        wanted = [first + (dense - first) * i / max(1, most - 3) for i in range(most - 2)]
        wanted += [(dense + last) / 2, last]
        found = [min(points, key=lambda point: abs(point[0] - at)) for at in wanted]
        return list(dict.fromkeys(found))

    @property
    def _largest_quantized(self) -> int:
        """Bytes of the largest mix in which everything that can be is quantized."""
        total = 0
        for group, options in zip(self.groups, self.table, strict=True):
            pairs = zip(group.choices, options, strict=True)
            sizes = [option.nbytes for choice, option in pairs if choice != DENSE]
            total += max(sizes) if sizes else options[0].nbytes
        return total


def _nearest(choices: Sequence[Choice], wanted: Choice) -> int:
    """Which of `choices` is `wanted`, or comes nearest to it: in bits, then block, then family."""

    def distance(at: int) -> tuple[int, int, bool, int]:
        choice = choices[at]
        block = abs((choice.block_size or 0) - (wanted.block_size or 0))
        return abs(choice.bits - wanted.bits), block, choice.codebook != wanted.codebook, at

    return min(range(len(choices)), key=distance)
