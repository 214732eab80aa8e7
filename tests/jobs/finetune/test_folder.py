"""The adapter folder: who may use it, what a killed run leaves, what appears and when."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from irq_convert.artifact.adapter_config import CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.finetune.folder import (
    RUN,
    STATE,
    RunFolder,
    newest_checkpoint,
    run_folder,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def opened(
    out: Path, base: Path, resume: Resume = Resume.AUTO, overwrite: bool = False
) -> RunFolder:
    with run_folder(out, base, resume=resume, overwrite=overwrite) as folder:
        return folder


def write_checkpoint(folder: RunFolder, step: int) -> None:
    made = folder.writing / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text("{}")


def write_adapter(folder: RunFolder, text: str) -> None:
    made = folder.state / "adapter"
    made.mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE, "README.md"):
        (made / name).write_text(text)
    folder.publish(made, {"text": text})


def test_a_finished_run_leaves_the_adapter_alone(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "new" / "adapter"
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        folder.write(RUN, {})
        write_checkpoint(folder, 3)
        folder.accept_checkpoint(3)
        write_adapter(folder, "a")
        folder.finish()
    assert sorted(path.name for path in out.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, NOTE_FILE]


def test_old_settings_never_stand_beside_new_weights(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed anywhere in publishing, the folder holds one adapter, or none that anything loads."""
    out, seen = tmp_path / "adapter", []
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        write_adapter(folder, "old")
        folder.finish()
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        result = replace(self, target)
        texts = {name: (out / name).read_text() for name in (WEIGHTS_FILE, CONFIG_FILE, NOTE_FILE)
                 if (out / name).is_file()}  # fmt: skip
        seen.append(texts)
        return result

    with run_folder(out, base, resume=Resume.AUTO, overwrite=True) as folder:
        monkeypatch.setattr(Path, "replace", watched)
        write_adapter(folder, "new")
    assert len(seen) >= 2
    for texts in seen:
        ages = {"new" in text for text in texts.values()}
        assert CONFIG_FILE not in texts or len(ages) == 1
    assert ages == {True}


def fail(out: Path, base: Path, do: Callable[[RunFolder], None]) -> None:
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        folder.write(RUN, {"a": 1})
        do(folder)
        raise InterruptedError


def test_a_failed_run_leaves_nothing(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InterruptedError):
        fail(tmp_path / "a" / "b", base, lambda folder: None)
    assert list(tmp_path.iterdir()) == [base]


def test_checkpoints_count_when_they_are_whole(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"

    def save(folder: RunFolder) -> None:
        for step in (9, 10):
            write_checkpoint(folder, step)
            assert folder.checkpoint() == (None if step == 9 else folder.state / "checkpoint-9")
            folder.accept_checkpoint(step)
            assert folder.checkpoint() == folder.state / f"checkpoint-{step}"
        assert not (folder.state / "checkpoint-9").exists()
        write_checkpoint(folder, 11)

    with pytest.raises(InterruptedError):
        fail(out, base, save)
    with run_folder(out, base, resume=Resume.REQUIRED, overwrite=False) as folder:
        assert folder.resuming
        assert folder.read(RUN) == {"a": 1}
        assert newest_checkpoint(out) == folder.state / "checkpoint-10"
        assert not folder.writing.exists()


def test_an_unfinished_run_is_continued_or_begun_anew(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    folder = opened(out, base)
    folder.write(RUN, {})
    write_checkpoint(folder, 7)
    folder.accept_checkpoint(7)
    for resume in (Resume.AUTO, Resume.REQUIRED):
        for overwrite in (False, True):  # the same command goes on, whatever it replaces
            same = opened(out, base, resume=resume, overwrite=overwrite)
            assert same.resuming
            assert same.checkpoint() == same.state / "checkpoint-7"
    again = opened(out, base, resume=Resume.NEVER, overwrite=True)
    assert not again.resuming
    assert again.checkpoint() is None
    assert again.read(RUN) is None


def test_a_run_killed_before_its_first_state_is_begun_anew(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    opened(out, base).write(RUN, {"learning_rate": 1})
    with pytest.raises(UsageError, match="nothing to resume"):
        opened(out, base, resume=Resume.REQUIRED)
    again = opened(out, base)
    assert not again.resuming
    assert again.read(RUN) is None


def test_an_older_adapter_survives_a_full_disk(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter"
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        write_adapter(folder, "old")
        folder.finish()
    with run_folder(out, base, resume=Resume.AUTO, overwrite=True) as folder:
        full = OSError(errno.ENOSPC, "no space")
        monkeypatch.setattr("irq_convert.jobs.finetune.folder.write_json_atomic", raises(full))
        with pytest.raises(IrqError, match="no space"):
            write_adapter(folder, "new")
    assert {(out / name).read_text() for name in (WEIGHTS_FILE, CONFIG_FILE)} == {"old"}
    assert "old" in (out / NOTE_FILE).read_text()


def raises(error: Exception) -> Callable[..., None]:
    def do(*args: object) -> None:
        raise error

    return do


def test_nothing_to_resume(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished run, so there is nothing to resume"):
        opened(tmp_path / "out", base, resume=Resume.REQUIRED)
    assert list(tmp_path.iterdir()) == [base]


def test_a_finished_adapter_is_only_overwritten_when_asked(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        write_adapter(folder, "old")
        folder.finish()
    with pytest.raises(UsageError, match="not empty; choose another folder, or --overwrite"):
        opened(out, base)
    with pytest.raises(UsageError, match="finished adapter, so there is nothing to resume"):
        opened(out, base, resume=Resume.REQUIRED)
    with run_folder(out, base, resume=Resume.AUTO, overwrite=True) as folder:
        assert (out / WEIGHTS_FILE).read_text() == "old"  # until there is a new one
        write_adapter(folder, "new")
        folder.finish()
    assert (out / WEIGHTS_FILE).read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_that_are_no_adapters(tmp_path: Path, base: Path, overwrite: bool) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    for out, says in (
        (other, "not empty and no adapter"),
        (other / "cat.jpg", "a file, not a folder"),
        (base, "the source itself"),
        (base / "adapter", "inside the source"),
    ):
        with pytest.raises(UsageError, match=says):
            opened(out, base, overwrite=overwrite)
    assert [path.name for path in other.iterdir()] == ["cat.jpg"]
    assert not list(base.iterdir())


def test_two_runs_at_once(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    with run_folder(out, base, resume=Resume.AUTO, overwrite=False) as folder:
        folder.write(RUN, {})
        with pytest.raises(UsageError, match="in use by a run"):
            opened(out, base)
    assert (out / STATE / RUN).exists()


def test_what_a_kill_before_anything_leaves_is_nothing(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out" / STATE / "writing").mkdir(parents=True)
    assert not opened(tmp_path / "out", base).resuming
