"""Which weights share a choice, and which choices each may have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from irq_convert.errors import UsageError
from irq_convert.jobs.common.expressions import last_match
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.options import TargetOptions

_NO_CEILING = 99


@dataclass(frozen=True)
class Group:
    """Weights that get one choice, by their names in the files, and the `choices` they may have."""

    tensors: tuple[str, ...]
    choices: tuple[Choice, ...]


def make_groups(
    tensors: Sequence[str],
    tied: Sequence[Collection[str]],
    choices: Sequence[Choice],
    options: TargetOptions,
    fixed: Mapping[str, int],
) -> tuple[Group, ...]:
    """The groups of `tensors`, in their order.

    `tied` must share a choice whatever is asked, as experts of a layer do; `fixed` are bits that
    `--bits-for` gives. Raises `UsageError` for rules that contradict each other, or match nothing.
    """
    roots = {name: name for name in tensors}
    for names in tied:
        _join(roots, [name for name in tensors if name in set(names)])
    for pattern in options.within:
        shared: dict[tuple[str | None, ...], list[str]] = {}
        for name in tensors:
            found = re.search(pattern, name)
            if found:
                shared.setdefault(found.groups(), []).append(name)
        if not shared:
            raise UsageError(f"--uniform-within {pattern!r} matches no weight that is quantized")
        for names in shared.values():
            _join(roots, names)
    members: dict[str, list[str]] = {}
    for name in tensors:
        members.setdefault(_root(roots, name), []).append(name)
    floors = _bits(options.at_least, "--at-least", tensors)
    ceilings = _bits(options.at_most, "--at-most", tensors)
    return tuple(
        Group(tuple(names), _allowed(names, choices, floors, ceilings, fixed))
        for names in members.values()
    )


def _bits(rules: Sequence[tuple[str, int]], option: str, tensors: Sequence[str]) -> dict[str, int]:
    """What the last rule that matches says, by tensor."""
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in tensors):
            raise UsageError(
                f"{option} {pattern!r} matches no weight that there is a choice for "
                "(--include-embeddings adds embeddings and heads)"
            )
    found = {name: last_match(rules, name) for name in tensors}
    return {name: bits for name, bits in found.items() if bits is not None}


def _allowed(
    names: Sequence[str],
    choices: Sequence[Choice],
    floors: Mapping[str, int],
    ceilings: Mapping[str, int],
    fixed: Mapping[str, int],
) -> tuple[Choice, ...]:
    """What all of `names` may have."""
    least = max(floors.get(name, 0) for name in names)
    most = min(ceilings.get(name, _NO_CEILING) for name in names)
    exact = {fixed[name] for name in names if name in fixed}
    found = tuple(each for each in choices if least <= each.bits <= most and exact <= {each.bits})
    if not found:
        asked = [f"at least {least} bits"] if least else []
        asked += [f"at most {most}"] if most < _NO_CEILING else []
        asked += [f"exactly {bits}" for bits in sorted(exact)]
        others = f" (and {len(names) - 1} that share its choice)" if len(names) > 1 else ""
        raise UsageError(
            f"{names[0]}{others}: no codebook has {' and '.join(asked)}: change --at-least, "
            "--at-most, --bits-for or --uniform-within"
        )
    return found


def _root(roots: dict[str, str], name: str) -> str:
    while roots[name] != name:
        roots[name] = roots[roots[name]]
        name = roots[name]
    return name


def _join(roots: dict[str, str], names: Sequence[str]) -> None:
    for name in names[1:]:
        one, other = _root(roots, names[0]), _root(roots, name)
        roots[max(one, other)] = min(one, other)
