"""Records of a run: read back as written, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.errors import IrqError
from irq_convert.jobs.common.identity import Identity
from irq_convert.jobs.common.records import (
    RUN_NAME,
    ShardRecord,
    begin_records,
    has_shard_record,
    list_shard_records,
    read_run,
    read_shard_record,
    write_shard_record,
)

IDENTITY = Identity("quantize", {"model": "m"}, {"bits": 3, "keep": ["a"]}, "0" * 64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_results_come_back(tmp_path_factory: pytest.TempPathFactory, results: dict) -> None:
    folder = tmp_path_factory.mktemp("run") / "records"
    token = begin_records(folder, IDENTITY)
    record = ShardRecord("model.safetensors", 12, "ab" * 32, results)
    write_shard_record(folder, token, record)
    assert read_shard_record(folder, token, record.name) == record
    assert read_run(folder) == (token, IDENTITY.to_dict())


def test_a_record_that_is_cut_or_changed_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    token = begin_records(folder, IDENTITY)
    write_shard_record(folder, token, ShardRecord("s", 1, "aa", {"t": 0.5}))
    for name, read in (
        ("s.record", lambda: read_shard_record(folder, token, "s")),
        (RUN_NAME, lambda: read_run(folder)),
    ):
        path = folder / name
        whole = path.read_bytes()
        for length in range(len(whole) - 1):  # all but the last line feed
            path.write_bytes(whole[:length])
            assert read() is None, length
        for at in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert read() is None, at
        path.write_bytes(whole)
        assert read() is not None
        path.unlink()
        assert read() is None


def test_records_of_another_run_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    token = begin_records(folder, IDENTITY)
    write_shard_record(folder, "another", ShardRecord("s", 1, "aa", {}))
    assert read_shard_record(folder, token, "s") is None
    assert has_shard_record(folder, "s")
    assert not has_shard_record(folder, "t")
    assert list_shard_records(folder) == ["s"]
    write_shard_record(folder, token, ShardRecord("s", 1, "aa", {}))
    (folder / "s.record").rename(folder / "t.record")
    assert read_shard_record(folder, token, "t") is None


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(IrqError, match="records"):
        begin_records(tmp_path / "none" / "records", IDENTITY)
