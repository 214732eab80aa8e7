"""Artifacts, an adapter and merged ones for the serve scripts; what is there is not made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import irq_convert

TRAINING = {
    "steps": 12,
    "rank": 8,
    "batch_size": 4,
    "sequence_length": 128,
    "learning_rate": 2e-3,
    "dropout": 0.0,
}
"""Enough for an adapter that changes what the model says."""


class Artifacts:
    """Folders below `work`, made from the dense `model` when they are first asked for."""

    def __init__(self, model: Path, text: Path, work: Path) -> None:
        self.model, self.text, self.work = model, text, work
        work.mkdir(parents=True, exist_ok=True)

    def quantized(self, name: str, **settings: Any) -> Path:
        """The artifact called `name`, quantized by `settings`."""
        return self._made(name, lambda out: irq_convert.quantize(self.model, out, **settings))

    def codebook(self, name: str) -> Path:
        """A plain artifact in codebook `name`."""
        return self.quantized(name, codebook=name[:-1], bits=int(name[-1]))

    def adapter(self, base: Path, kind: str) -> Path:
        """An adapter of `kind`, trained a little on `base`."""

        def train(out: Path) -> Any:
            return irq_convert.finetune(base, self.text, out, lora=kind, **TRAINING)

        return self._made(f"{base.name}-{kind}", train)

    def merged(self, base: Path, adapter: Path, to: str, **settings: Any) -> Path:
        """`adapter` merged: "irq", "dense", or "adapter", a plain LoRA."""
        return self._made(
            f"{adapter.name}-{to}",
            lambda out: irq_convert.merge(base, adapter, out, to=to, **settings),
        )

    def exported(self, base: Path, **settings: Any) -> Path:
        """`base` for compressed-tensors."""
        return self._made(
            f"{base.name}-packed",
            lambda out: irq_convert.export(base, out, to="compressed-tensors", **settings),
        )

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        out = self.work / name
        if not out.is_dir():
            print(f"making {name}", flush=True)
            make(out)
        return out
