"""Artifact and adapter opened, and found to belong together, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter, open_adapter
from irq_convert.artifact.contents import Artifact, open_artifact
from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.results import check_result_folder, describe_base
from irq_convert.errors import UsageError
from irq_convert.jobs.merge.match import Match, check_base, check_folded_targets, match
from irq_convert.jobs.merge.options import MergeOptions, MergeTo
from irq_convert.jobs.merge.ties import require_untied


@dataclass(frozen=True)
class Inputs:
    """Both inputs, opened and found to belong together."""

    artifact: Artifact
    identity: str
    adapter: StoredAdapter
    match: Match

    @property
    def base(self) -> dict[str, Any]:
        """The artifact, for the records of the result."""
        artifact = self.artifact
        return describe_base(artifact.folder.resolve().name, self.identity, artifact.manifest)


def open_inputs(base: Path, adapter: Path, out: Path, options: MergeOptions) -> Inputs:
    """Open artifact and adapter and check everything that headers can tell.

    Raises `UsageError` or `IrqError` as `open_artifact`, `open_adapter`, `check_base`, `match`,
    `require_untied` and `check_result_folder` do.
    """
    if not base.is_dir():
        raise UsageError(f"{base}: no such folder; give the folder of an artifact")
    opened = open_adapter(adapter)
    check_result_folder(out, [base, adapter], options.overwrite)
    artifact = open_artifact(base)
    identity = artifact_identity(base)
    check_base(opened, identity, artifact.manifest, options.any_base)
    found = match(artifact, opened)
    if options.to == MergeTo.ADAPTER:
        if opened.statistics:
            raise UsageError(
                f"{adapter}: has trained scale and tau, which no plain LoRA can hold: merge --to "
                "irq, or --to dense"
            )
        check_folded_targets(artifact, opened, found)
    else:
        require_untied(artifact, opened, found.untied)
    return Inputs(artifact, identity, opened, found)
