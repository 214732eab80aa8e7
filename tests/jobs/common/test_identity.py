"""What counts as the same run: every change is seen, and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from irq_convert.jobs.common.identity import (
    SAMPLE_BYTES,
    SAMPLES,
    Identity,
    differences,
    fingerprint_files,
    plan_digest,
)
from tests.cli.sources import SHARD, make_source

BASE = Identity("quantize", {"revision": "a"}, {"bits": 3, "keep": []}, "p", {"f": {"bytes": 1}})


def test_nothing_has_changed() -> None:
    assert differences(BASE.to_dict(), replace(BASE).to_dict()) == []
    assert replace(BASE, options={"bits": 3, "keep": ()}).to_dict() == BASE.to_dict()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"producer": "irq-convert 9"}, "it was begun by irq-convert"),
        ({"job": "merge"}, "job was quantize and is merge now"),
        ({"options": {"bits": 4, "keep": []}}, "bits was 3 and is 4 now"),
        ({"options": {"bits": 3}}, "keep was [] and is null now"),
        ({"source": {"revision": "b"}}, "the source's revision was a and is b now"),
        ({"plan": "q"}, "no longer quantized or stored alike"),
        ({"files": {}}, "f of the source is gone"),
        ({"files": {"f": {"bytes": 1}, "g": {}}}, "g of the source is new"),
        ({"files": {"f": {"bytes": 2}}}, "f of the source had 1 bytes and has 2 now"),
    ],
)
def test_what_has_changed_is_named(now: dict, words: str) -> None:
    found = differences(BASE.to_dict(), replace(BASE, **now).to_dict())
    assert len(found) == 1
    assert words in found[0]
    assert BASE.digest() != replace(BASE, **now).digest()


def test_a_record_of_anything_is_compared() -> None:
    assert differences({}, BASE.to_dict())
    assert differences({"producer": BASE.producer, "options": 3, "files": []}, BASE.to_dict())


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def change_silently(at: int) -> Callable[[Path], None]:
    """Change a byte and put the time back, as an archive or a failing disk would."""

    def change(path: Path) -> None:
        before, raw = path.stat(), bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewrite, "was written again"),
        (append, "bytes and has"),
        (change_silently(20), "has other contents"),
        (change_silently(-1), "has other contents"),
        (Path.unlink, "is gone"),
    ],
)
def test_local_files(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    source = make_source(tmp_path / "source")

    def identity() -> Identity:
        return replace(BASE, files=fingerprint_files(source, sorted(source.glob("*.safetensors"))))

    before = identity()
    assert differences(before.to_dict(), identity().to_dict()) == []
    change(source / SHARD)
    (found,) = differences(before.to_dict(), identity().to_dict())
    assert found.startswith(f"{SHARD} of the source")
    assert words in found
    assert (identity().digest() == before.digest()) is (change is rewrite)


def test_samples_lie_all_over_a_large_file(tmp_path: Path) -> None:
    """Another model in the same shapes changes nearly every number: each sample sees it."""
    path = tmp_path / "large"
    size = 4 * SAMPLES * SAMPLE_BYTES
    path.write_bytes(bytes(8) + bytes(size))
    before = fingerprint_files(tmp_path, [path])
    seen = 0
    for at in range(8, size, SAMPLE_BYTES):
        change_silently(at)(path)
        seen += fingerprint_files(tmp_path, [path]) != before
        change_silently(at)(path)
    assert seen + 1 >= SAMPLES


def test_of_a_file_that_is_no_safetensors_its_start_counts_as_header(tmp_path: Path) -> None:
    """The first bytes of a zip file are no length: else a pickle would be read from end to end."""
    path = tmp_path / "pytorch_model.bin"
    start, rest = 1 << 20, 4 * SAMPLES * SAMPLE_BYTES
    path.write_bytes(b"PK\x03\x04" + bytes(4 + start + rest))
    before = fingerprint_files(tmp_path, [path])
    seen = []
    for at in (*range(4, start, start // 4), *range(start + 8, start + rest, 7 * SAMPLE_BYTES)):
        change_silently(at)(path)
        seen.append(fingerprint_files(tmp_path, [path]) != before)
        change_silently(at)(path)
    assert all(seen[:4])
    assert 0 < sum(seen[4:]) < len(seen[4:]) / 2


def test_a_plan_is_its_names_and_headers() -> None:
    assert plan_digest([("a", b"x"), ("b", b"y")]) == plan_digest(iter([("a", b"x"), ("b", b"y")]))
    others = [[("b", b"y"), ("a", b"x")], [("a", b"x")], [("a", b"x"), ("b", b"z")], [("ab", b"")]]
    assert len({plan_digest(found) for found in others}) == len(others)
