"""Models that are run as they are, alone or beside another: checked before any weight is loaded."""

from __future__ import annotations

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

_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Runnable:
    """The causal language model `source`, a folder or a Hub id, with its configuration, the
    `adapter` to be put on it, and the tokenizer to be used."""

    source: str | Path
    config: Any
    tokenizer: Any
    adapter: CheckedAdapter | None = None

    @property
    def name(self) -> str:
        """For people: the source, and the adapter by the name of its folder."""
        more = "" if self.adapter is None else f" + {Path(self.adapter.folder).name}"
        return f"{self.source}{more}"

    def load(self, dtype: torch.dtype, device: str) -> Any:
        """The model, the adapter on it. Raises as `load_causal_lm` and `put_on`."""
        model = load_causal_lm(self.source, dtype, device)
        return model if self.adapter is None else put_on(model, self.adapter)


def check_runnable(
    model: str | Path,
    *,
    adapter: str | Path | CheckedAdapter | None = None,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    any_base: bool = False,
    device: str = "cpu",
) -> list[Runnable]:
    """`model` with its adapter, and after it, where one is given, the model `against`.

    Each brings its own tokenizer, an adapter's folder before its base, unless `tokenizer` names one
    for both. Raises `UsageError` where they are no causal language models, `device` cannot be used,
    or the adapter was trained on another model and not `any_base`; `IrqError` where a file is
    missing or damaged.
    """
    check_device(device)
    if adapter is not None and not isinstance(adapter, CheckedAdapter):
        adapter = check_adapter(adapter, model, any_base)
    sources = [model] if against is None else [model, against]
    configs = [load_config(source) for source in sources]
    for source, config in zip(sources, configs, strict=True):
        require_causal_lm(source, config)
    found = []
    for source, config, on_it in zip(sources, configs, (adapter, None), strict=False):
        encoder = load_tokenizer(tokenizer or _own_tokenizer(source, on_it))
        found.append(Runnable(source, config, encoder, on_it))
    return found


def _own_tokenizer(model: str | Path, adapter: CheckedAdapter | None) -> str | Path:
    """An adapter that was trained with new tokens or a template brings them."""
    if adapter is not None:
        folder = Path(adapter.folder)
        if all((folder / name).is_file() for name in _OF_A_TOKENIZER):
            return folder
    return model
