"""A merge as a job of shards: what tells it from others, and what is noted of each shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.disk import require_space
from irq_convert.core.tensor_stats import decode_stats, encode_stats
from irq_convert.jobs.common.identity import Identity, fingerprint_files, plan_digest
from irq_convert.jobs.common.shard_job import OutputShard, ShardJob, ShardMaker
from irq_convert.jobs.merge.inputs import Inputs
from irq_convert.jobs.merge.options import TauDtype
from irq_convert.jobs.merge.outcome import Outcome
from irq_convert.jobs.merge.pipeline import MergeSettings, merge_shard
from irq_convert.jobs.merge.plan import MergePlan, requantize_settings
from irq_convert.jobs.merge.provenance import describe_adapter
from irq_convert.jobs.merge.stored_moves import Cost, MoveCosts
from irq_convert.progress import Progress


def merge_identity(plan: MergePlan, inputs: Inputs) -> Identity:
    """What has to be the same for a merge to be continued; `IrqError` when a file is unreadable.

    The adapter is told by its checksum, the artifact as a local source is.
    """
    artifact, adapter, options = inputs.artifact, inputs.adapter, plan.options
    headers = ((shard.name, shard.header) for shard in plan.folder.shards)
    noted = json.dumps(artifact.manifest, sort_keys=True).encode()
    return Identity(
        job=f"merge to {options.to.value}",
        source={
            "artifact": inputs.base,
            "manifest": hashlib.sha256(noted).hexdigest(),
            "adapter": describe_adapter(adapter),
        },
        options={**options.to_dict(), **requantize_settings(artifact, options)},
        plan=plan_digest(headers),
        files=fingerprint_files(artifact.checkpoint.folder, artifact.checkpoint.shards),
    )


def merge_job(plan: MergePlan, inputs: Inputs, out: Path) -> ShardJob:
    """The job of writing the shards of `plan`; the progress counts bytes of the result."""
    settings = MergeSettings(inputs.adapter, plan.options)

    def require(there: int, shares: Sequence[Sequence[int]]) -> None:
        require_space(out, plan.bytes_needed - there, "write the merged model")

    def make(number: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
        outcomes = merge_shard(plan.folder.shards[number], folder, settings, progress)
        return {name: encode_outcome(found) for name, found in outcomes.items()}

    def maker(mine: Sequence[int]) -> ShardMaker:
        return make

    return ShardJob(
        out=out,
        source=inputs.artifact.folder,
        overwrite=plan.options.overwrite,
        resume=plan.options.resume,
        identity=merge_identity(plan, inputs),
        shards=tuple(
            OutputShard(s.name, s.nbytes, sum(t.nbytes for t in s.tensors), len(s.tensors))
            for s in plan.folder.shards
        ),
        require=require,
        phase="merging",
        maker=maker,
    )


def encode_outcome(outcome: Outcome) -> dict[str, Any]:
    """`outcome` as JSON; costs that do not fit are Infinity, as Python writes and reads it."""
    return {
        "sums": [outcome.energy, outcome.error, outcome.change],
        "stats": None if outcome.stats is None else encode_stats(outcome.stats),
        "tau": _encode_moves(outcome.tau),
        "scale": _encode_moves(outcome.scale),
    }


def decode_outcome(found: Mapping[str, Any]) -> Outcome:
    """The outcome that `encode_outcome` was given: the same in every figure."""
    stats = found["stats"]
    energy, error, change = found["sums"]
    return Outcome(
        energy,
        error,
        change,
        stats=None if stats is None else decode_stats(stats),
        tau=_decode_moves(found["tau"]),
        scale=_decode_moves(found["scale"]),
    )


def _encode_moves(costs: MoveCosts | None) -> dict[str, Any] | None:
    if costs is None:
        return None
    stored = {kind.value: _encode_cost(cost) for kind, cost in costs.stored.items()}
    return {"moved": _encode_cost(costs.moved), "stored": stored}


def _decode_moves(found: Mapping[str, Any] | None) -> MoveCosts | None:
    if found is None:
        return None
    stored = {TauDtype(kind): Cost(*cost) for kind, cost in found["stored"].items()}
    return MoveCosts(Cost(*found["moved"]), stored)


def _encode_cost(cost: Cost) -> list[float]:
    return [cost.largest, cost.squares, cost.blocks]
