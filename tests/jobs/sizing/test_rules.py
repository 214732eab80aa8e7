"""Which weights share a choice, which choices they may have, and what contradicts itself."""

from __future__ import annotations

import pytest

from irq_convert.errors import UsageError
from irq_convert.jobs.sizing.choices import DENSE, Choice, quantized_choices
from irq_convert.jobs.sizing.options import TargetOptions, parse_size
from irq_convert.jobs.sizing.rules import make_groups

NAMES = [f"layers.{n}.{part}" for n in (0, 1) for part in ("q", "k", "up", "e.0", "e.1")]
CHOICES = (*quantized_choices(), DENSE)


def test_every_choice_has_a_name_that_leads_back() -> None:
    assert len(CHOICES) == len(set(map(str, CHOICES))) == 2 * 3 * 4 + 1
    for choice in CHOICES:
        assert Choice.parse(str(choice)) == choice
    for bad in ("nf5/64", "nf3/", "int3/064", "", "Dense", "nf3"):
        with pytest.raises(ValueError):  # noqa: PT011
            Choice.parse(bad)


def groups_of(**settings: object) -> list[tuple[str, ...]]:
    options = TargetOptions(bits=3, **settings)  # type: ignore[arg-type]
    return [group.tensors for group in make_groups(NAMES, [], CHOICES, options, {})]


def test_what_matches_with_the_same_groups_is_one() -> None:
    assert groups_of() == [(name,) for name in NAMES]
    found = groups_of(within=(r"layers\.(\d+)\.[qk]$",))
    assert found[0] == ("layers.0.q", "layers.0.k")
    assert ("layers.1.q", "layers.1.k") in found
    assert len(found) == 8
    assert groups_of(within=(r"\.e\.",))[3] == tuple(n for n in NAMES if ".e." in n)
    both = groups_of(within=(r"layers\.(\d+)\.[qk]$", r"\.(q|up)$"))
    assert len(both) == 2 + 4  # all q with their k, all up, and four experts


def test_tied_weights_are_one_without_being_asked() -> None:
    tied = [["layers.0.e.0", "layers.0.e.1"]]
    found = make_groups(NAMES, tied, CHOICES, TargetOptions(bits=3), {})
    assert ("layers.0.e.0", "layers.0.e.1") in [group.tensors for group in found]


def bits_of(name: str, fixed: dict[str, int] | None = None, **settings: object) -> set[int]:
    options = TargetOptions(bits=3, **settings)  # type: ignore[arg-type]
    (group,) = (
        g for g in make_groups(NAMES, [], CHOICES, options, fixed or {}) if name in g.tensors
    )
    return {choice.bits for choice in group.choices}


def test_floors_ceilings_and_fixed_bits() -> None:
    assert bits_of("layers.0.q") == {2, 3, 4, 16}
    assert bits_of("layers.0.q", at_least=((r"\.q$", 3),)) == {3, 4, 16}
    assert bits_of("layers.0.up", at_least=((r"\.q$", 3),)) == {2, 3, 4, 16}
    assert bits_of("layers.0.q", at_most=((".", 4), (r"layers\.0", 3))) == {2, 3}
    assert bits_of("layers.0.q", at_least=((r"\.q$", 16),)) == {16}
    assert bits_of("layers.0.q", fixed={"layers.0.q": 3}) == {3}


def test_rules_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.q: no codebook has at least 4 bits and at m"):
        bits_of("layers.0.q", at_least=(("q", 4),), at_most=(("q", 3),))
    with pytest.raises(UsageError, match=r"layers\.0\.q \(and 1 that share its choice\).*exactly"):
        bits_of("layers.0.q", {"layers.0.k": 2}, at_least=((r"0\.q", 3),), within=(r"0\.[qk]$",))
    with pytest.raises(UsageError, match="exactly 2 and exactly 3"):
        bits_of("layers.0.q", {"layers.0.k": 2, "layers.0.q": 3}, within=(r"0\.[qk]$",))
    for option, settings in (
        ("--uniform-within", {"within": ("nothing",)}),
        ("--at-least", {"at_least": (("nothing", 3),)}),
        ("--at-most", {"at_most": (("nothing", 3),)}),
    ):
        with pytest.raises(UsageError, match=f"{option} 'nothing' matches no weight"):
            groups_of(**settings)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("3.5GB", 3_500_000_000), ("700 mb", 700_000_000), ("1kB", 1000), ("2GiB", 1 << 31)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "3.5", "GB", "-1GB", "1e3MB", "3,5GB", "1TB", "1GBs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="write a size with its unit"):
        parse_size(text)


def test_a_size_that_is_not_finite() -> None:
    with pytest.raises(UsageError, match=r"^--target-size 9{20}\.\.\.: no size has so many digits"):
        parse_size("9" * 400 + "GB")
    with pytest.raises(UsageError, match="so many digits"):
        parse_size("9" * 305 + "GB")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "one of --target-size and --target-bits"),
        ({"size": 1, "bits": 3.0}, "one of --target-size and --target-bits"),
        ({"size": 0}, "nothing has so few bytes"),
        ({"bits": 0.5}, "from 1 to 32"),
        ({"bits": float("nan")}, "from 1 to 32"),
        ({"bits": 3.0, "tokens": 3}, "at least two windows of 2 tokens"),
        ({"bits": 3.0, "tokens": 100, "window": 64}, "at least two windows of 64 tokens"),
        ({"bits": 3.0, "within": ("(",)}, "--uniform-within '\\(' is not a regular expression"),
        ({"bits": 3.0, "at_most": (("q", 5),)}, "--at-most 'q' = 5: choose 2, 3, 4 or 16"),
    ],
)
def test_options_that_cannot_be(settings: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        TargetOptions(**settings)  # type: ignore[arg-type]
