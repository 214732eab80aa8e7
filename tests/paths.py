"""Folders that tests read: the repository, the demo model, and models that are not part of it."""

from __future__ import annotations

from pathlib import Path

from irq_convert.jobs.demo import MODEL_DIR

ROOT = Path(__file__).resolve().parents[1]
DEMO = MODEL_DIR
"""The small trained model that ships."""
SHARED = ROOT.parent / "shared"
"""Larger models and texts beside the repository, listed in docs/benchmarks.md; may be absent."""
ABSENT = "needs models or texts of docs/benchmarks.md beside the repository"
