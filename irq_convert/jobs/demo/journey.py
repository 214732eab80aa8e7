"""The second half of the demo: adapters trained on the 2-bit artifact and merged each way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import check_adapter, put_on
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.hf.causal_lm import load_causal_lm
from irq_convert.jobs.demo.corpus import HELDOUT_SEED, corpus
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.options import MATRICES, FinetuneOptions
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import MergeOptions, MergeTo

STORIES = 400
RECIPE: dict[str, Any] = {
    "rank": 16,
    "dropout": 0.0,
    "steps": 50,
    "batch_size": 8,
    "micro_batch": 8,
    "learning_rate": 3e-3,
    "max_grad_norm": 1.0,
    "sequence_length": 128,
    "device": "cpu",
}
MERGES = (
    (AdapterKind.PLAIN, MergeTo.DENSE),
    (AdapterKind.IEC, MergeTo.DENSE),
    (AdapterKind.IEC, MergeTo.ADAPTER),
    (AdapterKind.BLOCK, MergeTo.DENSE),
    (AdapterKind.BLOCK, MergeTo.IRQ),
)


@dataclass(frozen=True)
class DemoStep:
    """One line of the second table: what a step took, the folder it wrote, what it is worth."""

    name: str
    seconds: float | None
    megabytes: float
    perplexity: float
    perplexity_se: float | None

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def run_journey(
    folder: Path,
    artifact: Path,
    windows: Sequence[torch.Tensor],
    options: EvalOptions,
    note: Callable[[str], None],
) -> Iterator[DemoStep]:
    """Finetune `artifact` each way and merge each way, into `folder`; measure on `windows`."""
    data = folder / "stories.txt"
    data.write_text(corpus(HELDOUT_SEED + 1, STORIES), encoding="utf-8")

    def measured(name: str, where: Path, seconds: float | None, adapter: Path | None) -> DemoStep:
        found = evaluate_windows(_load(where, adapter), windows, options)
        size = sum(path.stat().st_size for path in (adapter or where).rglob("*") if path.is_file())
        return DemoStep(name, seconds, size / 1e6, found.perplexity, found.perplexity_se)

    yield measured("2 bit, ICQ", artifact, None, None)
    adapters = {}
    for kind in AdapterKind:
        note(f"finetuning, {kind.value}")
        adapters[kind] = folder / f"adapter-{kind.value}"
        begun = time.perf_counter()
        finetune(artifact, data, adapters[kind], FinetuneOptions(lora=kind, **_recipe(kind)))
        seconds = time.perf_counter() - begun
        yield measured(f"finetune --lora {kind.value}", artifact, seconds, adapters[kind])
    for kind, target in MERGES:
        note(f"merging {kind.value} to {target.value}")
        out = folder / f"merged-{kind.value}-{target.value}"
        report = merge(artifact, adapters[kind], out, MergeOptions(to=target))
        name = f"merge --to {target.value}, {kind.value}"
        alone = target is MergeTo.ADAPTER
        yield measured(name, artifact if alone else out, report.seconds, out if alone else None)


def _recipe(kind: AdapterKind) -> dict[str, Any]:
    """What matrices have is left out of a kind that has none."""
    return {name: v for name, v in RECIPE.items() if kind.low_rank or name not in MATRICES}


def _load(where: Path, adapter: Path | None) -> Any:
    model = load_causal_lm(str(where))
    return model if adapter is None else put_on(model, check_adapter(adapter, where))
