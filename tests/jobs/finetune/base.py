"""Stories to train on, and a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.jobs.demo.corpus import corpus
from irq_convert.jobs.finetune.options import FinetuneOptions


def write_tales(path: Path, stories: int = 10) -> Path:
    """Some kilobytes of what the model knows, in capitals, which it does not know."""
    path.write_text(corpus(11, stories).upper(), encoding="utf-8")
    return path


def quick(lora: AdapterKind = AdapterKind.IEC, **changes: Any) -> FinetuneOptions:
    """Six small steps on the CPU."""
    settings: dict[str, Any] = {
        "lora": lora,
        **({"rank": 4} if lora.low_rank else {}),
        "steps": 6,
        "batch_size": 4,
        "micro_batch": 2,
        "sequence_length": 48,
        "learning_rate": 1e-3,
        "save_every": 2,
        "eval_every": 3,
        "device": "cpu",
    }
    return FinetuneOptions(**{**settings, **changes})
