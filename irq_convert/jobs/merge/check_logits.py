"""The check of a finished merge as a whole: its logits against those of base plus adapter.

Both models are loaded, one after the other and in float32, where memory allows, and run on a few
fixed token ids. It is the check that no name, setting or file was lost on the way, since it goes
through transformers and PEFT as a user does; the layers' check is the sharp one.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.adapter_kinds import IEC_LORA
from irq_convert.artifact.contents import Artifact
from irq_convert.errors import IrqError, one_line
from irq_convert.jobs.merge.check_layers import ROUNDING
from irq_convert.jobs.merge.match import Match
from irq_convert.jobs.merge.memory import available_memory, logits_memory
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo, TauDtype
from irq_convert.jobs.merge.report import LogitsCheck
from irq_convert.progress import Progress
from irq_convert.remote_code import trusted

ROWS, TOKENS = 2, 16
FLOOR = 1e-4
"""What float32 arithmetic alone may change logits by."""
GROWTH = 8.0
"""Roundings of many layers add up at random: allowed is this times their root of the count."""


_AS_NAMED = Match({}, {})


class _Unfit(Exception):
    """The models cannot be compared here; the reason is the message."""


class _NoMemory(_Unfit):
    """They would not fit."""


def check_logits(
    artifact: Artifact,
    adapter: StoredAdapter,
    result: Path,
    rounded: Iterable[str],
    options: MergeOptions,
    progress: Progress,
    match: Match = _AS_NAMED,
) -> LogitsCheck:
    """Compare the logits of `result` with those of `artifact` plus `adapter`.

    `rounded` are the dtypes that numbers of the result were rounded to, tau's left aside.
    With `Check.AUTO` models that do not fit in memory, or that cannot be run on token ids, are
    left alone and the reason is returned; with `Check.LOGITS` that is an `IrqError`, and so is in
    either case a difference that the result's dtype does not explain.
    """
    try:
        _check_room(artifact, options)
        progress.stage("checking logits")
        with _quiet():
            wanted, without = _wanted(artifact, adapter, match)
            found = _found(artifact, adapter, result, options, match)
    except _Unfit as unfit:
        if options.check == Check.LOGITS:
            raise IrqError(f"--check logits: {unfit}; use --check layers") from None
        return LogitsCheck(reason=str(unfit))
    difference = relative_difference(found, wanted)
    tolerance = _tolerance(artifact, adapter, rounded, options)
    if tolerance is not None and not difference <= tolerance:
        raise IrqError(
            f"the result's logits differ from base plus adapter by {difference:.3g} of the "
            f"largest, more than {tolerance:.3g}: it was not kept (--check layers leaves this out)"
        )
    return LogitsCheck(difference, relative_difference(without, wanted), tolerance)


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of two tensors over the largest magnitude of `wanted`."""
    largest = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / (largest or 1.0)


def _check_room(artifact: Artifact, options: MergeOptions) -> None:
    needed = logits_memory(artifact, options.to == MergeTo.DENSE)
    free = available_memory()
    if needed > free:
        raise _Unfit(
            f"the models need about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        )


def _tolerance(
    artifact: Artifact, adapter: StoredAdapter, rounded: Iterable[str], options: MergeOptions
) -> float | None:
    """What rounding explains; None where weights were quantized again or tau is not exact."""
    kept = adapter.config.pooled or not adapter.config.rank
    if options.to == MergeTo.IRQ and not (kept and options.stored == TauDtype.FLOAT32):
        return None
    unit = max((ROUNDING.get(dtype, 0.0) for dtype in rounded), default=0.0)
    return max(FLOOR, GROWTH * unit * math.sqrt(max(1, len(artifact.quantized))))


def probe_ids(vocabulary: int) -> torch.Tensor:
    """The fixed token ids, int64 `[ROWS, TOKENS]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator)


def _wanted(
    artifact: Artifact, adapter: StoredAdapter, match: Match
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of base plus adapter, and of the base alone."""
    with _loaded(lambda: _base_model(artifact.folder, match.rows)) as base:
        without = _logits(base)
        iec = adapter.config.peft_type == IEC_LORA
        with _adapted(base, adapter.folder, iec, match.inside) as model:
            return _logits(model), without


def _found(
    artifact: Artifact, adapter: StoredAdapter, result: Path, options: MergeOptions, match: Match
) -> torch.Tensor:
    """Logits of the result. Base plus adapter have run here, so that must, too."""
    try:
        return _result(artifact, adapter, result, options, match)
    except _NoMemory:
        raise
    except _Unfit as unfit:
        raise IrqError(f"the result does not run as base plus adapter do: {unfit}") from unfit


def _result(
    artifact: Artifact, adapter: StoredAdapter, result: Path, options: MergeOptions, match: Match
) -> torch.Tensor:
    if options.to == MergeTo.IRQ:
        with _loaded(lambda: _base_model(result)) as model:
            return _logits(model)
    if options.to == MergeTo.DENSE:
        with _loaded(lambda: _dense_model(result)) as model:
            return _logits(model)
    with (
        _loaded(lambda: _base_model(artifact.folder, match.rows)) as base,
        _adapted(base, result, iec=False, inside=match.inside) as model,
    ):
        return _logits(model)


@contextmanager
def _loaded(load: Callable[[], Any]) -> Iterator[Any]:
    """A model, given back before the next one is loaded; failing to load is a reason."""
    try:
        model = load()
    except (MemoryError, torch.OutOfMemoryError):
        raise _NoMemory("not enough memory to load the models") from None
    except Exception as error:  # any class may fail on any configuration in any way
        raise _Unfit(f"the model cannot be loaded ({one_line(error)})") from error
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from drawing bars and warning: this is our own affair."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _base_model(folder: Path, rows: int | None = None) -> Any:
    from irq_convert.hf.loading import load

    model = load(folder, dtype=torch.float32)
    if rows is not None:
        torch.manual_seed(0)  # new rows are random until the adapter brings its own
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _dense_model(folder: Path) -> Any:
    from transformers import AutoConfig

    from irq_convert.hf.loading import model_class

    code = {"trust_remote_code": trusted()}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **code)
    loaded: Any = model_class(config).from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        **code,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise IrqError(f"the result lacks {missing[0]}")
    return model


@contextmanager
def _adapted(base: Any, folder: Path, iec: bool, inside: str | None) -> Iterator[Any]:
    """`base` with the adapter in `folder`, through PEFT, on its module `inside`."""
    if inside is None:
        raise _Unfit("the adapter's names are those of another version of the class")
    try:
        from peft import PeftModel

        if iec:
            from irq_convert.adapters.register import register

            register()
        part = base.get_submodule(inside)
        model = PeftModel.from_pretrained(part, str(folder), local_files_only=True)
    except Exception as error:  # peft may be missing, or refuse in any way
        raise _Unfit(f"PEFT does not load the adapter ({one_line(error)})") from error
    yield base.eval() if inside else model.eval()


def _logits(model: Any) -> torch.Tensor:
    """Logits on the probe, float64; `_Unfit` for a model that does not work on token ids."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    vocabulary = getattr(config, "vocab_size", None)
    if type(vocabulary) is not int or vocabulary < 1:
        raise _Unfit("the model has no vocabulary to draw a probe from")
    try:
        with torch.inference_mode():
            logits = model(input_ids=probe_ids(vocabulary)).logits
    except Exception as error:  # another kind of model
        raise _Unfit(f"the model does not run on token ids ({one_line(error)})") from error
    return logits.double()
