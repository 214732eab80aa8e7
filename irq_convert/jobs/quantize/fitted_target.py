"""Calibrating what a target has chosen: the mix, and what it has to be better than."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from irq_convert.jobs.calibration.loop import layer_files
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.quantize.calibrated import Fitted, calibrated_weights, plan_calibration
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.target import Sized
from irq_convert.progress import Progress


@contextmanager
def fitted_weights(
    sized: Sized,
    model: str,
    out: Path,
    options: QuantizeOptions,
    processes: RunProcesses,
    progress: Progress,
) -> Iterator[tuple[Sized, Fitted | None]]:
    """Lend calibrated weights, as `calibrated_weights`, with the plan that they are of.

    Where a mix has a uniform choice beside it, both are calibrated, and the one with the lower KL
    on held-out windows is what is lent.
    """
    planned = plan_calibration(sized.plan, options, progress, first=processes.ranks.first)
    plans = [sized.plan]
    if planned is not None and sized.other is not None:
        plans.append(sized.other)
    with ExitStack() as lent:
        found: list[Fitted | None] = []
        for number, plan in enumerate(plans):
            own = planned
            if planned is not None and number:
                outputs = {tensor.name: tensor.outputs for tensor in plan.quantized}
                own = replace(planned, layers=layer_files(planned.model, outputs))
            found.append(
                lent.enter_context(
                    calibrated_weights(
                        plan, own, model, out, options, processes, progress, place=number
                    )
                )
            )
        if len(plans) == 1:
            yield sized, found[0]
            return
        kls = [_kl(each) for each in found]
        at = 0 if kls[0] <= kls[1] else 1
        kept = ("mix", "uniform")[at]
        record = {
            **(sized.record or {}),
            "calibrated": {"mix": kls[0], "uniform": kls[1]},
            "kept": kept,
        }
        if kept == "uniform":
            progress.note(
                f"calibrated, one choice for all is better than the mix on held-out windows (KL "
                f"{kls[1]:.4f} against {kls[0]:.4f}), and is kept"
            )
        yield Sized(plans[at], record), found[at]


def _kl(fitted: Fitted | None) -> float:
    """What is kept of a calibration has on held-out windows."""
    assert fitted is not None
    judgement = fitted.weights.judgement
    return min(judgement.kl, judgement.plain)
