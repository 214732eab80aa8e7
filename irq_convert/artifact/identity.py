"""One hash that says which artifact an adapter was trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from irq_convert.artifact.contents import find_manifest
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.source import open_checkpoint


def artifact_identity(folder: Path) -> str:
    """SHA-256 in hexadecimal over names and checksums of the weight files of `folder`.

    The lines `<file>\\t<sha256 of the file>\\n`, sorted by name (formats/irq-adapter-v1.md). The
    checksums come from the manifest, or where there is none from reading the files. Raises
    `IrqError` when the folder cannot be read.
    """
    checkpoint = open_checkpoint(folder)
    manifest = find_manifest(folder)
    listed = {} if manifest is None else manifest["files"]
    digest = hashlib.sha256()
    for shard in sorted(checkpoint.shards):
        known = listed.get(shard.name, {}).get("sha256")
        digest.update(f"{shard.name}\t{known or sha256_file(shard)}\n".encode())
    return digest.hexdigest()
