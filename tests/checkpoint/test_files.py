"""Small files and checksums: whole or not at all, and errors in one line."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from irq_convert.checkpoint.files import (
    atomic_file,
    copy_file_atomic,
    create_temporary,
    git_sha1,
    require_readable,
    sha256_file,
    write_all,
    write_bytes_atomic,
    write_json_atomic,
)
from irq_convert.checkpoint.system import format_bytes
from irq_convert.errors import IrqError
from tests.folders import assert_one_line


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [1, 2.5, None], "a": "naïve ✓"}
    write_json_atomic(path, value)
    assert json.loads(path.read_text("utf-8")) == value
    assert list(json.loads(path.read_text("utf-8"))) == ["b", "a"]
    assert path.read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text("utf-8")) == value
    assert list(tmp_path.iterdir()) == [path]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_bytes_atomic(tmp_path / "x", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 1, (8 << 20) + 3])
def test_copy_and_checksum(tmp_path: Path, size: int) -> None:
    src = tmp_path / "src"
    src.write_bytes(os.urandom(size))
    (tmp_path / "link").symlink_to(src)
    assert copy_file_atomic(tmp_path / "link", tmp_path / "a" / "b" / "dst") == size
    dst = tmp_path / "a" / "b" / "dst"
    assert dst.read_bytes() == src.read_bytes()
    assert not dst.is_symlink()
    assert sha256_file(dst) == hashlib.sha256(src.read_bytes()).hexdigest()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as fd:
            write_all(fd, b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_left_over_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    first, fd = create_temporary(tmp_path / "x")
    os.close(fd)
    number = int(first.name.rsplit("-", 1)[1])
    (tmp_path / f".x.tmp-{os.getpid()}-{number + 1}").write_text("stale")
    write_bytes_atomic(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_errors_name_the_file_at_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for act, path in (
        (lambda: copy_file_atomic(tmp_path / "none", tmp_path / "x"), "none"),
        (lambda: copy_file_atomic(tmp_path / "file", tmp_path / "file" / "x"), "file/x"),
        (lambda: write_bytes_atomic(tmp_path / "none" / "x", b""), "none/x"),
        (lambda: sha256_file(tmp_path), str(tmp_path)),
        (lambda: sha256_file(tmp_path / "none"), "none"),
        (lambda: write_bytes_atomic(tmp_path / ("n" * 300), b""), "too long"),
    ):
        with pytest.raises(IrqError) as caught:
            act()
        assert_one_line(str(caught.value), path, "cannot")


def test_bytes_in_words() -> None:
    assert format_bytes(0) == "0 bytes"
    assert format_bytes(999) == "999 bytes"
    assert format_bytes(1536) == "1536 bytes (1.54 kB)"
    assert format_bytes(5 << 40) == f"{5 << 40} bytes (5497.56 GB)"


def test_git_names_content_as_git_does(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello\n")
    name = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert git_sha1(tmp_path / "f") == git_sha1(b"hello\n") == name
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_require_readable(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "empty").touch()
    require_readable(tmp_path, ["there", "empty"])
    for name in ("gone", "."):
        with pytest.raises(IrqError) as caught:
            require_readable(tmp_path, ["there", name])
        assert str(tmp_path / name) in str(caught.value)
