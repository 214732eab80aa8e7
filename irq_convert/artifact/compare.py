"""An artifact against the checkpoint that it was made from, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.manifest import MANIFEST_NAME, fingerprint
from irq_convert.artifact.structure import WAY_OUT, StoredTensor, is_number
from irq_convert.artifact.values import (
    Measured,
    copy_difference,
    error_tolerance,
    first_difference,
    measure_tensor,
)
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.core.spec import QuantSpec
from irq_convert.core.statistic_dtypes import UINT8
from irq_convert.errors import UsageError
from irq_convert.version import PRODUCER


class Comparison:
    """One run over all tensors of `artifact` and `source`.

    `changed` are files with a wrong checksum: their quantized tensors are quantized again to name
    those that differ. `illegal` are tensors whose values cannot be measured. `sound`: nothing else
    is wrong with the artifact, so what differs is the source. After `run`, `results` holds what
    was measured, by name.
    """

    def __init__(
        self,
        artifact: Artifact,
        source: Checkpoint,
        changed: frozenset[str] = frozenset(),
        illegal: frozenset[str] = frozenset(),
        *,
        sound: bool = False,
    ) -> None:
        self.results: dict[str, Measured] = {}
        self._artifact, self._source = artifact, source
        self._changed, self._illegal, self._sound = changed, illegal, sound
        self._manifest: Mapping[str, Any] = artifact.manifest or {}
        self._listed: Mapping[str, Any] = self._manifest.get("tensors", {})

    def run(self, advance: Callable[[int], None], complete: bool) -> Iterator[str]:
        """Yield one line for each difference; `advance` is told the source's bytes as they go.

        `complete`: the artifact's structure is sound, so no tensor may be missing or too many.
        """
        wrong_source = self._wrong_source()
        if wrong_source:
            yield wrong_source
            return
        if complete:
            yield from self._unaccounted()
        if not self._sound or not self._manifest:
            yield from self._differences(advance)
            return
        found = list(self._differences(advance))
        if found:
            yield self._lookalike(found)

    def _differences(self, advance: Callable[[int], None]) -> Iterator[str]:
        with TileReader() as reader:
            for tensor in self._artifact.quantized:
                source = self._source.tensors.get(tensor.name)
                if source is None or source.shape != tensor.source_shape:
                    continue
                if tensor.name not in self._illegal:
                    yield from self._quantized(reader, tensor, source)
                advance(source.nbytes)
            for info in self._artifact.copied:
                source = self._source.tensors.get(info.name)
                if source is not None and _kind(source) == _kind(info):
                    difference = copy_difference(reader, info, source, advance)
                    if difference:
                        yield difference

    def _wrong_source(self) -> str | None:
        if not self._manifest:
            return None
        noted = self._manifest["source"]
        found = fingerprint(self._source.tensors.values())
        if found == noted.get("tensors_sha256"):
            return None
        if noted.get("adapters"):
            return (
                f"{self._source.folder}: not what the artifact holds: an adapter was merged into "
                "it, and no checkpoint has these weights; verify it without --against"
            )
        return (
            f"{self._source.folder}: another source: its tensors have the fingerprint {found}, the "
            f"artifact was made from {noted.get('model')!r} with {noted.get('tensors_sha256')}: "
            "give that model with --against"
        )

    def _lookalike(self, found: list[str]) -> str:
        """One line for a source of the same shapes that is not the one of a whole artifact."""
        noted, every = self._manifest["source"], len(self._source.tensors)
        at = f" at revision {noted['revision']}" if noted.get("revision") else ""
        return (
            f"{self._source.folder}: {len(found)} of {every} tensors differ "
            f"({found[0].removesuffix(f': {WAY_OUT}')}), while no file of the artifact has changed "
            "since it was written: another source of the same shapes, or another revision of it: "
            f"give {noted.get('model')!r}{at} with --against"
        )

    def _unaccounted(self) -> Iterator[str]:
        """Tensors of the source that are not quantized or copied in their shape, and others."""
        shapes: dict[str, tuple[int, ...]] = {
            tensor.name: tensor.source_shape for tensor in self._artifact.quantized
        }
        copied = {info.name: info for info in self._artifact.copied}
        for name, info in self._source.tensors.items():
            wanted = f"the source has it as {info.dtype} {list(info.shape)}"
            if name in shapes:
                if shapes[name] != info.shape:
                    yield f"{name} is stored as {list(shapes[name])}, {wanted}: {WAY_OUT}"
            elif name not in copied:
                yield f"{name} is missing, {wanted}: {WAY_OUT}"
            elif _kind(copied[name]) != _kind(info):
                mine = copied[name]
                yield f"{name} is {mine.dtype} {list(mine.shape)}, {wanted}: {WAY_OUT}"
        for name in (*shapes, *copied):
            if name not in self._source.tensors:
                yield f"{name} is in the artifact, but not in the source: {WAY_OUT}"

    def _quantized(
        self, reader: TileReader, tensor: StoredTensor, source: TensorInfo
    ) -> Iterator[str]:
        entry = self._listed.get(tensor.name)
        result = self.results[tensor.name] = measure_tensor(reader, tensor, source)
        if isinstance(entry, Mapping):
            yield from _disagreements(tensor, source, entry, result)
        spec = self._spec(tensor)
        if spec is not None and {p.shard.name for p in tensor.parts.values()} & self._changed:
            difference = first_difference(reader, tensor, source, spec)
            if difference:
                yield difference

    def _spec(self, tensor: StoredTensor) -> QuantSpec | None:
        """How this very program made `tensor`; None where another one did."""
        options, fmt = self._manifest.get("options", {}), tensor.format
        if self._manifest.get("producer") != PRODUCER:
            return None
        objective, refine = options.get("objective"), options.get("refine")
        zero_point = options.get("zero_point", "float")
        if not isinstance(objective, str) or type(refine) is not int:
            return None
        try:
            spec = QuantSpec(fmt.codebook, fmt.block_size, objective, refine, zero_point)
        except UsageError:
            return None
        stored = (UINT8.name, spec.tau_dtype)
        return spec if (fmt.scale_dtype, fmt.tau_dtype) == stored else None


def _kind(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _disagreements(
    tensor: StoredTensor, source: TensorInfo, entry: Mapping[str, Any], result: Measured
) -> Iterator[str]:
    """Where the manifest's figures are not those of the stored bytes."""
    where = f"{tensor.name} {list(tensor.source_shape)}"
    if entry.get("dtype") != source.dtype:
        yield (
            f"{where}: the source is {source.dtype}, {MANIFEST_NAME} says {entry.get('dtype')!r}: "
            f"{WAY_OUT}"
        )
    noted: Any = entry.get("relative_error")
    error = result.relative_error
    # Anything else is a problem of the manifest that has been told.
    if is_number(noted) and abs(noted - error) > error_tolerance(tensor, error):
        yield (
            f"{where}: relative error {error:.8g} against the source, "
            f"{MANIFEST_NAME} says {noted:.8g}: {WAY_OUT}"
        )
