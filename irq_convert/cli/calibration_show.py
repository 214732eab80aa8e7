"""A calibration in rows, as reports and `inspect` show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def calibration_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The manifest's `calibration`; none where weights were quantized without data."""
    if not record:
        return []
    tokens = record["windows"] * record["window"]
    error = "" if record["kl_se"] is None else f" +- {record['kl_se']:.4f}"
    kept = "" if record["kept"] == "calibrated" else ": no better, so kept without"
    return [
        ("calibrated", f"{record['text']}, {tokens:,} tokens in {record['windows']} windows"),
        ("held-out KL", f"{record['kl']:.4f}{error}, without data {record['plain']:.4f}{kept}"),
    ]
