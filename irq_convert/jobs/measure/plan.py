"""What is known before a model is run over a text: its linear weights, the windows, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from irq_convert.artifact.importance import is_importance
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.locate import find_folder
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import expand_home, os_errors
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.causal_lm import load_config, require_causal_lm
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import LayeredModel, open_layered
from irq_convert.hf.limits import check_vocabulary, fit_window
from irq_convert.hf.linears import find_linears
from irq_convert.hf.usable import refuse_unusable
from irq_convert.jobs.calibration.options import WINDOW
from irq_convert.jobs.calibration.source import checkpoint_tokenizer
from irq_convert.jobs.calibration.text import Windows, take_windows, tokenize_source
from irq_convert.jobs.measure.options import MeasureOptions
from irq_convert.progress import Progress


@dataclass(frozen=True)
class MeasurePlan:
    """`linears` are looked for, `towers` those of them that belong to towers.

    `layered` is None for a model that has to be loaded whole, and `why` says why.
    """

    checkpoint: Checkpoint
    linears: frozenset[str]
    towers: frozenset[str]
    windows: Windows
    layered: LayeredModel | None
    why: str = ""

    @property
    def window(self) -> int:
        """Tokens that are seen together."""
        return int(self.windows.ids.shape[1])

    @property
    def how(self) -> str:
        """How the model is run, in words."""
        return "whole" if self.layered is None else "layer by layer"


def plan_measure(
    checkpoint: Checkpoint, options: MeasureOptions, progress: Progress
) -> MeasurePlan:
    """Find the linear weights, read the text, and see how the model can be run.

    Raises `UsageError` for a model that predicts no next token, a window longer than its context
    or tokens beyond its vocabulary, `IrqError` for a source that cannot be quantized, and as
    reading the text does.
    """
    if checkpoint.unknown is not None:
        raise UsageError(checkpoint.unknown)
    refuse_unusable(checkpoint)
    every = find_linears(checkpoint.config, checkpoint.tensors, include_towers=True)
    inner = find_linears(checkpoint.config, checkpoint.tensors)
    for name in sorted(inner.tensors):
        info = checkpoint.tensors[name]
        if info.dtype not in FLOATS:
            raise IrqError(
                f"{name} {list(info.shape)} in {info.shard.name} is {info.dtype}: the source is "
                "already quantized; give the original model, in float32, bfloat16 or float16"
            )
    if not inner.tensors:
        raise IrqError(
            f"{checkpoint.folder}: nothing to measure: no linear layer found by {inner.decided_by}"
        )
    layered, why = None, ""
    try:
        layered = open_layered(checkpoint, options.device)
        config = layered.model.config
    except NotLayered as error:
        why = str(error)
        config = load_config(checkpoint.folder)
        require_causal_lm(checkpoint.folder, config)
    options = replace(options, window=fit_window(config, options.window, WINDOW, "--window"))
    progress.stage("reading the text")
    ids, name = tokenize_source(options, checkpoint_tokenizer(checkpoint))
    windows = take_windows(ids, options, name)
    if layered is not None:
        check_vocabulary(layered.model, windows.ids)
    towers = every.tensors - inner.tensors
    return MeasurePlan(checkpoint, every.tensors, towers, windows, layered, why)


def default_output(model: str) -> Path:
    """`NAME-importance.safetensors` in the current folder."""
    name = expand_home(model).resolve().name
    return Path(f"{name or 'model'}-importance.safetensors")


def check_output_file(model: str, out: Path, overwrite: bool) -> None:
    """Refuse an `out` that cannot be written before anything is downloaded or computed.

    Raises `UsageError` for a folder, a file that exists (with `overwrite`, one that is no
    importance), a folder of it that does not, and a file inside the source, of which it would
    become a part.
    """
    with os_errors("look at it", out):
        real = out.resolve()
        if real.is_dir():
            raise UsageError(f"{out}: a folder; name a file in it, as importance.safetensors")
        if not real.parent.is_dir():
            raise UsageError(f"{out}: {real.parent} is no folder; create it or choose another")
        source = find_folder(model)
        if source is not None and real.is_relative_to(source.resolve()):
            raise UsageError(f"{out}: inside the source {model}; choose a folder outside it")
        if not real.exists():
            return
        if not overwrite:
            raise UsageError(f"{out}: exists; choose another file, or --overwrite to replace it")
    if not is_importance(real):
        raise UsageError(
            f"{out}: no file of importance, and only those are overwritten; remove it yourself or "
            "choose another"
        )
