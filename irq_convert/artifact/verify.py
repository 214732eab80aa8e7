"""Is an artifact whole, legal and, given its source, what the manifest says it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.checksums import check_files, files_bytes
from irq_convert.artifact.compare import Comparison
from irq_convert.artifact.contents import Artifact, examine_artifact, find_manifest
from irq_convert.artifact.manifest import MANIFEST_NAME, broken_seal
from irq_convert.artifact.recount import wrong_entropies
from irq_convert.artifact.structure import WAY_OUT, is_number
from irq_convert.artifact.values import Measured, check_values
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError, UsageError
from irq_convert.progress import Progress


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and one line for each thing that is wrong.

    `files` and `bytes` are those that the manifest lists. `relative_error` and `entropy` (bits a
    code) are recomputed over all quantized weights; None where nothing was compared.
    """

    folder: str
    failures: tuple[str, ...]
    files: int
    bytes: int
    quantized: int
    copied: int
    relative_error: float | None = None
    entropy: float | None = None

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {"ok": self.ok, **asdict(self)}


def verify_artifact(
    folder: Path, *, against: Checkpoint | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Check the artifact in `folder`: structure, checksums, legal values; `against` its source too.

    The entropies that the manifest notes are counted again from the codes. With the source every
    tensor is accounted for, copied ones are compared byte for byte, and errors of quantized ones
    are recomputed; where checksums show damage, the tensors that differ are found by quantizing
    again, and where nothing does, what differs is another source. Memory is bounded by a tile,
    whatever the sizes. What is wrong is in the report's `failures`. Raises `UsageError` when
    `folder` is no irq artifact and `IrqError` when the source cannot be read.
    """
    folder = Path(folder)
    failures: list[str] = []
    manifest = _manifest(folder, failures)
    artifact, problems = _artifact(folder, manifest)
    if not failures and manifest is None:
        failures.append(
            f"{MANIFEST_NAME}: missing, so checksums and losses cannot be checked: only "
            "`irq-convert quantize` writes it"
        )
    files = {} if manifest is None else manifest["files"]
    progress = progress or Progress()
    total = files_bytes(files) + (against.nbytes if against else 0)
    progress.phase("verifying", len(files), total)

    def advance(nbytes: int) -> None:
        progress.advance(nbytes, 0)

    changed = {} if manifest is None else check_files(folder, files, advance)
    failures += [*changed.values(), *problems]
    results: dict[str, Measured] = {}
    if artifact is not None:
        illegal = _illegal(artifact)
        failures += illegal.values()
        if not problems:
            failures += _totals(artifact)
            failures += wrong_entropies(artifact, frozenset(changed))
        if against is not None:
            comparison = Comparison(
                artifact, against, frozenset(changed), frozenset(illegal), sound=not failures
            )
            failures += comparison.run(advance, complete=not problems)
            results = comparison.results
    return _report(folder, failures, files, artifact, results)


def _manifest(folder: Path, failures: list[str]) -> dict[str, Any] | None:
    """The manifest where it is there and as it was written; else what is wrong, in `failures`."""
    try:
        manifest = find_manifest(folder)
    except IrqError as error:
        failures.append(str(error))
        return None
    broken = None if manifest is None else broken_seal(manifest)
    if broken is None:
        return manifest
    failures.append(f"{broken}; checksums and losses cannot be checked without it")
    return None


def _artifact(
    folder: Path, manifest: dict[str, Any] | None
) -> tuple[Artifact | None, tuple[str, ...]]:
    try:
        return examine_artifact(folder, manifest)
    except UsageError:
        raise
    except IrqError as error:
        return None, (str(error),)


def _illegal(artifact: Artifact) -> dict[str, str]:
    """Tensors that hold a number the format forbids, with one line each."""
    with TileReader() as reader:
        found = {tensor.name: check_values(reader, tensor) for tensor in artifact.quantized}
    return {name: line for name, line in found.items() if line is not None}


def _totals(artifact: Artifact) -> Iterator[str]:
    """The manifest's sums against the headers' and against its own entries."""
    if artifact.manifest is None:
        return
    totals: Mapping[str, Any] = artifact.manifest["totals"]
    known = {
        "weights": (artifact.weights, "the files hold"),
        "quantized_weights": (artifact.quantized_weights, "the files hold"),
        "bits_per_weight": (artifact.bits_per_weight, "the files hold"),
    }
    for key in ("entropy_plain", "entropy"):
        known[key] = (_mean(artifact, artifact.manifest["tensors"], key), "its tensors come to")
    for key, (value, how) in known.items():
        noted: Any = totals.get(key)
        if not is_number(noted) or not math.isclose(noted, value, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{MANIFEST_NAME}: totals.{key} is {noted!r}, {how} {value!r}: {WAY_OUT}"
    noted = totals.get("relative_error")
    errors = [entry["relative_error"] for entry in artifact.manifest["tensors"].values()]
    # A mean lies between its terms, whatever their weights, up to rounding.
    low, high = min(errors, default=0.0), max(errors, default=0.0)
    if not is_number(noted) or not low * (1 - 1e-9) <= noted <= high * (1 + 1e-9):
        yield (
            f"{MANIFEST_NAME}: totals.relative_error is {noted!r}, its tensors have {low!r} to "
            f"{high!r}: {WAY_OUT}"
        )


def _mean(artifact: Artifact, entries: Mapping[str, Any], key: str) -> float:
    """A figure of the tensors over all quantized weights."""
    sums = (entries[tensor.name][key] * tensor.weights for tensor in artifact.quantized)
    return math.fsum(sums) / max(1, artifact.quantized_weights)


def _report(
    folder: Path,
    failures: list[str],
    files: Mapping[str, Any],
    artifact: Artifact | None,
    results: Mapping[str, Measured],
) -> VerifyReport:
    energy = math.fsum(r.energy for r in results.values())
    error = math.fsum(r.squared_error for r in results.values())
    weights = sum(r.weights for r in results.values())
    bits = math.fsum(r.code_bits for r in results.values())
    return VerifyReport(
        folder=str(folder),
        failures=tuple(failures),
        files=len(files),
        bytes=files_bytes(files),
        quantized=len(artifact.quantized) if artifact else 0,
        copied=len(artifact.copied) if artifact else 0,
        relative_error=(error / energy if energy else 0.0) if results else None,
        entropy=bits / max(1, weights) if results else None,
    )
