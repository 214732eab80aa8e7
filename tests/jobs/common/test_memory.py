"""Memory that is given back to the system."""

from __future__ import annotations

import pytest

from irq_convert.jobs.common.memory import _malloc_trim, available_memory, give_back_memory
from tests.fresh import Forks

MEASURE = """
from pathlib import Path
from irq_convert.jobs.common.memory import give_back_memory

def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) >> 10

large = bytearray(b"x") * (30 << 20)
del large  # from now on blocks of up to this size come from the heap, and stay there
blocks = [bytearray(b"x") * (1 << 20) for _ in range(100)]
del blocks[:-1]
before = resident()
give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(_malloc_trim() is None, reason="another C library")
def test_holes_are_given_back(python: Forks) -> None:
    assert int(python(MEASURE).stdout) > 80


def test_without_a_library_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("irq_convert.jobs.common.memory._malloc_trim", lambda: None)
    give_back_memory()
    assert available_memory() > 0
