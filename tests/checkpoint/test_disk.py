"""Output folders: refused when they would hurt, whole when they appear, recoverable when killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from irq_convert.checkpoint import disk
from irq_convert.checkpoint.disk import (
    check_output,
    output_folder,
    partial_folder,
    remove_leftovers,
    require_space,
    staging_folder,
)
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.lock import Held, await_members, join_folder, take_folder
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.checkpoint.system import free_bytes
from irq_convert.errors import IrqError, UsageError
from tests.folders import assert_one_line

from .helpers import make_checkpoint, snapshot


def fill(out: Path, text: str = "new", error: BaseException | None = None, **options: bool) -> Path:
    """Write one file through `output_folder`, then perhaps fail; return the staging folder."""
    with output_folder(out, **options) as files:  # type: ignore[arg-type]
        (files / "sub").mkdir()
        (files / "sub" / "file").write_text(text)
        if error is not None:
            raise error
        return files


def leave(out: Path) -> Path:
    """Fail, keeping what is written, as a run does that can be continued; return its folder."""
    with contextlib.suppress(KeyboardInterrupt), staging_folder(out) as staging:
        staging.clear()
        staging.keep = True
        (staging.files / "file").write_text("half")
        staging.records.mkdir()
        (staging.records / "note").write_text("of the first run")
        raise KeyboardInterrupt
    return staging.root


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "write a model")
    assert not (tmp_path / "not").exists()
    needed = free_bytes(tmp_path) + (1 << 50)
    with pytest.raises(IrqError) as caught:
        require_space(tmp_path / "not", needed, "write a model")
    assert_one_line(str(caught.value), str(tmp_path / "not"), "write a model", str(needed), "free")


def test_unusable_outputs(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "models" / "source")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "alias").symlink_to(source)
    before = snapshot(tmp_path)
    for out, overwrite, word in (
        (tmp_path / "file", True, "a file"),
        (tmp_path / "full", False, "not empty"),
        (source, True, "the source itself"),
        (tmp_path / "alias", True, "the source itself"),
        (source / "out", True, "inside the source"),
        (tmp_path / "alias" / "out", True, "inside the source"),
        (tmp_path / "models", True, "holds the source"),
        (tmp_path / "models" / ".." / "models", True, "holds the source"),
    ):
        for check in (check_output, _enter):
            with pytest.raises(UsageError) as caught:
                check(out, source, overwrite)
            assert_one_line(str(caught.value), str(out), word)
    assert snapshot(tmp_path) == before


def _enter(out: Path, source: Path, overwrite: bool) -> None:
    with output_folder(out, source, overwrite):
        pass


def test_mount_point_is_refused() -> None:
    with pytest.raises(UsageError, match="mount point"):
        _enter(Path("/proc"), Path("/nowhere"), True)


@pytest.mark.parametrize("state", ["absent", "empty", "deep"])
def test_folder_appears_at_the_end(tmp_path: Path, state: str) -> None:
    out = tmp_path / "deep" / "er" / "out" if state == "deep" else tmp_path / "out"
    if state == "empty":
        out.mkdir()
    with output_folder(out) as files:
        assert files.parent.parent == out.parent
        assert files.parent.name == "out.partial"
        (files / "file").write_text("x")
        assert not out.exists() or not any(out.iterdir())
    assert snapshot(out) == {"file": b"x"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert snapshot(tmp_path / "real") == {"sub/file": b"new"}


@pytest.mark.parametrize("error", [IrqError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fill(tmp_path / "new" / "out", error=error)
    assert not list(tmp_path.iterdir())


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    (out / "gone").touch()
    with pytest.raises(UsageError, match="not empty"):
        fill(out)
    with pytest.raises(IrqError, match="boom"):
        fill(out, error=IrqError("boom"), overwrite=True)
    assert snapshot(out) == {"sub/file": b"old", "gone": b""}
    fill(out, overwrite=True)
    assert snapshot(out) == {"sub/file": b"new"}
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_kept_is_there_for_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    root = leave(out)
    assert root == partial_folder(out) == tmp_path / "out.partial"
    (root / "files" / ".x.tmp-1-0").touch()
    (root / "files" / "other").touch()
    (root / "files" / "folder").mkdir()
    (root / "files" / "link").symlink_to("file")
    with staging_folder(out) as staging:
        assert (staging.records / "note").read_text() == "of the first run"
        staging.keep_only({"file", "folder", "link"})
        assert sorted(snapshot(staging.files)) == ["file"]
        (staging.files / "more").touch()
    assert snapshot(out) == {"file": b"half", "more": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_wanted_is_removed(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    with output_folder(tmp_path / "out") as files:
        assert not list(files.iterdir())
        assert sorted(p.name for p in files.parent.iterdir()) == [LOCK_NAME, "files"]


def test_a_refusal_costs_an_earlier_run_nothing(tmp_path: Path) -> None:
    root = leave(tmp_path / "out")
    before = snapshot(root)
    with pytest.raises(UsageError), staging_folder(tmp_path / "out"):
        raise UsageError("other options")
    after = snapshot(root)
    assert after.pop(LOCK_NAME) == before.pop(LOCK_NAME)
    assert after == before


def test_a_failure_removes_records_first_and_the_lock_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle leaves a folder that is known as a run's, and in which none is noted."""
    root = leave(tmp_path / "out")
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watch(path: Path, *args: object, **options: object) -> None:
        seen.append(sorted(p.name for p in root.iterdir()))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", watch)
    with pytest.raises(IrqError, match="boom"):
        fill(tmp_path / "out", error=IrqError("boom"))
    assert seen[:2] == [[LOCK_NAME, "files", "records"], [LOCK_NAME, "files"]]
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_finished_run_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    root = leave(out)
    remove_leftovers(out)
    assert root.exists()  # its files are still there
    (root / "files").rename(out)
    with staging_lock(root):
        remove_leftovers(out)
        assert root.exists()
    remove_leftovers(out)
    assert list(tmp_path.iterdir()) == [out]


