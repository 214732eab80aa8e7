"""How much of ICQ's entropy survives 8-bit scales and taus, and at what squared error.

    python -m tests.bench.stored_entropy [--rows 1024] [--json FILE]

For Gaussian weights and for real ones (stories15M's linears, where it is there) and every
codebook: uncalibrated, the ideal with real-valued (tau, scale), what `quantize_tensor` stores, and
the ideal pair rounded afterwards, by an affine 8-bit grid or by bitsandbytes' 256-entry dynamic
map, both for groups of 256 blocks. "codes again" takes codes from the rounded pair, as a reader
would want them; "codes kept" keeps those of the exact pair and dequantizes with the rounded one,
the order of IR-QLoRA's code. Exits with 1 if less than 90 % of the ideal gain is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numba
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.codebook import CODEBOOKS, Codebook
from irq_convert.core.ideal.search import icq_search
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import QuantSpec
from tests.core.blocks import real_matrices

SIZE = 64
LEAST_KEPT = 0.9
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One variant: mean entropy per code, share of the ideal gain, error over energy."""

    weights: str
    codebook: str
    variant: str
    entropy: float
    kept: float
    relative_error: float


class Totals:
    """Sums over the matrices of one set of weights."""

    def __init__(self) -> None:
        self.bits = self.error = self.energy = 0.0
        self.weights = 0

    def add(self, cut: Cut, codes: torch.Tensor, book: Codebook, pair: Pair) -> None:
        """Count `codes` dequantized with the float32 `pair` of each block."""
        counts = torch.stack([((codes == k) & cut.inside).sum(1) for k in range(len(book.levels))])
        p = counts / cut.lengths
        self.bits -= float((torch.xlogy(p.double(), p.double()).sum(0) * cut.lengths).sum()) / LN2
        levels = torch.from_numpy(book.level_array())
        values = levels[codes.long()] * pair[1][:, None] + pair[0][:, None]
        self.error += float(((cut.blocks - values).double() ** 2)[cut.inside].sum())
        self.energy += float((cut.blocks.double() ** 2)[cut.inside].sum())
        self.weights += int(cut.lengths.sum())


