"""The job: a model and a text in, the mean squares of what its linear weights are given out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.importance import Importance, write_importance
from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.locate import Fetch, find_folder, locate, open_source
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import expand_home, free_bytes
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.causal_lm import check_device
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.measure.options import MeasureOptions
from irq_convert.jobs.measure.plan import (
    MeasurePlan,
    check_output_file,
    default_output,
    plan_measure,
)
from irq_convert.jobs.measure.report import MeasureEstimate, MeasureReport
from irq_convert.jobs.measure.run import Pass, whole_bytes
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code


def measure(
    model: str | Path,
    out: Path | str | None = None,
    options: MeasureOptions | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MeasureReport:
    """Write the file `out`: how much each input column of the linear weights of `model` counts.

    `options`, or single `settings` of `MeasureOptions`: at least `text`. `model` is a folder or a
    Hub id, and is run once over the text, one layer in memory at a time where its class allows.
    The file is for `quantize(importance=...)`, and exists whole or not at all.

    Raises `UsageError` where model, text, output and options do not fit together; `IrqError` for a
    source that cannot be read or quantized, inputs that overflow, or a disk that refuses.
    """
    begun = time.perf_counter()
    options = chosen(MeasureOptions, options, settings)
    progress = progress or Progress()
    model, target = str(model), _checked(str(model), out, options)
    with remote_code(options.trust_remote_code):
        checkpoint = _open(model, revision, options)
        checkpoint.fetcher.keep = not options.stream
        with checkpoint.fetcher:
            checkpoint.fetcher.tell = lambda text: progress.stage(text or "measuring")
            progress.stage("planning")
            plan = plan_measure(checkpoint, options, progress)
            found, experts, how = _run(plan, model, target, options, revision, progress)
            unreached = _unreached(plan, found, experts, progress)
    windows, tokens = plan.windows, plan.windows.ids.numel()
    source = describe_source(checkpoint, model)
    importance = Importance(found, windows.name, tokens, plan.window, windows.sha256, source)
    progress.stage("writing")
    size = write_importance(target, importance)
    return MeasureReport(
        out=str(target),
        model=model,
        text=windows.name,
        tokens=tokens,
        windows=len(windows.ids),
        window=plan.window,
        how=how,
        linear=len(plan.linears),
        tensors=len(found),
        unreached=unreached,
        experts=experts,
        bytes=size,
        seconds=time.perf_counter() - begun,
    )


def estimate_measure(
    model: str | Path,
    out: Path | str | None = None,
    options: MeasureOptions | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MeasureEstimate:
    """What `measure` with the same arguments would do, by headers and the text alone.

    Raises what measuring would raise before reading any weight.
    """
    options = chosen(MeasureOptions, options, settings)
    progress = progress or Progress()
    model, target = str(model), _checked(str(model), out, options)
    with remote_code(options.trust_remote_code):
        checkpoint = _open(model, revision, options)
        try:
            progress.stage("planning")
            plan = plan_measure(checkpoint, options, progress)
        finally:
            checkpoint.fetcher.close(done=False)
    layered = plan.layered
    ids = plan.windows.ids
    width = 0 if layered is None else layered.model.get_input_embeddings().weight.shape[1]
    return MeasureEstimate(
        out=str(target),
        model=model,
        text=plan.windows.name,
        tokens=ids.numel(),
        windows=len(ids),
        window=plan.window,
        how=plan.how,
        linear=len(plan.linears),
        disk_needed=4 * ids.numel() * width,
        disk_free=free_bytes(target.resolve().parent),
        memory=whole_bytes(checkpoint) if layered is None else layered.held_bytes,
    )


def _checked(model: str, out: Path | str | None, options: MeasureOptions) -> Path:
    """The output; everything is checked that can be without opening the model."""
    if not Ranks.from_environment().alone:
        raise UsageError("measure runs in one process: start it without torchrun")
    if options.device == "auto":
        raise UsageError("--device auto: name one, as cpu or cuda")
    check_device(options.device)
    target = default_output(model) if out is None else expand_home(out)
    check_output_file(model, target, options.overwrite)
    return target


def _open(model: str, revision: str | None, options: MeasureOptions) -> Checkpoint:
    fetch = Fetch.STREAM if options.stream else Fetch.AS_READ
    return open_source(model, revision, fetch, SourceHints(llama_version=options.llama_version))


def _run(
    plan: MeasurePlan,
    model: str,
    out: Path,
    options: MeasureOptions,
    revision: str | None,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], int, str]:
    """Mean squares, experts that no token reached, and how the model was run."""
    run = Pass(plan.windows.ids, plan.linears, out, progress, options.threads)
    why = plan.why
    if plan.layered is not None:
        try:
            return run.layered(plan.layered), run.unreached, plan.how
        except NotLayered as error:
            why = str(error)
    progress.note(f"the model is loaded whole, since it cannot be run layer by layer: {why}")
    local = find_folder(model, revision) is not None
    folder = plan.checkpoint.folder if local else locate(model, revision).folder
    return run.whole(folder, plan.checkpoint, options.device), run.unreached, "whole"


def _unreached(
    plan: MeasurePlan, found: dict[str, np.ndarray], experts: int, progress: Progress
) -> tuple[str, ...]:
    """Weights that the text has not reached, which a person is told of."""
    missing = plan.linears - set(found)
    inner, towers = sorted(missing - plan.towers), missing & plan.towers
    if not found:
        raise IrqError(
            f"{plan.checkpoint.folder}: nothing was measured: the text reaches none of its "
            f"{len(missing)} linear weights, the first is {min(missing)}"
        )
    if inner:
        progress.note(
            f"{len(inner)} linear weights are not reached by the text and left out, the first is "
            f"{inner[0]}: keep them (--keep) when you quantize with this file"
        )
    if towers:
        progress.note(f"{len(towers)} linear weights of towers see no text and are left out")
    if experts:
        progress.note(
            f"{experts} experts were reached by no token and have the mean of their layer's: more "
            "--tokens help"
        )
    return tuple(sorted(missing))