@contextlib.contextmanager
def staging_lock(root: Path) -> Iterator[None]:
    fd = take_folder(root)
    yield
    os.close(fd)


def test_members_of_a_killed_run_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = leave(tmp_path / "out")
    member = join_folder(root)
    other = join_folder(root)
    assert not await_members(root, 0)
    monkeypatch.setattr("irq_convert.checkpoint.disk._STRAGGLERS", 0.1)
    with pytest.raises(UsageError) as caught, staging_folder(tmp_path / "out"):
        pass
    assert_one_line(str(caught.value), "out.partial", "earlier run")
    os.close(member)
    assert not await_members(root, 0)
    os.close(other)
    assert await_members(root, 0)


def test_a_folder_that_no_run_made_is_not_deleted(tmp_path: Path) -> None:
    precious = tmp_path / "out.partial" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("42")
    with pytest.raises(UsageError) as caught:
        fill(tmp_path / "out")
    assert_one_line(str(caught.value), "out.partial", "not made by a run")
    assert precious.read_text() == "42"
    (tmp_path / "o2.partial").write_text("a file")
    with pytest.raises(UsageError, match="in the way"):
        fill(tmp_path / "o2")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as staging:
        (staging / "mine").touch()
        with pytest.raises(UsageError) as caught:
            fill(out)
        assert_one_line(str(caught.value), "out.partial", str(os.getpid()))
        assert (staging / "mine").exists()
    assert snapshot(out) == {"mine": b""}


WRITER = """
import sys, time, pathlib
from irq_convert.checkpoint import disk
from irq_convert.checkpoint import writer
out = pathlib.Path(sys.argv[1])
if sys.argv[2] == "swap":  # stop between moving the old folder aside and moving the new one in
    rename = pathlib.Path.rename
    def stop(self, target):
        if self.name == "files":
            print("ready", flush=True)
            time.sleep(60)
        return rename(self, target)
    pathlib.Path.rename = stop
with disk.staging_folder(out, overwrite=True) as holder:
    holder.clear()
    staging = holder.files
    (staging / "config.json").write_text("{}")
    with writer.ShardWriter(staging / "model.safetensors",
                            [writer.TensorSpec("a", "U8", (4,))]) as shard:
        shard.write("a", b"newa")
    if sys.argv[2] == "write":
        print("ready", flush=True)
        time.sleep(60)
"""


def kill_a_run(out: Path, when: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out), when], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match=str(process.pid)):
            fill(out, overwrite=True)
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("old", [False, True])
def test_killed_while_writing(tmp_path: Path, old: bool) -> None:
    out = tmp_path / "out"
    if old:
        fill(out, "old")
    kill_a_run(out, "write")
    if old:
        assert snapshot(out) == {"sub/file": b"old"}
    else:
        assert not out.exists()
        with pytest.raises(UsageError, match="no such folder"):
            open_checkpoint(out)
    fill(out, overwrite=True)
    assert snapshot(out) == {"sub/file": b"new"}
    assert list(tmp_path.iterdir()) == [out]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    kill_a_run(out, "swap")
    assert not out.exists()
    with pytest.raises(UsageError, match="not empty"):
        fill(out)
    assert snapshot(out) == {"sub/file": b"old"}
    with staging_folder(out, overwrite=True):
        pass
    assert list(open_checkpoint(out).tensors) == ["a"]
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_does_not_cost_what_was_moved_aside(tmp_path: Path) -> None:
    """A kill between two renames, and then someone makes the folder by hand."""
    (tmp_path / "out.replaced-123").mkdir()
    (tmp_path / "out.replaced-123" / "old").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="not empty"):
        fill(tmp_path / "out")
    assert snapshot(tmp_path) == {"out/old": b"precious"}


def test_leftover_of_a_replaced_folder_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out.replaced-123" / "x").mkdir(parents=True)
    (tmp_path / "out.replaced-by-me").mkdir()
    fill(tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.replaced-by-me"]


@pytest.mark.parametrize("before", [False, True])
def test_a_signal_when_the_lock_is_just_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Nothing is left, though nobody has seen yet that there is a lock; an earlier run's is."""
    out = tmp_path / "new" / "out"
    if before:
        leave(out)

    def interrupted(root: Path, held: Held) -> int:
        take_folder(root, held)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "take_folder", interrupted)
    with pytest.raises(KeyboardInterrupt), staging_folder(out):
        pass
    assert [path.read_text() for path in tmp_path.rglob("file")] == ["half"] * before
    assert before or not list(tmp_path.iterdir())
    monkeypatch.undo()
    with output_folder(out):  # the lock is free
        pass
