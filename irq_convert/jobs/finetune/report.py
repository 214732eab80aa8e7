"""What a run leaves in words and numbers: its report, and `irq_adapter.json` beside the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from irq_convert.jobs.finetune.curve import Point
from irq_convert.jobs.finetune.data import Data
from irq_convert.jobs.finetune.loss import Loss
from irq_convert.jobs.finetune.recipe import Recipe
from irq_convert.version import PRODUCER

FINISHED, INTERRUPTED, DIVERGED = "finished", "interrupted", "diverged"


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    `end` is `finished`, `interrupted` (by signal `signal`; can be resumed) or `diverged`; `step`
    is the step whose adapter lies in the folder, `resumed_from` where this process took over.
    Held-out losses are `before`, of the artifact, at the `start` of an adapter that starts at an
    error, and `after`.
    """

    out: str
    end: str
    signal: int
    step: int
    resumed_from: int
    recipe: Recipe
    data: Data
    base: dict[str, Any]
    trainable: int
    before: Loss | None
    start: Loss | None
    after: Loss | None
    curve: tuple[Point, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "adapter": self.out,
            "base": self.base,
            "lora": self.recipe.lora,
            "seconds": round(self.seconds, 3),
            "resumed_from": self.resumed_from,
            **self.training(),
        }

    def training(self) -> dict[str, Any]:
        """The part that is recorded beside the adapter."""
        losses = [p.loss for p in self.curve if p.loss is not None and p.step <= self.step]
        return {
            "end": self.end,
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "data": self.data.to_dict(),
            "trainable_parameters": self.trainable,
            "losses": {
                "measure": self.recipe.measure,
                "heldout_before": _loss(self.before),
                "heldout_start": _loss(self.start),
                "heldout_after": _loss(self.after),
                "heldout_change": self._change(),
                "last_training": _finite(losses[-1]) if losses else None,
                "heldout": [
                    [p.step, _finite(p.heldout_loss)]
                    for p in self.curve
                    if p.heldout_loss is not None
                ],
            },
        }

    def note(self) -> dict[str, Any]:
        """`irq_adapter.json` (formats/irq-adapter-v1.md)."""
        return {
            "format": "irq-adapter",
            "format_version": 1,
            "producer": PRODUCER,
            "base": self.base,
            "lora": self.recipe.lora,
            "training": self.training(),
        }

    def _change(self) -> dict[str, float | None] | None:
        if self.before is None or self.after is None:
            return None
        value, se = self.after.change_from(self.before)
        return {"value": value, "se": se}


def _loss(loss: Loss | None) -> dict[str, float | int | None] | None:
    if loss is None:
        return None
    return {
        "value": loss.mean,
        "se": loss.se,
        "tokens": sum(loss.counts),
        "examples": len(loss.counts),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
