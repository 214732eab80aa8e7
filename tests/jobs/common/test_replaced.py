"""A process that is killed while it replaces a folder: what is left is cleared up or put back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.verify import verify
from tests.folders import listing
from tests.fresh import Forks
from tests.tiny import UNKNOWN, write_source

SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path

source = sys.argv.pop(1)

def kill_at(real, wanted):
    def wrapped(*args, **options):
        global number
        if wanted in str(args[0]):
            number -= 1
            if number == 0:
                if call == "rmtree":  # in the middle of it
                    next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return wrapped

from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

for call, number, out in zip(sys.argv[1::3], map(int, sys.argv[2::3]), sys.argv[3::3]):
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, out
        continue
    Path.rename = kill_at(Path.rename, "" if call == "rename" else "nothing is called so")
    wanted = "deleted-" if call == "rmtree" else "nothing is called so"
    shutil.rmtree = kill_at(shutil.rmtree, wanted)
    quantize(source, out, QuantizeOptions(threads=1, overwrite=True, keep=("down_proj",)))
    os._exit(0)
"""
Killed = Callable[[tuple[str, int]], list[str]]
BEFORE = QuantizeOptions(threads=1)
AFTER = QuantizeOptions(threads=1, overwrite=True, keep=("down_proj",))
STEPS = [("rename", 1), ("rename", 2), ("rename", 3), ("rmtree", 1)]
"""Before the old folder moves aside, before the new one takes its name, before and in deleting."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("replaced") / "m", config=UNKNOWN)


@pytest.fixture(scope="module")
def both(source: Path) -> dict[str, dict[str, object]]:
    """What OUT is before and after."""
    quantize(source, source.parent / "before", BEFORE)
    quantize(source, source.parent / "after", AFTER)
    return {name: listing(source.parent / name) for name in ("before", "after")}


@pytest.fixture(scope="module")
def kills(
    python: Forks,
    source: Path,
    both: dict[str, dict[str, object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, int], Path]:
    """By step, a folder with what a process leaves that is killed there while it replaces OUT."""
    folders = {step: tmp_path_factory.mktemp("killed") for step in STEPS}
    arguments: list[object] = []
    for step, folder in folders.items():
        shutil.copytree(source.parent / "before", folder / "out")
        arguments += [*step, folder / "out"]
    done = python(SCRIPT, source, *arguments)
    assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def killed(kills: dict[tuple[str, int], Path], tmp_path: Path) -> Killed:
    """Puts into `tmp_path` what a kill at a step leaves; returns what lies there."""

    def put(step: tuple[str, int]) -> list[str]:
        shutil.copytree(kills[step], tmp_path, dirs_exist_ok=True)
        return sorted(path.name for path in tmp_path.iterdir())

    return put


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]} {step[1]}")
def test_the_same_command_ends_with_the_new_folder_alone(
    killed: Killed,
    tmp_path: Path,
    source: Path,
    both: dict[str, dict[str, object]],
    step: tuple[str, int],
) -> None:
    left = killed(step)
    assert len(left) == (2 if step == ("rename", 1) else 3) or "out" not in left
    quantize(source, tmp_path / "out", AFTER)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert listing(tmp_path / "out") == both["after"]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]} {step[1]}")
def test_a_command_that_refuses_clears_up_all_the_same(
    killed: Killed,
    tmp_path: Path,
    source: Path,
    both: dict[str, dict[str, object]],
    step: tuple[str, int],
) -> None:
    """Without --overwrite, which is what somebody tries who believes that it was finished."""
    killed(step)
    with pytest.raises(UsageError, match="not empty"):
        quantize(source, tmp_path / "out", BEFORE)
    there = {path.name for path in tmp_path.iterdir()}
    replaced = step in STEPS[2:]
    assert there == ({"out"} if replaced else {"out", "out.partial"})
    assert listing(tmp_path / "out") == both["after" if replaced else "before"]
    assert verify(tmp_path / "out", source).failures == ()


def test_the_only_whole_copy_stays_whatever_took_its_place(
    killed: Killed, tmp_path: Path, source: Path, both: dict[str, dict[str, object]]
) -> None:
    """Killed between the two renames; then somebody puts another folder there."""
    killed(("rename", 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        quantize(source, tmp_path / "out", AFTER)
    (aside,) = tmp_path.glob("out.replaced-*")
    assert listing(aside) == both["before"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    quantize(source, tmp_path / "out", AFTER)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert listing(tmp_path / "out") == both["after"]
