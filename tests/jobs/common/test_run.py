"""What the loop over shards leaves when it is stopped twice, or when hosts share no folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from irq_convert.checkpoint.disk import Staging, partial_folder, staging_folder
from irq_convert.errors import IrqError
from irq_convert.jobs.common import ending as endings
from irq_convert.jobs.common import shard_job as loop
from irq_convert.jobs.common.ending import Ending
from irq_convert.jobs.common.identity import Identity
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.common.records import ShardRecord, begin_records, write_shard_record
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.progress import Progress

IDENTITY = Identity(job="a job", source={}, options={}, plan="p")


@pytest.mark.parametrize("resume", [Resume.AUTO, Resume.NEVER])
def test_a_second_signal_costs_no_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: Resume
) -> None:
    """torchrun passes on the Ctrl-C that its processes have had from the terminal already."""

    def again(root: Path, seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(endings, "await_members", again)
    out = tmp_path / "out"
    ending = Ending(resume, 2, RunProcesses(Ranks()), Progress())

    def work(staging: Staging) -> None:
        staging.clear()
        staging.keep = False
        token = begin_records(staging.records, IDENTITY)
        ending.begun(staging)
        (staging.files / "a").write_bytes(b"1")
        write_shard_record(staging.records, token, ShardRecord("a", 1, "0" * 64, {}))
        raise KeyboardInterrupt

    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, staging_folder(out) as staging, ending.settles(staging):
        work(staging)
    kept = (partial_folder(out) / "files" / "a").exists()
    assert kept == (resume == Resume.AUTO)
    assert not out.exists()


def test_a_folder_of_another_run_on_this_host_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(tmp_path, keep=True)
    token = begin_records(staging.records, IDENTITY)
    loop._find(staging, token, RunProcesses(Ranks()))
    monkeypatch.setattr(loop, "_VISIBLE", 0.05)
    with pytest.raises(IrqError, match="must share the folder"):
        loop._find(staging, "another", RunProcesses(Ranks()))
