"""Conversions that are continued: the same bytes as undisturbed, and nothing trusted that is not
whole."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.artifact.manifest import total_stats
from irq_convert.checkpoint import disk
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.blocks import BlockShape
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats, decode_stats, encode_stats
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.quantize import job as resume
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.pipeline import quantize_shard
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.folders import listing
from tests.tiny import UNKNOWN, write_source

SHARD_BYTES = 25_000


class Course(Progress):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.last = ""
        self.total = self.done = self.before = 0

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        self.last, self.total, self.done = text, nbytes, 0

    def resumed(self, tensors: int, nbytes: int) -> None:
        self.done = self.before = nbytes

    def advance(self, nbytes: int, finished: int) -> None:
        self.done += nbytes

    def note(self, text: str) -> None:
        self.notes.append(text)

    def kept(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", None, UNKNOWN, shards=2)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The undisturbed result."""
    convert(source, tmp_path / "whole")
    return listing(tmp_path / "whole")


def convert(source: Path, out: Path, progress: Progress | None = None, **more: Any) -> Any:
    options = {"max_shard_bytes": SHARD_BYTES, **more}
    return quantize(str(source), out, QuantizeOptions(**options), progress=progress)


def stop(
    source: Path,
    out: Path,
    shards: int = 2,
    error: BaseException | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Path:
    """Let a run fail when it is to begin another shard than the first few; what it left."""
    made = 0

    def fail(*args: Any) -> Any:
        nonlocal made
        if made == shards:
            raise error or KeyboardInterrupt
        made += 1
        return quantize_shard(*args)

    failure = error or KeyboardInterrupt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "quantize_shard", fail)
        with pytest.raises(type(failure)) as caught:
            convert(source, out, progress, **more)
    stop.error = caught.value  # type: ignore[attr-defined]
    return out.with_name(f"{out.name}.partial")


def count_shards(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


# --- continuing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_run_is_continued(
    source: Path, whole: dict[str, bytes], tmp_path: Path, shards: int
) -> None:
    out, course = tmp_path / "out", Course()
    partial = stop(source, out, shards, progress=course)
    total = count_shards(tmp_path / "whole")
    assert course.notes == [
        f"{shards} of {total} shards are finished and kept in {partial}: the same command "
        "continues there"
    ]
    times = {p.name: p.stat().st_mtime_ns for p in partial.glob("files/*")}
    assert len(times) == shards
    course = Course()
    convert(source, out, course)
    assert listing(out) == whole
    assert {n: (out / n).stat().st_mtime_ns for n in times} == times  # not made again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]
    assert course.notes == [f"continuing {partial}: {shards} of {total} shards are finished"]
    assert 0 < course.before < course.done == course.total == open_checkpoint(source).nbytes


def test_what_does_not_decide_a_byte_may_change(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop(source, out)
    convert(source, out, threads=1, tile_weights=5000, overwrite=True, resume=Resume.REQUIRED)
    assert listing(out) == whole


def test_many_stops_in_a_row(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shards in range(1, count_shards(tmp_path / "whole")):
        partial = stop(source, out, 1)
        assert count_shards(partial / "files") == shards
    convert(source, out)
    assert listing(out) == whole


def test_an_old_artifact_stays_until_the_new_one_is_whole(source: Path, tmp_path: Path) -> None:
    out, two = tmp_path / "out", QuantSpec("nf2")
    convert(source, out, spec=two)
    before = listing(out)
    stop(source, out, overwrite=True)
    assert listing(out) == before
    with pytest.raises(UsageError, match="not empty"):
        convert(source, out)
    convert(source, out, overwrite=True)
    convert(source, tmp_path / "other")
    assert listing(out) == listing(tmp_path / "other") != before


def test_files_beside_the_weights_are_those_of_the_end(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = stop(source, out)
    (partial / "files" / "gone from the source.txt").write_text("x")
    (partial / "files" / "deep").mkdir()
    (partial / "files" / ".model.safetensors.tmp-1-2").write_text("half")
    convert(source, out)
    assert listing(out) == whole


# --- what is kept, and when -----------------------------------------------------------------------


def test_before_the_first_shard_nothing_is_kept(source: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    stop(source, tmp_path / "new" / "out", 0)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), IrqError("x"), OSError()])
def test_never_keeps_nothing(source: Path, tmp_path: Path, error: BaseException) -> None:
    before, course = listing(tmp_path), Course()
    stop(source, tmp_path / "out", error=error, resume=Resume.NEVER, progress=course)
    assert listing(tmp_path) == before
    assert not course.notes


@pytest.mark.parametrize("error", [SystemExit(143), MemoryError(), RuntimeError("a crash")])
def test_any_failure_keeps_what_is_finished(
    source: Path, whole: dict[str, bytes], tmp_path: Path, error: BaseException
) -> None:
    course = Course()
    stop(source, tmp_path / "out", error=error, progress=course)
    assert "2 of" in course.notes[0]
    convert(source, tmp_path / "out")
    assert listing(tmp_path / "out") == whole


def test_an_error_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    course = Course()
    partial = stop(source, tmp_path / "out", error=UsageError("a reason"), progress=course)
    said = stop.error  # type: ignore[attr-defined]
    assert isinstance(said, UsageError)
    assert str(said).startswith("a reason; 2 of ")
    assert str(said).endswith(f"kept in {partial}: the same command continues there")
    assert not course.notes


def test_a_failure_of_the_next_run_keeps_the_first_ones_work(source: Path, tmp_path: Path) -> None:
    stop(source, tmp_path / "out", 2)
    partial = stop(source, tmp_path / "out", 0)
    assert count_shards(partial / "files") == 2


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Files may not grow beyond a limit: the write in the middle of a shard fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(source: Path, tmp_path: Path, small_disk: Callable[[int], None]) -> None:
    """The shard that does not fit is not there, those before are, and the line says all."""
    # Every tensor in a shard of its own, and one of the last is dense and large.
    out, each = tmp_path / "out", {"max_shard_bytes": 1, "keep": (r"layers\.1.*down",)}
    convert(source, tmp_path / "whole", **each)
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    kept = next(at for at, s in enumerate(sizes) if s > max([8192, *sizes[:at]]) and at > 1)
    small_disk(max(sizes[:kept]))
    with pytest.raises(IrqError) as caught:
        convert(source, out, **each)
    small_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert shards[kept].name in str(caught.value)
    assert f"{kept} of {len(sizes)} shards are finished and kept" in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "out.partial" / "files").iterdir()) == [
        path.name for path in shards[:kept]
    ]
    convert(source, out, resume=Resume.REQUIRED, **each)
    assert listing(out) == listing(tmp_path / "whole")


