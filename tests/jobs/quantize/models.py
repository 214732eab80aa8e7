"""Checkpoints to convert, of zeros in any shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from tests.tiny import write_source


def is_linear(name: str) -> bool:
    return "_proj" in name and name.endswith(".weight")


def open_meta(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of zeros in bfloat16 with these names and shapes, opened."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return open_checkpoint(write_source(folder, tensors, config, files={}))
