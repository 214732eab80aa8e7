"""What writes: a model with its adapter and tokenizer, loaded once for any number of prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import CheckedAdapter, check_adapter, put_on
from irq_convert.hf.causal_lm import (
    check_device,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_causal_lm,
)
from irq_convert.jobs.generate.options import GenerateDtype, GenerateOptions
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code

_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


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
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if found and found > 0 else None


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
    check_device(options.device)
    if adapter is not None and not isinstance(adapter, CheckedAdapter):
        adapter = check_adapter(adapter, model, any_base)
    if adapter is not None and adapter.doubt:
        progress.note(adapter.doubt)
    sources = [model] if against is None else [model, against]
    with remote_code(options.trust_remote_code):
        configs = [load_config(source) for source in sources]
        for source, config in zip(sources, configs, strict=True):
            require_causal_lm(source, config)
        own = [_own_tokenizer(model, adapter), *sources[1:]]
        tokenizers = [load_tokenizer(tokenizer or source) for source in own]
        writers = []
        for number, (source, config) in enumerate(zip(sources, configs, strict=True)):
            progress.stage("loading")
            loaded: Any = load_causal_lm(source, _dtype(options, config), options.device)
            ends = _ends(loaded, tokenizers[number])
            _plain_settings(loaded, ends)
            if number == 0 and adapter is not None:
                loaded = put_on(loaded, adapter)
            writers.append(Writer(str(source), loaded, tokenizers[number], ends))
    return writers


def _own_tokenizer(model: str | Path, adapter: CheckedAdapter | None) -> str | Path:
    """An adapter that was trained with new tokens or a template brings them."""
    if adapter is not None:
        folder = Path(adapter.folder)
        if all((folder / name).is_file() for name in _OF_A_TOKENIZER):
            return folder
    return model


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
