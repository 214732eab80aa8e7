"""`inspect`: what an artifact holds, from headers and manifest alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_convert.artifact.contents import Artifact, open_artifact
from irq_convert.artifact.summary import Row, summarize, summarize_all


@dataclass(frozen=True)
class InspectReport:
    """`rows` by layer, kind or tensor, as `by` says, and their `total`."""

    artifact: Artifact
    by: str
    rows: tuple[Row, ...]
    total: Row

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        artifact, manifest = self.artifact, self.artifact.manifest or {}
        return {
            "folder": str(artifact.folder),
            "producer": manifest.get("producer"),
            "source": manifest.get("source"),
            "options": manifest.get("options"),
            **{key: manifest[key] for key in ("importance", "target") if key in manifest},
            "quantization_config": artifact.config.to_dict(),
            "shards": len(artifact.checkpoint.shards),
            "total": self.total.to_dict(),
            "by": self.by,
            "rows": [row.to_dict() for row in self.rows],
        }


def inspect(
    folder: str | Path, by: str = "layer", *, plot: str | Path | None = None
) -> InspectReport:
    """Sum up the artifact in `folder` by "layer", "kind" or "tensor"; reads no weights.

    `plot` is a PNG to draw entropy and error to, which needs matplotlib. Raises `UsageError` for a
    folder that is no artifact, another `by` or a plot that cannot be drawn, and `IrqError` for an
    artifact that breaks the format.
    """
    artifact = open_artifact(Path(folder))
    rows, total = tuple(summarize(artifact, by)), summarize_all(artifact)
    if plot is not None:
        from irq_convert.artifact.plot import plot_summary

        plot_summary(artifact, Path(plot))
    return InspectReport(artifact, by, rows, total)
