"""`irq_manifest.json`: where an artifact comes from, what is in it, and what it lost."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from irq_convert.artifact.config import FORMAT_VERSION
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import SCORES_NAME
from irq_convert.checkpoint.source import PLAIN, Checkpoint
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    from irq_convert.core.tensor_stats import TensorStats

MANIFEST_NAME = "irq_manifest.json"
SEAL = "manifest_sha256"
"""The key of a manifest that holds the hash of all others."""
CARD_NAME = "README.md"
"""The model card: it may be written anew at any time and is no part of what was made."""


def is_listed(name: str) -> bool:
    """Whether the manifest lists a file of the folder (specification, section 7)."""
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return not hidden and name not in (MANIFEST_NAME, CARD_NAME, SCORES_NAME)


def fingerprint(tensors: Iterable[TensorInfo]) -> str:
    """SHA-256 over names, dtypes, shapes and files of tensors (specification, section 7)."""
    digest = hashlib.sha256()
    for info in sorted(tensors, key=lambda info: info.name):
        shape = "x".join(map(str, info.shape))
        digest.update(f"{info.name}\t{info.dtype}\t{shape}\t{info.shard.name}\n".encode())
    return digest.hexdigest()


SOURCE_KEYS = ("model", "revision", "tensors_sha256")
"""What every description of a source has."""


def describe_source(checkpoint: Checkpoint, model: str) -> dict[str, Any]:
    """The manifest's `source`. A local folder is named without its path.

    How its weights are stored is named where they are not dense tensors in safetensors.
    """
    kind, encoding = checkpoint.source_format, checkpoint.encoding
    return {
        "model": checkpoint.repo_id or Path(model).resolve().name,
        "revision": checkpoint.revision,
        "tensors_sha256": fingerprint(checkpoint.tensors.values()),
        **({} if kind == PLAIN else {"format": kind}),
        **({} if encoding is None else {"encoding": encoding}),
    }


def stored_as(source: Mapping[str, Any]) -> str:
    """How the weights of a manifest's `source` were stored: "meta", "fp8-block", "safetensors"."""
    told = [source.get("format"), source.get("encoding")]
    return ", ".join(str(word) for word in told if word) or PLAIN


def describe_tensor(
    info: TensorInfo, codebook: str, block_size: int, stats: TensorStats
) -> dict[str, Any]:
    """The manifest's entry of one quantized tensor."""
    return {
        "shape": list(info.shape),
        "dtype": info.dtype,
        "codebook": codebook,
        "block_size": block_size,
        "entropy_plain": stats.entropy_plain,
        "entropy": stats.entropy,
        "relative_error": stats.relative_error,
    }


def total_stats(stats: Iterable[TensorStats]) -> dict[str, float]:
    """Entropy and error over all quantized weights."""
    every = list(stats)
    weights = sum(s.weights for s in every)
    energy = math.fsum(s.energy for s in every)
    return {
        "entropy_plain": math.fsum(s.entropy_plain * s.weights for s in every) / weights,
        "entropy": math.fsum(s.entropy * s.weights for s in every) / weights,
        "relative_error": math.fsum(s.squared_error for s in every) / energy if energy else 0.0,
    }


def build_manifest(
    *,
    producer: str,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    totals: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    importance: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole document, in the specification's order and sealed."""
    manifest = {
        "format": "irq",
        "format_version": FORMAT_VERSION,
        "producer": producer,
        "source": dict(source),
        "options": dict(options),
        **({} if calibration is None else {"calibration": dict(calibration)}),
        **({} if importance is None else {"importance": dict(importance)}),
        **({} if target is None else {"target": dict(target)}),
        "files": {name: dict(files[name]) for name in sorted(files)},
        "tensors": {name: dict(tensors[name]) for name in sorted(tensors)},
        "totals": dict(totals),
    }
    return {**manifest, SEAL: manifest_sha256(manifest)}


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over all of a manifest but this very hash (specification, section 7)."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    # Without escapes a lone surrogate could not be hashed.
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def broken_seal(manifest: Mapping[str, Any]) -> str | None:
    """One line where a manifest is not as it was written; None also where it has no seal."""
    if SEAL not in manifest:
        return None  # earlier versions wrote none
    noted, found = manifest[SEAL], manifest_sha256(manifest)
    if noted == found:
        return None
    return (
        f"{MANIFEST_NAME}: changed since it was written: {SEAL} is {noted!r}, the rest gives "
        f"{found}: copy it again, or quantize again"
    )


def manifest_room(tensors: Iterable[str], files: int) -> int:
    """Bytes to keep free for a manifest of `tensors` and so many `files`, at its longest."""
    names = [len(json.dumps(name)) for name in tensors]
    return (1 << 16) + ((len(names) + files) << 10) + sum(names)


def manifest_limit(tensors: Iterable[str], files: int) -> int:
    """Bytes that a manifest of `tensors` and so many `files` does not exceed; tighter than room."""
    names = [len(json.dumps(name)) for name in tensors]
    return 6_000 + 400 * len(names) + 256 * files + sum(names)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the outline; `IrqError` when it is missing or of another format."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise IrqError(f"{path}: missing; only `irq-convert quantize` writes it")
    manifest = read_json_object(path)
    if manifest.get("format") != "irq" or manifest.get("format_version") != FORMAT_VERSION:
        raise IrqError(f"{path}: not a manifest of format irq version {FORMAT_VERSION}")
    for key in ("source", "options", "files", "tensors", "totals"):
        if not isinstance(manifest.get(key), dict):
            raise IrqError(f"{path}: lacks the object {key!r}; quantize again")
    return manifest
