"""Where a result comes from: the manifest of a merged artifact, the note beside a dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.config import ModuleFormat
from irq_convert.artifact.manifest import build_manifest, is_listed
from irq_convert.artifact.structure import StoredTensor
from irq_convert.jobs.merge.options import MergeOptions
from irq_convert.jobs.merge.outcome import Outcome
from irq_convert.jobs.merge.plan import MergedTensor, MergePlan
from irq_convert.version import PRODUCER

_FIGURES = ("entropy_plain", "entropy", "relative_error")


def describe_adapter(adapter: StoredAdapter) -> dict[str, Any]:
    """The adapter: its name without a path, its identity, its kind and what it belongs to."""
    return {
        "name": adapter.folder.resolve().name,
        "sha256": adapter.sha256,
        "lora": adapter.config.kind,
        "base_sha256": adapter.config.base_sha256,
    }


def dense_note(
    base: Mapping[str, Any], adapter: StoredAdapter, options: MergeOptions
) -> dict[str, Any]:
    """`irq_merge.json` (formats/irq-adapter-v1.md, section 6)."""
    return {
        "format": "irq-merge",
        "format_version": 1,
        "producer": PRODUCER,
        "base": dict(base),
        "adapter": describe_adapter(adapter),
        "options": options.to_dict(),
    }


def merged_manifest(
    plan: MergePlan,
    described: Mapping[str, Any],
    adapter: StoredAdapter,
    outcomes: Mapping[str, Outcome],
    files: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a merged artifact, whose base has one.

    Entries of tensors that the adapter leaves alone are the base's; the others say what is stored
    against the exact merged weights. `settings` is what a tensor was quantized again with.
    """
    base = plan.artifact.manifest
    assert base is not None
    source = base["source"]
    listed = {name: entry for name, entry in files.items() if is_listed(name)}
    merged = [tensor for tensor in plan.tensors if isinstance(tensor.target, ModuleFormat)]
    tensors = {t.name: _entry(t, base["tensors"][t.name], outcomes[t.name]) for t in merged}
    before = source.get("adapters")
    return build_manifest(
        producer=PRODUCER,
        source={
            "model": source.get("model"),
            "revision": source.get("revision"),
            "tensors_sha256": None,
            "base": dict(described),
            "adapters": [*(before if isinstance(before, list) else ()), describe_adapter(adapter)],
        },
        options={**plan.options.to_dict(), **settings, "base": base["options"]},
        files=listed,
        tensors=tensors,
        totals=_totals(plan, merged, listed, tensors, outcomes),
    )


def _entry(tensor: MergedTensor, base: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    assert isinstance(tensor.target, ModuleFormat)
    if outcome.stats is None and not outcome.restated:
        return dict(base)
    figures = {key: base.get(key) for key in _FIGURES}
    entry = {
        "shape": list(tensor.shape),
        "dtype": base.get("dtype"),
        "codebook": tensor.target.codebook,
        "block_size": tensor.target.block_size,
        "entropy_plain": figures["entropy_plain"],
        "entropy": figures["entropy"],
        "relative_error": outcome.relative_error,
        "merged": "tau" if outcome.scale is None else "statistics",
        "survived": outcome.survived,
        "base": figures,
    }
    if outcome.stats is not None:
        entry |= {
            "entropy_plain": outcome.stats.entropy_plain,
            "entropy": outcome.stats.entropy,
            "merged": "requantized",
        }
    return entry


def _totals(
    plan: MergePlan,
    merged: list[MergedTensor],
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Outcome],
) -> dict[str, Any]:
    """Means over all quantized weights; errors by the energy of the weights they belong to."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in merged}
    weights = max(1, sum(sizes.values()))

    def mean(key: str) -> float:
        return math.fsum(tensors[name][key] * size for name, size in sizes.items()) / weights

    energy = math.fsum(outcomes[name].energy for name in sizes)
    error = math.fsum(outcomes[n].energy * tensors[n]["relative_error"] for n in sizes)
    return {
        "weights": sum(math.prod(tensor.shape) for tensor in plan.tensors),
        "quantized_weights": sum(sizes.values()),
        "bytes": sum(int(entry["bytes"]) for entry in files.values()),
        "bits_per_weight": bits_per_weight(plan),
        "entropy_plain": mean("entropy_plain"),
        "entropy": mean("entropy"),
        "relative_error": error / energy if energy else 0.0,
    }


def bits_per_weight(plan: MergePlan) -> float:
    """Bits of a quantized weight of the result, with its share of scales, taus and grids."""
    merged = [tensor for tensor in plan.tensors if isinstance(tensor.target, ModuleFormat)]
    weights = sum(t.base.weights for t in merged if isinstance(t.base, StoredTensor))
    return 8 * sum(tensor.nbytes for tensor in merged) / max(1, weights)
