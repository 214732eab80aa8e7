"""`verify`: is an artifact whole, legal, a model of its class, and true to its source."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from irq_convert.artifact.contents import find_manifest, open_artifact
from irq_convert.artifact.structure import WAY_OUT
from irq_convert.artifact.verify import VerifyReport, verify_artifact
from irq_convert.checkpoint.locate import find_folder, open_source
from irq_convert.checkpoint.packed import find_packed
from irq_convert.errors import IrqError, UsageError
from irq_convert.progress import Progress


def verify(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the artifact in `folder`, and `against` its source, a folder or a Hub id, where given.

    What is wrong is in the report's `failures`, a line each. One that is sound as far as that goes
    is also held against the class that it names, where transformers has it. `revision` is that of
    a source on the Hub, by default the one that the artifact was made from. Raises `UsageError`
    when `folder` is no artifact or `revision` stands alone, `IrqError` when the source cannot be
    read.
    """
    if revision is not None and against is None:
        raise UsageError("--revision is that of the source: give the source with --against")
    if against is not None and revision is None:
        revision = _noted_revision(Path(folder), str(against))
    source = None if against is None else open_source(str(against), revision)
    report = verify_artifact(Path(folder), against=source, progress=progress)
    problem = _not_its_class(Path(folder)) if report.ok else None
    return report if problem is None else replace(report, failures=(problem,))


def _noted_revision(folder: Path, against: str) -> str | None:
    """The commit of the Hub's `against` that the manifest names; None where it names no such."""
    with suppress(IrqError):  # of a damaged manifest, which the report will tell
        source = (find_manifest(folder) or {}).get("source") or {}
        if find_folder(against) is None and source.get("model") == against:
            revision = source.get("revision")
            return revision if isinstance(revision, str) else None
    return None


def _not_its_class(folder: Path) -> str | None:
    """One line where the tensors are no whole model of the class that config.json names."""
    from irq_convert.hf.whole import ask_wholeness, why_unloadable

    artifact = open_artifact(folder)
    config, copied = artifact.checkpoint.config, {info.name: info for info in artifact.copied}
    unloadable = why_unloadable(config)
    if unloadable:
        return f"config.json: {unloadable}: copy that of the source, with its quantization_config"
    decoded = {
        tensor.name: replace(tensor.parts[""], dtype="F32", shape=tensor.source_shape)
        for tensor in artifact.quantized
    }
    found = ask_wholeness(config, copied | decoded)
    if found.why:
        return f"{found.why}: the source was not whole, or quantized already: {WAY_OUT}"
    packed = None if found.known else find_packed(copied)
    if packed is None:
        return None
    return (
        f"{packed.info.name} {list(packed.info.shape)} in {packed.info.shard.name} is a copy of a "
        f"tensor packed by {packed.method}, which is loaded as it is: quantize the original model"
    )
