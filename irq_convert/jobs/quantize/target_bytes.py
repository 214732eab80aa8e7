"""What choices come to in an artifact: how each weight is quantized then, and how many bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan, replan
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.mix import Bytes
from irq_convert.jobs.sizing.options import TargetOptions


def target_of(options: QuantizeOptions) -> TargetOptions:
    """The target, which is there."""
    assert options.target is not None
    return options.target


def choice_specs(
    choices: Mapping[str, Choice], options: QuantizeOptions
) -> dict[str, QuantSpec | None]:
    """How each weight is quantized, the rest as `options` say."""
    return {name: choice.spec(options.spec) for name, choice in choices.items()}


def whole_bytes(plan: QuantizePlan, options: QuantizeOptions) -> int:
    """What the artifact takes at most; its manifest repeats the options, however long they are."""
    return plan.bytes_at_most + len(json.dumps({"options": options.to_dict()}, indent=2))


def chosen_bytes(
    plan: QuantizePlan, options: QuantizeOptions, choices: Mapping[str, Choice]
) -> int:
    """`whole_bytes` of the artifact that `choices` give."""
    return whole_bytes(replan(plan, choice_specs(choices, options)), options)


def bytes_by_choice(options: QuantizeOptions, quantized: Mapping[str, TensorPlan]) -> Bytes:
    """What a tensor takes with a choice, remembered."""
    known: dict[tuple[str, Choice], int] = {}

    def nbytes(name: str, choice: Choice) -> int:
        key = name, choice
        if key not in known:
            known[key] = replace(quantized[name], spec=choice.spec(options.spec)).nbytes
        return known[key]

    return nbytes