def test_the_room_asked_for_is_for_the_rest(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    needed = estimate_quantize(
        str(source), out, QuantizeOptions(max_shard_bytes=SHARD_BYTES)
    ).disk_needed
    partial = stop(source, out, 3)
    there = sum(path.stat().st_size for path in partial.glob("files/*"))
    monkeypatch.setattr(disk, "free_bytes", lambda folder: needed - there - 1)
    with pytest.raises(IrqError, match=r"not enough space.*3 of") as caught:
        convert(source, out)
    assert str(needed - there) in str(caught.value)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: needed - there)
    convert(source, out)
    assert listing(out) == whole


# --- what is trusted ------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def nothing(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, cut, nothing, Path.unlink])
def test_a_damaged_shard_is_made_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """As after a power cut, when a disk has lied, or a person has been there."""
    out, course = tmp_path / "out", Course()
    partial = stop(source, out, 3)
    victim = sorted(partial.glob("files/*.safetensors"))[1]
    damage(victim)
    convert(source, out, course)
    assert listing(out) == whole
    assert course.notes[0] == f"{victim}: damaged since it was written; made again"
    assert "2 of" in course.notes[1]


@pytest.mark.parametrize("damage", [flip, cut, nothing])
def test_a_damaged_record_is_none(
    source: Path, whole: dict[str, bytes], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out, course = tmp_path / "out", Course()
    partial = stop(source, out, 3)
    victim = sorted(partial.glob("records/model*"))[1]
    damage(victim)
    convert(source, out, course)
    assert listing(out) == whole
    # A cut of the last line feed loses nothing.
    assert ("made again" in course.notes[0]) is (damage is not cut)


@pytest.mark.parametrize("damage", [flip, nothing, Path.unlink])
def test_without_the_record_of_the_run_all_is_made_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out, course = tmp_path / "out", Course()
    partial = stop(source, out, 3)
    record = partial / "records" / "run.record"
    record.write_bytes(record.read_bytes()[:-1])
    damage(record)
    with pytest.raises(UsageError, match="nothing to resume"):
        convert(source, out, resume=Resume.REQUIRED)
    convert(source, out, course)
    assert listing(out) == whole
    assert not course.before


def test_a_link_is_no_finished_shard(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = stop(source, out, 2)
    victim = min(partial.glob("files/*.safetensors"))
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    convert(source, out)
    assert listing(out) == whole
    assert not (out / victim.name).is_symlink()


# --- what is refused ------------------------------------------------------------------------------


def touch(source: Path) -> None:
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))


