"""What a merge would write and take, without writing anything."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_config import StoredConfig
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.system import free_bytes
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.shard_job import scan_finished
from irq_convert.jobs.merge.fold import RECORD_BYTES, folded_bytes
from irq_convert.jobs.merge.inputs import Inputs, open_inputs
from irq_convert.jobs.merge.job import merge_job
from irq_convert.jobs.merge.memory import available_memory, logits_memory
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.merge.plan import MergePlan, plan_merge
from irq_convert.progress import Progress

_LIBRARIES = 400_000_000
_TILE_BYTES = 56
"""Bytes that a weight of a tile takes in all its forms, read ahead and behind included."""
_LAYER_BYTES = 24
"""The same for a number of a layer's A and B, in float64."""


@dataclass(frozen=True)
class MergeEstimate:
    """`bytes_out` is exact, without the records; `memory` is of the merge, not of its check.

    `finished` of the `shards` are there already; `disk_needed` is for the others.
    """

    base: str
    base_sha256: str
    adapter: str
    kind: str
    adapter_bytes: int
    out: str
    to: str
    how: str
    layers: int
    saved: int
    bytes_out: int
    shards: int
    disk_needed: int
    disk_free: int
    memory: int
    check: str
    finished: int = 0

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def estimate_merge(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeEstimate:
    """What `merge` with the same arguments would do, planned from headers alone.

    Raises what the merge would raise before reading any weight, but for a full disk.
    """
    (progress or Progress()).stage("reading headers")
    options, out = chosen(MergeOptions, options, settings), Path(out)
    inputs = open_inputs(Path(base), Path(adapter), out, options)
    options = options.for_adapter(bool(inputs.adapter.statistics))
    opened = inputs.adapter
    if options.to == MergeTo.ADAPTER:
        size = folded_bytes(opened, inputs.match)
        shards, needed, tile, found = 1, size + RECORD_BYTES, 0, None
    else:
        plan = plan_merge(inputs.artifact, inputs.match, options)
        found = scan_finished(merge_job(plan, inputs, out))
        size, shards = plan.folder.bytes_out, len(plan.folder.shards)
        needed = plan.bytes_needed - (found.nbytes if found else 0)
        tile = _largest_tile(plan)
    widest = max((layer.a.numel + layer.b.numel for layer in opened.layers.values()), default=0)
    moves = [sum(p.numel for p in each.parts) for each in opened.statistics.values()]
    widest += max(moves, default=0)
    return MergeEstimate(
        base=str(base),
        base_sha256=inputs.identity,
        adapter=str(adapter),
        kind=opened.config.kind,
        adapter_bytes=opened.nbytes,
        out=str(out),
        to=options.to.value,
        how=_how(opened.config, options),
        layers=len({*inputs.match.layers, *inputs.match.statistics}),
        saved=len(inputs.match.saved) + len(inputs.match.tokens),
        bytes_out=size,
        shards=shards,
        disk_needed=needed,
        disk_free=free_bytes(out),
        memory=_LIBRARIES + _TILE_BYTES * tile + _LAYER_BYTES * widest,
        check=_check(inputs, options),
        finished=len(found.shards) if found else 0,
    )


def _largest_tile(plan: MergePlan) -> int:
    """Weights of the largest tile."""
    weights = 1
    for tensor in plan.tensors:
        base, limit = tensor.base, plan.options.tile_weights
        if isinstance(base, StoredTensor):
            rows = min(base.shape.rows, base.shape.tile_rows(limit))
            weights = max(weights, rows * base.shape.cols)
        elif tensor.changed or tensor.tokens is not None:
            weights = max(weights, min(limit, math.prod(tensor.shape)))
    return weights


def _how(config: StoredConfig, options: MergeOptions) -> str:
    if options.to == MergeTo.ADAPTER:
        return "folding"
    if options.to == MergeTo.DENSE:
        return "adding"
    if config.rank and not config.pooled:
        return "quantizing again"
    moved = {None: "tau", "both": "scale and tau"}.get(config.statistics, config.statistics)
    return f"moving {moved}"


def _check(inputs: Inputs, options: MergeOptions) -> str:
    """What would be checked, in words."""
    if options.check == Check.NONE:
        return "none"
    if options.check == Check.LAYERS:
        return "layers"
    needed = logits_memory(inputs.artifact, options.to == MergeTo.DENSE)
    fits = needed <= available_memory()
    return (
        f"layers, and logits, which take {needed / 1e9:.1f} GB"
        if fits
        else f"layers; logits would take {needed / 1e9:.1f} GB, more than is free"
    )
