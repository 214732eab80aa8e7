"""How far a stream is from the source: KL divergence of its logits on the held-out windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch

from irq_convert.errors import IrqError
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.states import StateFile
from irq_convert.jobs.common.metrics import MeanEstimate, ratio_estimate, token_scores


@dataclass(frozen=True)
class Judgement:
    """KL(source || quantized), nats a token on held-out windows, and its standard error.

    `plain` is the same model quantized without data. `better`: whether data has helped.
    """

    kl: float
    kl_se: float | None
    plain: float
    plain_se: float | None

    @property
    def better(self) -> bool:
        return self.kl < self.plain

    def to_dict(self) -> dict[str, float | None]:
        """All fields, for JSON."""
        return asdict(self)


def judge(
    model: LayeredModel,
    ids: torch.Tensor,
    streams: Mapping[str, tuple[StateFile, int]],
    tables: Mapping[str, torch.Tensor],
) -> Judgement:
    """`divergences` of the streams "quantized" and "plain"."""
    found = divergences(model, ids, streams, tables)
    own, plain = found["quantized"], found["plain"]
    return Judgement(own.value, own.se, plain.value, plain.se)


def divergences(
    model: LayeredModel,
    ids: torch.Tensor,
    streams: Mapping[str, tuple[StateFile, int]],
    tables: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, MeanEstimate]:
    """KL divergence to the stream "source" of every other one, all behind the last layer.

    `ids` are the held-out windows; each stream has them from the window on that is given with it.
    `tables` are embeddings and heads as the artifact has them, by tensor, where it has its own.
    Called inside `model.outside()`. Raises `IrqError` for logits that are not finite.
    """
    sums: dict[str, list[float]] = {name: [] for name in streams if name != "source"}
    for number in range(len(ids)):
        one = ids[number : number + 1]

        def logits(name: str, number: int = number, one: torch.Tensor = one) -> torch.Tensor:
            file, first = streams[name]
            states = file.read(first + number, first + number + 1).to(model.device)
            return model.finish(one, states)[0, :-1].cpu()

        reference = logits("source")
        if not reference.isfinite().all():
            raise IrqError(
                "the source model itself gives NaN or infinite logits on this text: nothing can be "
                "calibrated or judged by it"
            )
        for name, found in sums.items():
            with model.source.replaced(model.model, tables):
                made = logits(name)
            kl = token_scores(made, one[0, 1:], reference).kl
            assert kl is not None
            found.append(float(kl.sum()))
    counts = torch.full((len(ids),), ids.shape[1] - 1)
    means = {name: ratio_estimate(torch.tensor(found), counts) for name, found in sums.items()}
    for name, mean in means.items():
        if not mean.value == mean.value:
            raise IrqError(f"the {name} model gives NaN or infinite logits on this text")
    return means
