"""Sizes that no mix has, refused before anything is measured: bytes alone tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from irq_convert.checkpoint.system import format_bytes
from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan
from irq_convert.jobs.quantize.target_bytes import chosen_bytes, target_of
from irq_convert.jobs.sizing.choices import DENSE, Choice
from irq_convert.jobs.sizing.mix import Bytes
from irq_convert.jobs.sizing.rules import Group

Choices = Mapping[str, Choice]


def refuse_unreachable(
    plan: QuantizePlan,
    options: QuantizeOptions,
    groups: Sequence[Group],
    outside: int,
    nbytes: Bytes,
) -> None:
    """Raise `UsageError` where no choices for `groups` are as small as the target.

    Or where the best is to leave every weight as it is. `outside` are the bytes around them.
    """
    _refuse_all_dense(plan, options, groups, outside, nbytes)
    asked = target_of(options)
    least, most = (_extreme(groups, nbytes, pick) for pick in (min, max))
    sizes = [_sum(nbytes, choices) for choices in (least, most)]
    weights = _weights(plan, least)
    if asked.bits is not None:
        if sizes[0] > int(asked.bits * weights / 8):
            low, high = (8 * size / weights for size in sizes)
            raise UsageError(
                f"--target-bits {asked.bits:g}: the choices reach from {low:.4f} to {high:.4f} bits"
            )
        return
    assert asked.size is not None
    if chosen_bytes(plan, options, least) > asked.size:
        low, high = (_size_for(plan, options, choices) for choices in (least, most))
        more = "" if options.include_embeddings else "; --include-embeddings may quantize more"
        raise UsageError(
            f"--target-size {format_bytes(asked.size)}: the choices reach from {format_bytes(low)} "
            f"to {format_bytes(high)}, and {format_bytes(low - sizes[0])} of it are not "
            f"quantized{more}"
        )


def _extreme(
    groups: Sequence[Group], nbytes: Bytes, pick: Callable[[Sequence[int]], int]
) -> Choices:
    """The choices that take least, or most."""
    found: dict[str, Choice] = {}
    for group in groups:
        sizes = [sum(nbytes(n, choice) for n in group.tensors) for choice in group.choices]
        found |= dict.fromkeys(group.tensors, group.choices[sizes.index(pick(sizes))])
    return found


def _sum(nbytes: Bytes, choices: Choices) -> int:
    return sum(nbytes(name, choice) for name, choice in choices.items())


def _weights(plan: QuantizePlan, choices: Choices) -> int:
    return sum(tensor.info.numel for tensor in plan.quantized if tensor.name in choices)


def _size_for(plan: QuantizePlan, options: QuantizeOptions, choices: Choices) -> int:
    """What to ask for to get `choices`: the manifest tells that, too, in more digits or fewer."""
    size = chosen_bytes(plan, options, choices)
    return chosen_bytes(
        plan, replace(options, target=replace(target_of(options), size=size)), choices
    )


def _refuse_all_dense(
    plan: QuantizePlan,
    options: QuantizeOptions,
    groups: Sequence[Group],
    outside: int,
    nbytes: Bytes,
) -> None:
    """Raise `UsageError` where the best mix, found without measuring, is to quantize nothing."""
    asked = target_of(options)
    dense = {name: DENSE for group in groups for name in group.tensors}
    others = any(tensor.name not in dense for tensor in plan.quantized)
    if others or any(DENSE not in group.choices for group in groups):
        return
    if all(group.choices == (DENSE,) for group in groups):
        raise UsageError("--at-least leaves every weight as it is: nothing would be quantized")
    whole, weights = _sum(nbytes, dense), _weights(plan, dense)
    if asked.size is not None and whole + outside <= asked.size:
        raise UsageError(
            f"--target-size {format_bytes(asked.size)}: the model takes "
            f"{format_bytes(whole + outside)} as it is, so nothing would be quantized; ask for less"
        )
    if asked.bits is not None and 8 * whole <= asked.bits * weights:
        raise UsageError(
            f"--target-bits {asked.bits:g}: the model has {8 * whole / weights:g} as it is, so "
            "nothing would be quantized; ask for less"
        )
