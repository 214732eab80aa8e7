"""What a target of `export` is: a plan from headers, then files written tile by tile.

The frame around it (`irq_convert.jobs.export.export`) opens the artifact, checks the output folder
and the space, gives the target a staging folder that becomes the output when `write` returns, adds
the note `irq_export.json`, and reports. A target only knows its own format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from irq_convert.artifact.contents import Artifact
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.progress import Progress


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one quantized tensor of the artifact.

    `stored` says in a few words how ("affine 4 bit, group 64", "Q4_1", "BF16"). `exact`: stored
    with codes untouched, and rounding once at most. `why` says what is lost, or why it is stored in
    another way than its neighbours; None where there is nothing to say.
    """

    name: str
    stored: str
    exact: bool
    why: str | None = None


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before codes are read.

    `files`: every file to be written, by relative posix path, with its exact size in bytes, or an
    upper bound where a size is not known yet. `tensors`: the quantized tensors in file order.
    `notes`: lines that a person should see before and after the work. `detail` is the target's
    own, whatever `write` needs.
    """

    artifact: Artifact
    options: ExportOptions
    files: Mapping[str, int]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()
    detail: Any = None

    @property
    def bytes_out(self) -> int:
        """Bytes of all files, without the note."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Difference:
    """How far one tensor as written is from the artifact's, measured over all of its weights.

    Between the float32 weights that the artifact stands for (formats/irq-v1.md, section 4) and the
    numbers that the written file stands for in exact arithmetic, in float64: `largest` is the
    largest magnitude of a difference, `peak` of a weight, `squared_error` and `energy` are sums of
    squares of differences and of weights. `changed_codes` counts weights whose code is another one.
    Differences of tiles of one tensor add up with `+`.
    """

    name: str
    weights: int
    largest: float
    peak: float
    squared_error: float
    energy: float
    changed_codes: int = 0

    def __add__(self, below: Difference) -> Difference:
        return Difference(
            self.name,
            self.weights + below.weights,
            max(self.largest, below.largest),
            max(self.peak, below.peak),
            self.squared_error + below.squared_error,
            self.energy + below.energy,
            self.changed_codes + below.changed_codes,
        )

    @property
    def relative_error(self) -> float:
        """Squared errors over squares, as everywhere in this program."""
        return self.squared_error / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class TargetResult:
    """What `Target.write` measured: one `Difference` a quantized tensor, and lines to print.

    `notes` are for what only came to light while writing.
    """

    differences: Sequence[Difference]
    notes: tuple[str, ...] = field(default=())


class Target(ABC):
    """One format that artifacts are exported to; it holds no state.

    `name` is that on the command line, `summary` half a line for people. `takes` are the fields
    of `ExportOptions` that mean something here, among "dtype", "fallback", "refit" and
    "max_shard_bytes"; others are refused when they are set. `dtypes` and `fallbacks` are the values
    that --dtype and --fallback may have here, the first of each being the default. `packages` are
    Python packages that writing needs beyond those that are always there, by the name to import.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[tuple[str, ...]] = ("auto", "bfloat16", "float16", "float32")
    fallbacks: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        """Decide what becomes of every tensor, from headers and small files alone.

        Scales and taus may be read (in tiles, told to `progress`) where they decide. Writes
        nothing. Raises `UsageError` for an artifact that the target cannot hold: one line that
        names the tensor, the rule and the way out; `IrqError` when something cannot be read.
        """

    @abstractmethod
    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        """Write every file of `plan.files` into the empty `folder`, in tiles of bounded memory.

        Calls `progress.phase` when counting begins and `progress.advance` as tensors are done.
        Tiles hold about `plan.options.tile_weights` weights. Returns what was measured on all
        quantized tensors. Raises `IrqError` naming the tensor when something cannot be read,
        written or represented; the frame removes the folder then.
        """
