"""Runs towards a teacher, small ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.prepare import Preparation, prepare
from tests.paths import DEMO

from .base import quick


def taught(lora: AdapterKind = AdapterKind.IEC, **changes: Any) -> FinetuneOptions:
    """`quick` towards the demo model."""
    return dataclasses.replace(quick(lora, teacher=str(DEMO)), **changes)


def prepared(artifact: Path, tales: Path, **changes: Any) -> Preparation:
    """What is known of a run before it has a teacher's logits."""
    return prepare(artifact, tales, taught(**changes))
