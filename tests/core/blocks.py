"""Blocks of weights for search tests and benchmarks: usual ones, and those that break searches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file

from tests.paths import SHARED

MODELS = SHARED / "models"

Maker = Callable[[int, int, torch.Generator], torch.Tensor]


def _gaussian(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return 0.02 * torch.randn(n, size, generator=rng)


def _student(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom: heavy tails."""
    normal = torch.randn(n, size, 4, generator=rng)
    return 0.02 * normal[..., 0] / (normal[..., 1:] ** 2).mean(dim=2).sqrt()


def _repeated(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """A few distinct values a block, each occurring many times."""
    palette = 0.02 * torch.randn(n, 6, generator=rng)
    return palette.gather(1, torch.randint(6, (n, size), generator=rng))


def _gridded(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Multiples of a power of two, so that crossings coincide."""
    return torch.round(4 * torch.randn(n, size, generator=rng)) / 64


def _constant(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 1, generator=rng).expand(n, size).contiguous()


def _zero(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.zeros(n, size)


def _outlier(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Gaussian with one weight 5 to 1000 times as large as the rest."""
    blocks = _gaussian(n, size, rng)
    at = torch.randint(size, (n, 1), generator=rng)
    sign = torch.randint(2, (n, 1), generator=rng) * 2.0 - 1
    return blocks.scatter(1, at, 0.02 * sign * 10 ** (0.7 + 2.3 * torch.rand(n, 1, generator=rng)))


def _offset(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """A narrow spread around a large mean."""
    return 1.0 + 1e-3 * torch.randn(n, size, generator=rng)


def _tiny(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(n, size, generator=rng) * 2.0**-100


def _huge(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(n, size, generator=rng) * 2.0**110


def _mixed(n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Magnitudes from 2**-60 to 1 in the same block."""
    scale = torch.exp2(-60 * torch.rand(n, size, generator=rng))
    return torch.randn(n, size, generator=rng) * scale


MAKERS: dict[str, Maker] = {
    "gaussian": _gaussian,
    "student": _student,
    "repeated": _repeated,
    "gridded": _gridded,
    "tails": _gaussian,
    "constant": _constant,
    "zero": _zero,
    "outlier": _outlier,
    "offset": _offset,
    "tiny": _tiny,
    "huge": _huge,
    "mixed": _mixed,
}


def real_matrices(model: str = "stories15M") -> list[torch.Tensor]:
    """The linear weights of a model, float32; empty where it is not there."""
    path = MODELS / model / "model.safetensors"
    if not path.exists():
        return []
    tensors = load_file(path)
    names = sorted(name for name in tensors if ".layers." in name and tensors[name].dim() == 2)
    return [tensors[name].float() for name in names]


def _real(n: int, size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` blocks of real linears, rows cut into blocks with their true tails, in random order."""
    blocks, lengths = [], []
    for matrix in real_matrices():
        rows, cols = matrix.shape
        many = -(-cols // size)
        padded = torch.nn.functional.pad(matrix, (0, many * size - cols))
        blocks.append(padded.view(-1, size))
        tail = [size] * (many - 1) + [cols - (many - 1) * size]
        lengths.append(torch.tensor(tail).repeat(rows))
    pick = torch.randperm(sum(map(len, blocks)), generator=rng)[:n]
    return torch.cat(blocks)[pick], torch.cat(lengths)[pick]


def kinds() -> list[str]:
    """Names that `make_blocks` knows; "real" where there are models."""
    return [*MAKERS, *(["real"] if real_matrices() else [])]


def make_blocks(
    kind: str, n: int, size: int = 64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(blocks float32 [n, size], lengths int64 [n])` of a kind; all whole but tails and real."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "real":
        return _real(n, size, rng)
    blocks = MAKERS[kind](n, size, rng)
    lengths = torch.full((n,), size)
    if kind == "tails":
        lengths = torch.randint(1, size, (n,), generator=rng)
        lengths[: size - 1] = torch.arange(1, size)[:n]
    return blocks, lengths