LN2 = float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """A matrix as blocks `[n, SIZE]`, zero-padded, row by row."""

    blocks: torch.Tensor
    lengths: torch.Tensor
    inside: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Cut:
        rows, cols = matrix.shape
        many = -(-cols // SIZE)
        blocks = functional.pad(matrix, (0, many * SIZE - cols)).view(-1, SIZE)
        lengths = torch.full((rows, many), SIZE)
        lengths[:, -1] = cols - (many - 1) * SIZE
        lengths = lengths.flatten()
        return cls(blocks, lengths, torch.arange(SIZE) < lengths[:, None])

    def codes(self, book: Codebook, pair: Pair) -> torch.Tensor:
        """`#{k : w >= tau + m_k * s}` in float32."""
        codes = torch.zeros(self.blocks.shape, dtype=torch.uint8)
        for mid in book.midpoint_array():
            codes += self.blocks >= (pair[0] + float(mid) * pair[1])[:, None]
        return codes

    def plain(self, book: Codebook) -> Pair:
        """Uncalibrated tau and scale."""
        if book.kind == "nf":
            return torch.zeros(len(self.blocks)), self.blocks.abs().amax(dim=1)
        low = self.blocks.masked_fill(~self.inside, torch.inf).amin(dim=1)
        high = self.blocks.masked_fill(~self.inside, -torch.inf).amax(dim=1)
        return (low + high) / 2, (high - low) / 2


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """`[groups, GROUP_SIZE]`, the last group filled up with its last value."""
    short = -len(values) % GROUP_SIZE
    return torch.cat([values, values[-1:].expand(short)]).view(-1, GROUP_SIZE)


def affine(values: torch.Tensor) -> torch.Tensor:
    """Rounded to 256 even steps between the group's least and greatest value."""
    groups = _by_group(values)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    return (low + torch.round((groups - low) / step) * step).flatten()[: len(values)]


def dynamic_map() -> Rounding | None:
    """Rounding as in bitsandbytes' nested statistics; None where it is not installed."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError:
        return None
    entries = create_dynamic_map().sort().values
    middles = (entries[1:] + entries[:-1]) / 2

    def dynamic(values: torch.Tensor) -> torch.Tensor:
        mean = values.mean()
        groups = _by_group(values - mean)
        absmax = groups.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        nearest = entries[torch.bucketize(groups / absmax, middles)]
        return (nearest * absmax + mean).flatten()[: len(values)]

    return dynamic


def variants() -> dict[str, tuple[Rounding, Rounding, bool]]:
    """Roundings after the search by name: (of tau, of scale, whether codes are taken again)."""
    found: dict[str, tuple[Rounding, Rounding, bool]] = {
        "affine tau, affine scale, codes again": (affine, affine, True),
        "affine tau, affine scale, codes kept": (affine, affine, False),
    }
    if dynamic := dynamic_map():
        found |= {
            "affine tau, dynamic scale, codes again": (affine, dynamic, True),
            "dynamic tau, affine scale, codes again": (dynamic, affine, True),
            "dynamic tau, dynamic scale, codes again": (dynamic, dynamic, True),
            "dynamic tau, dynamic scale, codes kept": (dynamic, dynamic, False),
        }
    return found


def measure(label: str, matrices: list[torch.Tensor], book: Codebook) -> list[Row]:
    """Every variant for one codebook, summed over `matrices`."""
    roundings = variants()
    totals = {name: Totals() for name in ("uncalibrated", "ideal", "stored", *roundings)}
    for matrix in matrices:
        cut = Cut.of(matrix)
        plain = cut.plain(book)
        totals["uncalibrated"].add(cut, cut.codes(book, plain), book, plain)
        found = icq_search(cut.blocks, book, lengths=cut.lengths)
        exact = (found.tau, found.scale)
        totals["ideal"].add(cut, cut.codes(book, exact), book, exact)
        spec = QuantSpec(codebook=book.name, block_size=SIZE, objective="entropy")
        q, _ = quantize_with_stats(matrix, spec)
        stored = (
            expand_statistic(q.tau, q.tau_grid).flatten(),
            expand_statistic(q.scale, q.scale_grid).flatten(),
        )
        totals["stored"].add(cut, cut.codes(book, stored), book, stored)
        for name, (of_tau, of_scale, again) in roundings.items():
            rounded = (of_tau(exact[0]), of_scale(exact[1]))
            codes = cut.codes(book, rounded if again else exact)
            totals[name].add(cut, codes, book, rounded)
    bits = {name: t.bits / t.weights for name, t in totals.items()}
    gain = bits["ideal"] - bits["uncalibrated"]
    return [
        Row(
            weights=label,
            codebook=book.name,
            variant=name,
            entropy=bits[name],
            kept=(bits[name] - bits["uncalibrated"]) / gain,
            relative_error=t.error / t.energy,
        )
        for name, t in totals.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024, help="Gaussian rows of 4096 weights")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    numba.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    sets = {"gaussian": [0.02 * torch.randn(options.rows, 4096, generator=rng)]}
    sets["stories15M"] = real_matrices()
    rows: list[Row] = []
    for label, matrices in sets.items():
        for book in CODEBOOKS.values() if matrices else ():
            print(f"\n{label} {book.name:32} {'entropy':>8} {'kept':>8} {'rel. error':>10}")
            for row in measure(label, matrices, book):
                rows.append(row)
                print(
                    f"  {row.variant:40} {row.entropy:8.4f} {100 * row.kept:7.1f}% "
                    f"{row.relative_error:10.6f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    least = min(row.kept for row in rows if row.variant == "stored")
    print(f"\nLeast share of the ideal gain that is stored: {100 * least:.1f} %")
    return 0 if least >= LEAST_KEPT else 1


if __name__ == "__main__":
    sys.exit(main())
