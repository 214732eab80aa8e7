"""What a planned and what a finished export has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from irq_convert.jobs.export.target import Difference, PlannedTensor


@dataclass(frozen=True)
class Storage:
    """Some quantized tensors that are stored alike, and why, as `PlannedTensor` has it."""

    stored: str
    exact: bool
    why: str | None
    tensors: int
    example: str


def storages(tensors: Sequence[PlannedTensor]) -> tuple[Storage, ...]:
    """`tensors` counted by how they are stored, in order of appearance."""
    groups: dict[tuple[str, bool, str | None], list[str]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.stored, tensor.exact, tensor.why), []).append(tensor.name)
    return tuple(Storage(*key, len(names), names[0]) for key, names in groups.items())


@dataclass(frozen=True)
class ExportEstimate:
    """What an export would write; `summary` is the target's, `bytes_out` without the note."""

    artifact: str
    artifact_sha256: str
    to: str
    summary: str
    out: str
    storages: tuple[Storage, ...]
    files: dict[str, int]
    bytes_in: int
    bytes_out: int
    disk_needed: int
    disk_free: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the artifact (see `Difference` for the measures).

    `bytes_in` are all tensors of the artifact, `bytes_out` the whole folder. `differences` are by
    quantized tensor, in file order; `seconds` is for the whole run.
    """

    artifact: str
    artifact_sha256: str
    to: str
    out: str
    storages: tuple[Storage, ...]
    bytes_in: int
    bytes_out: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def largest(self) -> float:
        """The largest difference of a weight."""
        return max((found.largest for found in self.differences), default=0.0)

    @property
    def largest_relative(self) -> float:
        """The largest difference of a weight in parts of its tensor's largest weight."""
        return max((f.largest / f.peak for f in self.differences if f.peak), default=0.0)

    @property
    def relative_error(self) -> float:
        """Squared differences over squares of weights, over all quantized tensors."""
        energy = sum(found.energy for found in self.differences)
        return sum(found.squared_error for found in self.differences) / energy if energy else 0.0

    @property
    def changed_codes(self) -> int:
        return sum(found.changed_codes for found in self.differences)

    @property
    def weights(self) -> int:
        return sum(found.weights for found in self.differences)

    def worst(self, count: int) -> list[Difference]:
        """The tensors with the largest relative error, those without any left out."""
        lossy = [found for found in self.differences if found.squared_error]
        return sorted(lossy, key=lambda found: -found.relative_error)[:count]

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        names = ("largest", "largest_relative", "relative_error", "changed_codes", "weights")
        figures = {name: getattr(self, name) for name in names}
        tensors = [
            {**asdict(found), "relative_error": found.relative_error} for found in self.differences
        ]
        return {**asdict(self), **figures, "differences": tensors}
