"""What lies early counts for more than is expected of it: a factor for each part of the depth.

At 2 bits an error of an early layer grows on its way through the others, which their Fisher
information at the source does not tell. So the layers are cut into bands, and for each band the
held-out windows run with it at 3 bits and all else at 2: how far that brings the model back, over
what was expected of it, is the factor of its weights. Factors are of one mean: the whole way from 2
bits to 3 is what it was seen to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from irq_convert.artifact.sensitivity import Width
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.sites import find_sites
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.sizing.choices import Choice

BANDS = 6
LOW, HIGH = 2, 3
LARGEST = 4.0
"""A factor is at most that, and at least one over it: the windows that tell it are few."""


@dataclass(frozen=True)
class Bands:
    """Tensors of the files by band, and the choices that stand for 2 and for 3 bits."""

    tensors: tuple[frozenset[str], ...]
    low: Choice
    high: Choice

    @classmethod
    def of(
        cls, model: LayeredModel, tensors: Sequence[str], widths: Mapping[str, Choice]
    ) -> Bands | None:
        """Bands of about equally many layers of `model`; None where there is nothing to compare."""
        low, high, layers = widths.get(str(LOW)), widths.get(str(HIGH)), len(model.layers)
        if low is None or high is None or layers < 2:
            return None
        found: list[set[str]] = [set() for _ in range(min(BANDS, layers))]
        for number in range(layers):
            own = found[number * len(found) // layers]
            for site in find_sites(model, number, tensors):
                own |= {stored.tensor for stored in site.stored}
        return cls(tuple(frozenset(own) for own in found if own), low, high)

    def streams(
        self, every: Sequence[str], base: QuantSpec
    ) -> dict[str, dict[str, QuantSpec | None]]:
        """By a name, how `every` tensor is quantized: one band at 3 bits, all others at 2."""
        low, high = self.low.spec(base), self.high.spec(base)
        return {
            _name(at): {name: high if name in own else low for name in every}
            for at, own in enumerate(self.tensors)
        }

    def factors(
        self,
        damages: Mapping[str, np.ndarray],
        choices: Sequence[str],
        widths: Mapping[int, Width],
        seen: Mapping[str, MeanEstimate],
    ) -> dict[str, float]:
        """By tensor, what was seen over what was expected; none where a width tells nothing."""
        if LOW not in widths or HIGH not in widths:
            return {}
        ends = [
            (choices.index(str(choice)), widths[choice.bits].factor)
            for choice in (self.low, self.high)
        ]
        (low, of_low), (high, of_high) = ends
        gained = [
            max(0.0, widths[LOW].kl - seen[_name(at)].value) for at in range(len(self.tensors))
        ]
        expected = [
            sum(float(damages[n][low] * of_low - damages[n][high] * of_high) for n in own)
            for own in self.tensors
        ]
        if not all(each > 0 for each in (sum(gained), *expected)):
            return {}
        scale = sum(expected) / sum(gained)
        found: dict[str, float] = {}
        for own, gain, hoped in zip(self.tensors, gained, expected, strict=True):
            factor = min(LARGEST, max(1 / LARGEST, scale * gain / hoped))
            found |= dict.fromkeys(own, factor)
        return found


def _name(band: int) -> str:
    return f"band {band}"
