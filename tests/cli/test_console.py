"""Sizes and times in words."""

from __future__ import annotations

import pytest

from irq_convert.checkpoint.system import short_bytes
from irq_convert.cli.console import seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (2_500_000, "2.50 MB"),
        (13_476_000_000, "13.48 GB"),
        (1_300_000_000_000, "1300.00 GB"),
    ],
)
def test_short_bytes(count: int, text: str) -> None:
    assert short_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min 0 s"),
        (95.2, "1 min 35 s"),
        (3599.6, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text
