"""A model without memory: its class asked for its modules, names and shapes, and nothing loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from irq_convert.errors import one_line
from irq_convert.remote_code import trusted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")


class NoModel(Exception):
    """No model can be built; the message says why, in half a sentence."""


def named_class(config: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """The class that a config.json names, and its configuration without a quantization.

    Raises `NoModel` when it names none, one that transformers does not know, or one that does not
    take this configuration.
    """
    import transformers

    known = {key: value for key, value in (config or {}).items() if key != "quantization_config"}
    names = known.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise NoModel("config.json names no architecture")
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise NoModel(f"transformers does not know {name}")
    try:
        with quiet_transformers():
            return architecture, architecture.config_class.from_dict(known)
    except Exception as error:  # any configuration may be wrong for its class in any way
        raise NoModel(_cannot_be_built(name, error)) from error


def ask_model(config: Mapping[str, Any] | None, question: Callable[[Any], T]) -> T:
    """What `question` finds out from the model, on meta, of the class that a config.json names.

    Raises `NoModel` as `named_class`.
    """
    import torch

    architecture, settings = named_class(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = architecture(settings)
        return question(model)
    except Exception as error:
        raise NoModel(_cannot_be_built(architecture.__name__, error)) from error


def _cannot_be_built(name: str, error: Exception) -> str:
    reason = str(error).split("\n")[0][:80] or type(error).__name__
    return f"{name} cannot be built: {reason}"


def empty_causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on meta; `NoModel` where transformers has none."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            found: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trusted()
            )
            return found
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise NoModel(one_line(error)) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from warnings and bars: nothing is going to be run."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
