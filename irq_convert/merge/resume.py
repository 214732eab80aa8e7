"""A merge as a job of shards: what tells it from others, and what is noted of each shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.disk import require_space
from irq_convert.checkpoint.writer import build_header
from irq_convert.convert.resume import decode_stats, encode_stats
from irq_convert.jobs.identity import Identity, fingerprint_files, plan_digest
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.run import Job, Maker, Part
from irq_convert.merge.inputs import Inputs
from irq_convert.merge.options import Tau
from irq_convert.merge.outcome import Outcome
from irq_convert.merge.pipeline import Means, merge_shard
from irq_convert.merge.plan import MergePlan, noted_means
from irq_convert.merge.records import describe_adapter, describe_base
from irq_convert.merge.tau import Cost, TauCosts


def merge_identity(plan: MergePlan, inputs: Inputs) -> Identity:
    """What has to be the same for a merge to be continued; `IrqError` when a file is unreadable.

    The adapter is told by its checksum, the artifact as a local source is.
    """
    artifact, adapter, options = inputs.artifact, inputs.adapter, plan.options
    headers = ((s.name, build_header(s.outputs, {"format": "pt"})) for s in plan.shards)
    noted = json.dumps(artifact.manifest, sort_keys=True).encode()
    return Identity(
        job=f"merge to {options.to.value}",
        source={
            "artifact": describe_base(artifact, inputs.identity),
            "manifest": hashlib.sha256(noted).hexdigest(),
            "adapter": None if adapter is None else describe_adapter(adapter),
        },
        options={**options.to_dict(), **noted_means(artifact, options)},
        plan=plan_digest(headers),
        files=fingerprint_files(artifact.checkpoint.folder, artifact.checkpoint.shards),
    )


def merge_job(plan: MergePlan, inputs: Inputs, out: Path) -> Job:
    """The job of writing the shards of `plan`; the progress counts bytes of the result."""
    means = Means(inputs.adapter, plan.options)

    def require(there: int, shares: Sequence[Sequence[int]]) -> None:
        require_space(out, plan.bytes_needed - there, "write the merged model")

    def make(number: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
        outcomes = merge_shard(plan.shards[number], folder, means, progress)
        return {name: encode_outcome(found) for name, found in outcomes.items()}

    def maker(mine: Sequence[int]) -> Maker:
        return make

    return Job(
        out=out,
        source=inputs.artifact.folder,
        overwrite=plan.options.overwrite,
        resume=plan.options.resume,
        identity=merge_identity(plan, inputs),
        parts=tuple(
            Part(s.name, s.nbytes, sum(job.nbytes for job in s.jobs), len(s.jobs))
            for s in plan.shards
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
        "tau": None if outcome.tau is None else _encode_tau(outcome.tau),
    }


def decode_outcome(found: Mapping[str, Any]) -> Outcome:
    """The outcome that `encode_outcome` was given: the same in every figure."""
    stats, tau = found["stats"], found["tau"]
    energy, error, change = found["sums"]
    return Outcome(
        energy,
        error,
        change,
        stats=None if stats is None else decode_stats(stats),
        tau=None if tau is None else _decode_tau(tau),
    )


def _encode_tau(costs: TauCosts) -> dict[str, Any]:
    stored = {kind.value: _encode_cost(cost) for kind, cost in costs.stored.items()}
    return {"moved": _encode_cost(costs.moved), "stored": stored}


def _decode_tau(found: Mapping[str, Any]) -> TauCosts:
    stored = {Tau(kind): Cost(*cost) for kind, cost in found["stored"].items()}
    return TauCosts(Cost(*found["moved"]), stored)


def _encode_cost(cost: Cost) -> list[float]:
    return [cost.largest, cost.squares, cost.blocks]
