"""The short form of tests/bench/kill_resume.py: kill -9, at random moments and at steps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "tests" / "bench" / "kill_resume.py"


@pytest.mark.slow
def test_killed_and_continued() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "3", "--steps", "20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "random moments: 3 kills" in done.stdout
    assert done.stdout.count("| after the last shard, before the rename |") == 4
    assert "every result byte-identical" in done.stdout
