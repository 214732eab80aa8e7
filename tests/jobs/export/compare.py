"""What an artifact stands for, by the independent reader, and what its export says of it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from irq_convert.artifact.contents import open_artifact
from tests.formats import numpy_reader


@functools.cache
def decoded(artifact: Path) -> dict[str, torch.Tensor]:
    """Float32 weights of all quantized tensors of an artifact that does not change."""
    found = numpy_reader.read_artifact(artifact)
    names = [tensor.name for tensor in open_artifact(artifact).quantized]
    return {name: torch.from_numpy(np.array(found[name])) for name in names}


def tokens(count: int = 24, vocabulary: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, (1, count), generator=generator)


def our_logits(artifact: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of our own loader, `[tokens, vocabulary]`."""
    import irq_convert

    model = irq_convert.load(artifact, dtype=dtype)
    with torch.no_grad():
        return model(tokens()).logits[0].float()
