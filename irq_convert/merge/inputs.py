"""Artifact and adapter opened, and found to belong together, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_convert.adapters.stored import StoredAdapter, open_adapter
from irq_convert.artifact.contents import Artifact, open_artifact
from irq_convert.artifact.identity import artifact_identity
from irq_convert.errors import UsageError
from irq_convert.merge.match import Match, check_base, check_plain_targets, match
from irq_convert.merge.options import MergeOptions, Target
from irq_convert.merge.target import check_target


@dataclass(frozen=True)
class Inputs:
    """Both inputs, opened and found to belong together."""

    artifact: Artifact
    identity: str
    adapter: StoredAdapter | None
    match: Match


def open_inputs(base: Path, adapter: Path | None, out: Path, options: MergeOptions) -> Inputs:
    """Open artifact and adapter and check everything that headers can tell.

    Raises `UsageError` or `IrqError` as `open_artifact`, `open_adapter`, `check_base`, `match` and
    `check_target` do.
    """
    if adapter is None and options.to != Target.DENSE:
        raise UsageError(f"--to {options.to.value} needs an adapter")
    if not base.is_dir():
        raise UsageError(f"{base}: no such folder; give the folder of an artifact")
    opened = None if adapter is None else open_adapter(adapter)
    check_target(out, [base] if adapter is None else [base, adapter], options.overwrite)
    artifact = open_artifact(base)
    identity = artifact_identity(base)
    if opened is None:
        return Inputs(artifact, identity, None, Match({}, {}))
    check_base(opened, identity, artifact.manifest, options.any_base)
    found = match(artifact, opened)
    if options.to == Target.ADAPTER:
        check_plain_targets(artifact, opened, found)
    return Inputs(artifact, identity, opened, found)
