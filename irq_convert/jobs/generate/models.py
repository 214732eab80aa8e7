"""What writes: a model with its adapter and tokenizer, loaded once for any number of prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import CheckedAdapter
from irq_convert.adapters.runnable import check_runnable
from irq_convert.hf.limits import longest_context
from irq_convert.jobs.generate.options import GenerateDtype, GenerateOptions
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code


@dataclass(frozen=True)
class Writer:
    """A model that writes; `ends` are the ids of tokens after which it has nothing to add."""

    name: str
    model: Any
    tokenizer: Any
    ends: frozenset[int]

    @property
    def positions(self) -> int | None:
        """How many tokens it can take together, prompt and text; None where it does not say."""
        return longest_context(self.model.config)


def load_writers(
    model: str | Path,
    *,
    adapter: str | Path | CheckedAdapter | None = None,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    any_base: bool = False,
    options: GenerateOptions,
    progress: Progress | None = None,
) -> list[Writer]:
    """`model` with its adapter, and after it, where one is given, the model `against`.

    Each brings its own tokenizer, an adapter's folder before its base, unless `tokenizer` names one
    for both. Everything cheap is checked before weights are loaded; an adapter must have been
    trained on `model` unless `any_base`. Raises `UsageError` where they do not fit together or are
    no causal language models, `IrqError` where a file or a model cannot be read.
    """
    progress = progress or Progress()
    with remote_code(options.trust_remote_code):
        models = check_runnable(
            model,
            adapter=adapter,
            against=against,
            tokenizer=tokenizer,
            any_base=any_base,
            device=options.device,
        )
        on_it = models[0].adapter
        if on_it is not None and on_it.doubt:
            progress.note(on_it.doubt)
        writers = []
        for each in models:
            progress.stage("loading")
            loaded = each.load(_dtype(options, each.config), options.device)
            ends = _ends(loaded, each.tokenizer)
            _plain_settings(loaded, ends)
            writers.append(Writer(each.name, loaded, each.tokenizer, ends))
    return writers


def _dtype(options: GenerateOptions, config: Any) -> torch.dtype:
    if options.dtype != GenerateDtype.AUTO:
        found: torch.dtype = getattr(torch, options.dtype)
        return found
    own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) and own.is_floating_point else torch.float32


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens by the model's generation settings, its configuration and its tokenizer.

    A model that was taught to chat ends an answer by a token that often only one of them names.
    """
    named = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    ends: set[int] = set()
    for each in named:
        ends.update(each if isinstance(each, Collection) else () if each is None else (each,))
    return frozenset(ends)


def _plain_settings(model: Any, ends: frozenset[int]) -> None:
    """Take a model's own habits of sampling away: generate would mix them with what is asked."""
    from transformers import GenerationConfig

    pad = min(ends, default=None)
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad)
