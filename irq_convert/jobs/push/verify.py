"""Whether a folder that is to be pushed is whole, as far as its kind lets one tell."""

from __future__ import annotations

from irq_convert.artifact.adapter import open_adapter, read_finite, read_layer
from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError
from irq_convert.jobs.push.pushed_folder import FolderKind, PushedFolder
from irq_convert.progress import Progress


def verify_pushed_folder(subject: PushedFolder, progress: Progress | None = None) -> None:
    """Check that a folder is whole. Raises `IrqError` naming the first thing that is wrong."""
    progress = progress or Progress()
    progress.stage("verifying")
    if subject.kind in (FolderKind.ARTIFACT, FolderKind.MERGED):
        failures = verify_artifact(subject.folder).failures
        if failures:
            more = f" ({len(failures) - 1} more)" if failures[1:] else ""
            raise IrqError(
                f"{subject.folder}: not pushed: {failures[0]}{more}; see `irq-convert verify`"
            )
    elif subject.kind == FolderKind.ADAPTER:
        adapter = open_adapter(subject.folder)
        with TileReader() as reader:
            for layer in adapter.layers.values():
                read_layer(reader, adapter.config, layer)
            for tokens in adapter.tokens.values():
                read_finite(reader, tokens.rows)
    elif subject.target == "gguf":
        _check_gguf(subject)
    else:
        open_checkpoint(subject.folder)


def _check_gguf(subject: PushedFolder) -> None:
    names = [name for name in subject.files if name.endswith(".gguf")]
    for name in names or ["model.gguf"]:
        path = subject.folder / name
        with os_errors("read it", path), path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise IrqError(f"{path}: not pushed: no GGUF file; export it again")