def other_weights(source: Path) -> None:
    path = next(source.glob("*.safetensors"))
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (None, {"spec": QuantSpec("nf3")}, "codebook was nf4 and is nf3 now"),
        (None, {"spec": QuantSpec(block_size=32)}, "block size was 64 and is 32 now"),
        (None, {"keep": ("down",)}, 'keep was [] and is ["down"] now'),
        (None, {"max_shard_bytes": 30_000}, "max shard bytes was 25000 and is 30000 now"),
        (touch, {}, "safetensors of the source was written again"),
        (other_weights, {}, "safetensors of the source has other contents"),
    ],
)
def test_another_run_is_refused(
    source: Path,
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    more: dict[str, Any],
    words: str,
) -> None:
    out = tmp_path / "out"
    partial = stop(source, out, 2)
    if change is not None:
        change(source)
    before = listing(partial)
    for attempt in (
        lambda: convert(source, out, **more),
        lambda: convert(source, out, **{**more, "resume": Resume.REQUIRED}),
        lambda: estimate_quantize(
            str(source), out, QuantizeOptions(**{"max_shard_bytes": SHARD_BYTES, **more})
        ),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        message = str(caught.value)
        assert words in message
        assert "--resume never" in message
        assert f"{partial}: holds 2 finished shards of another run" in message
        assert "\n" not in message
        after = listing(partial)
        assert {n for n in after if before[n] != after[n]} <= {".output.lock"}
    convert(source, out, **more, resume=Resume.NEVER)
    convert(source, tmp_path / "other", **more)
    assert listing(out) == listing(tmp_path / "other")


def test_another_version_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(source, tmp_path / "out")
    ours = resume.quantize_identity
    monkeypatch.setattr(
        resume, "quantize_identity", lambda *args: replace(ours(*args), producer="irq-convert 99")
    )
    with pytest.raises(UsageError, match=r"begun by irq-convert .*, this is irq-convert 99"):
        convert(source, tmp_path / "out")


def test_a_plan_that_comes_out_otherwise_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another version of transformers, which may see other layers in the same class."""
    stop(source, tmp_path / "out")
    monkeypatch.setattr(resume, "plan_digest", lambda headers: "other")
    with pytest.raises(UsageError, match="no longer quantized or stored alike"):
        convert(source, tmp_path / "out")


def test_other_options_replace_a_run_that_finished_nothing(source: Path, tmp_path: Path) -> None:
    """Killed before its first shard, it holds nothing that would be lost."""
    partial = stop(source, tmp_path / "out", 1)
    for path in (*partial.glob("files/*"), *partial.glob("records/model*")):
        path.unlink()
    convert(source, tmp_path / "out", spec=QuantSpec("nf3"))
    convert(source, tmp_path / "other", spec=QuantSpec("nf3"))
    assert listing(tmp_path / "out") == listing(tmp_path / "other")


def test_required_with_nothing_there(source: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="nothing to resume"):
        convert(source, tmp_path / "new" / "out", resume=Resume.REQUIRED)
    assert listing(tmp_path) == before
    partial = stop(source, tmp_path / "out", 1)
    flip(next(partial.glob("files/*.safetensors")))
    with pytest.raises(UsageError, match="nothing to resume"):
        convert(source, tmp_path / "out", resume=Resume.REQUIRED)


def test_a_dry_run_says_what_is_there(source: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", QuantizeOptions(max_shard_bytes=SHARD_BYTES)
    fresh = estimate_quantize(str(source), out, options)
    assert fresh.finished == 0
    partial = stop(source, out, 3)
    before = listing(partial)
    found = estimate_quantize(str(source), out, options)
    assert listing(partial) == before
    assert found.finished == 3
    size = sum(path.stat().st_size for path in partial.glob("files/*"))
    assert found.disk_needed == fresh.disk_needed - size
    assert found.seconds * found.rate < found.quantized_weights
    assert found.bytes_out == fresh.bytes_out
    never = QuantizeOptions(max_shard_bytes=SHARD_BYTES, resume=Resume.NEVER)
    assert estimate_quantize(str(source), out, never).finished == 0


# --- what is noted --------------------------------------------------------------------------------

FINITE = st.floats(0, 1e300)


@given(
    st.integers(1, 9),
    st.integers(1, 200),
    st.sampled_from([32, 64]),
    st.integers(0, 1 << 60),
    st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=5),
)
def test_statistics_come_back(
    rows: int, cols: int, block: int, table: int, energies: list[tuple[float, float]]
) -> None:
    shape = BlockShape(rows, cols, block, 3)
    stats = TensorStats(shape, table, table // 2, np.array(energies))
    again = decode_stats(json.loads(json.dumps(encode_stats(stats))))
    for figure in ("weights", "entropy_plain", "entropy", "energy", "squared_error"):
        assert getattr(again, figure) == getattr(stats, figure)
    assert again.relative_error == stats.relative_error
    if stats.energy < 1e300:
        assert total_stats([again]) == total_stats([stats])
