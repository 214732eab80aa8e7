"""Which artifact a loaded model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.errors import IrqError


def artifact_folder(model: Any) -> Path | None:
    """The folder that `model` was loaded from, in the Hub's cache too; None when it is not known.

    From the Hub the manifest is fetched, a small file.
    """
    name = getattr(model, "name_or_path", None)
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if not name or quantization is None:
        return None
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            name,
            MANIFEST_NAME,
            revision=getattr(model.config, "_commit_hash", None),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # no id of the Hub, but a folder that has gone
        return None
    return None if found is None else Path(found).parent


def forget_identity(model: Any) -> None:
    """Note that the weights of `model` are no longer those of the artifact it was loaded from."""
    model.irq_changed = True


def model_identity(model: Any) -> str | None:
    """`artifact_identity` of the artifact that `model` was loaded from and still holds, or None."""
    if getattr(model, "irq_changed", False):
        return None
    folder = artifact_folder(model)
    try:
        return None if folder is None else artifact_identity(folder)
    except IrqError:  # the folder has changed or gone since; the model is in memory all the same
        return None
