"""Is a set of tensors a whole model of its class: transformers' own loader asked, without data.

The loader is given tensors on meta, under the names and in the shapes of the files, so that its
renamings, merges and ties, what it may miss and what it drops, are those of a true load.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.hf.empty_model import NoModel, ask_model, named_class, quiet_transformers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """What a load of the tensors would come to.

    `missing`: what the class has and nothing in the files makes. `misfits`: what would get another
    shape, as (name, shape found, shape wanted). `failed`: what cannot be made of its tensors. All
    by the names of the class.
    """

    missing: tuple[str, ...] = ()
    misfits: tuple[tuple[str, Shape, Shape], ...] = ()
    failed: tuple[str, ...] = ()


def why_unloadable(config: Mapping[str, Any] | None) -> str | None:
    """Half a sentence that says why no library can tell the class from config.json, or None."""
    if config is None:
        return "there is no config.json, so nothing says of which class the model is"
    if "AutoConfig" in (config.get("auto_map") or {}):
        return None
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        return "config.json has no model_type, without which no library can load the model"
    return None


@dataclass(frozen=True)
class Wholeness:
    """What keeps tensors from being a whole model of their class, each in half a sentence.

    `known`: whether the class could be asked. `lacks`: what it needs and does not get. `narrow`: a
    packed tensor that it would take for plain numbers.
    """

    known: bool = False
    lacks: str | None = None
    narrow: str | None = None

    @property
    def why(self) -> str | None:
        """The first of the two; None where nothing is known to be wrong."""
        return self.lacks or self.narrow


def ask_wholeness(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> Wholeness:
    """Whether `tensors` are a whole model of the class that their config.json names.

    Nothing is known of a class that transformers does not have, that brings its own code, or that
    cannot be built here.
    """
    if any(name.startswith("AutoModel") for name in (config or {}).get("auto_map") or ()):
        return Wholeness()
    shapes = {name: info.shape for name, info in tensors.items()}
    try:
        name = named_class(config)[0].__name__
        lacks = _lacks(name, trial_load(config, shapes))
        return Wholeness(True, lacks, ask_model(config, lambda model: _narrow(model, tensors)))
    except NoModel:
        return Wholeness()


def trial_load(config: Mapping[str, Any] | None, shapes: Mapping[str, Shape]) -> Loaded:
    """Load tensors of these `shapes`, without data, into the class that `config` names.

    Raises `NoModel` when the class is not known or cannot be loaded here for another reason.
    """
    import torch

    architecture, settings = named_class(config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with quiet_transformers():
            _, info = architecture.from_pretrained(
                None,
                config=settings,
                state_dict=state,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a class may fail in any way
        failed = _conversions_that_failed(error)
        if failed:
            return Loaded(failed=failed)
        raise NoModel(f"{architecture.__name__} cannot be loaded without data") from error
    misfits = ((name, tuple(found), tuple(want)) for name, found, want in info["mismatched_keys"])
    return Loaded(tuple(sorted(info["missing_keys"])), tuple(sorted(misfits)))


def _conversions_that_failed(error: BaseException) -> tuple[str, ...]:
    """Names whose tensors could not be merged: transformers only logs them, in a table."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if found:
            return tuple(sorted(map(str, found)))
    return ()


def _lacks(name: str, loaded: Loaded) -> str | None:
    if loaded.missing:
        return f"{name} needs {loaded.missing[0]}, which the files do not have" + _more(
            loaded.missing
        )
    if loaded.misfits:
        key, found, wanted = loaded.misfits[0]
        return f"{name} needs {key} as {list(wanted)}, the files have {list(found)}" + _more(
            loaded.misfits
        )
    if loaded.failed:
        return (
            f"{name} needs {loaded.failed[0]}, which cannot be put together: some of its tensors "
            "are missing or of another shape" + _more(loaded.failed)
        )
    return None


def _more(things: tuple[object, ...]) -> str:
    return f" ({len(things) - 1} more)" if things[1:] else ""


def _narrow(model: Any, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor that the class takes for plain numbers, and that holds something packed."""
    from irq_convert.hf.names import places

    state = model.state_dict()
    for place in places(model, tensors):
        info, wanted = tensors[place.tensor], state.get(place.key)
        if wanted is None or not wanted.is_floating_point() or info.dtype in FLOATS:
            continue
        return (
            f"{info.name} {list(info.shape)} in {info.shard.name} is {info.dtype}, which "
            f"{type(model).__name__} would take for the weights themselves"
        )
    return None
