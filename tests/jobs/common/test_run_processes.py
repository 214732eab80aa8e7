"""Processes that meet, each a thread here, over a store of torch's: all end, and one speaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from torch.distributed import HashStore

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common import torchrun as room
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.common.torchrun import FailedElsewhere, RunProcesses

Outcomes = list[BaseException | None]
CONNECT = room._connect


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    found = HashStore()
    monkeypatch.setattr(room, "_connect", lambda ranks: found)
    monkeypatch.setattr(room, "BEAT", 0.02)
    monkeypatch.setattr(room, "_LOOK", 0.01)
    monkeypatch.setattr(room, "_PAUSE", 0.005)


def run(*works: Callable[[RunProcesses], None]) -> Outcomes:
    """Let each of `works` be a process; what each ended with."""
    outcomes: Outcomes = [None] * len(works)
    number, meetings = RunProcesses._number, []
    for rank in range(len(works)):
        RunProcesses._number = number  # every process counts its own meetings
        meetings.append(RunProcesses(Ranks(rank, len(works))).__enter__())

    def process(rank: int) -> None:
        try:
            with ExitStack() as stack:
                stack.push(meetings[rank])
                works[rank](meetings[rank])
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a process hangs"
    return outcomes


def forever(processes: RunProcesses) -> None:
    processes.wait(lambda: False)


def fails(error: BaseException) -> Callable[[RunProcesses], None]:
    def work(processes: RunProcesses) -> None:
        raise error

    return work


def test_alone_nothing_happens() -> None:
    with RunProcesses(Ranks()) as processes:
        processes.put("key", b"")
        processes.watch()
        assert not processes.has("key")


def test_values_go_round() -> None:
    found: list[bytes] = []

    def first(processes: RunProcesses) -> None:
        processes.put("go", b"a\x00b")
        found.append(processes.take("done/1"))

    def second(processes: RunProcesses) -> None:
        found.append(processes.take("go"))
        processes.put("done/1", b"x")

    assert run(first, second) == [None, None]
    assert found == [b"a\x00b", b"x"]


def test_the_first_speaks_for_the_one_that_fails() -> None:
    outcomes = run(forever, forever, fails(UsageError("no such folder")))
    assert isinstance(outcomes[0], UsageError)
    assert str(outcomes[0]) == "process 2 of 3: no such folder"
    assert isinstance(outcomes[1], FailedElsewhere)
    assert isinstance(outcomes[2], FailedElsewhere)
    assert outcomes[2].exit_code == 2


def test_all_fail_alike_and_one_speaks() -> None:
    outcomes = run(*(fails(IrqError("damaged")) for _ in range(3)))
    assert type(outcomes[0]) is IrqError
    assert str(outcomes[0]) == "damaged"
    assert [type(error) for error in outcomes[1:]] == [FailedElsewhere, FailedElsewhere]


def test_the_first_fails() -> None:
    outcomes = run(fails(IrqError("disk full")), forever, forever)
    assert str(outcomes[0]) == "disk full"
    assert [type(error) for error in outcomes[1:]] == [FailedElsewhere, FailedElsewhere]


def test_a_process_that_is_stopped() -> None:
    outcomes = run(forever, fails(SystemExit(143)))
    assert str(outcomes[0]) == "process 1 of 2 was stopped"
    assert isinstance(outcomes[1], SystemExit)


def test_nobody_is_there_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ANSWER", 0.1)

    def busy(processes: RunProcesses) -> None:
        time.sleep(0.5)

    outcomes = run(busy, fails(IrqError("damaged")))
    assert outcomes[0] is None
    assert str(outcomes[1]) == "process 1 of 2: damaged"


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_is_noticed(monkeypatch: pytest.MonkeyPatch, dead: int) -> None:
    """No sign of life for too long: nobody waits for ever."""
    monkeypatch.setattr(room, "PATIENCE", 0.3)
    monkeypatch.setattr(room, "ANSWER", 0.1)

    def dies(processes: RunProcesses) -> None:
        processes.take(f"done/{1 - dead}")  # it has been seen
        processes._ended.set()
        time.sleep(1.5)

    def waits(processes: RunProcesses) -> None:
        processes.put(f"done/{1 - dead}", b"")
        forever(processes)

    works = [waits, waits]
    works[dead] = dies
    outcomes = run(*works)
    assert f"process {dead} of 2 has not been heard of" in str(outcomes[1 - dead])


def test_progress_is_added_up() -> None:
    seen: list[tuple[int, int]] = []

    def first(processes: RunProcesses) -> None:
        processes.wait(lambda: processes.others() == (150, 3))
        seen.append(processes.others())
        processes.put("enough", b"")

    def other(processes: RunProcesses) -> None:
        rank = processes.ranks.rank
        processes.count(50 * rank, rank)
        processes.take("enough")

    assert run(first, other, other) == [None, None, None]
    assert seen == [(150, 3)]


def test_a_lost_connection_is_one_line() -> None:
    with pytest.raises(IrqError, match="connection between the processes"):
        room._ask(lambda: (_ for _ in ()).throw(RuntimeError("Broken pipe\nat line 5")))


def test_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        CONNECT(Ranks(0, 2))
