"""Weight files that come from the Hub as they are read, kept or streamed, whatever goes wrong."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from irq_convert.checkpoint.fetcher import Fetcher, ReadOrder, require_room
from irq_convert.checkpoint.locate import Fetch, open_source
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError
from tests.folders import assert_one_line
from tests.jobs.push.client import Clock, shards_sent, use_hub
from tests.jobs.push.server import Hub, serve
from tests.jobs.push.state import Repo, World

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
NAME = "org/four"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Four shards of two tensors each, an index and a configuration."""
    folder = tmp_path_factory.mktemp("four")
    generator = torch.Generator().manual_seed(0)
    index: dict[str, None] = {}
    for number, name in enumerate(SHARDS):
        part = {f"{number}.{k}": torch.randn(64, 64, generator=generator) for k in "ab"}
        save_file(part, folder / name, {"format": "pt"})
        index |= {f'"{key}": "{name}"': None for key in part}
    text = '{"metadata": {}, "weight_map": {' + ", ".join(index) + "}}"
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("carried")
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def repo(files: dict[str, bytes]) -> Repo:
    return World().add(NAME, files)


@pytest.fixture
def server(repo: Repo) -> Iterator[Hub]:
    with serve(World({NAME: repo})) as running:
        yield running


@pytest.fixture
def clock(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return use_hub(monkeypatch, server.url, tmp_path / "home")


@pytest.fixture(autouse=True)
def quiet(clock: Clock) -> None:
    """Every test has its own client."""


def streamed() -> list[str]:
    """The weight files that lie in streaming folders, and how complete they are."""
    root = Path(constants.HF_HOME, "irq-convert", "streamed")
    return sorted(path.name for path in root.rglob("*.safetensors"))


def in_cache() -> list[str]:
    return sorted(path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def read_all(checkpoint: Checkpoint, after: list[list[str]] | None = None) -> dict[str, bytes]:
    """Every tensor, read in file order; `after` collects what lies on the disk."""
    found = {}
    infos = list(checkpoint.tensors.values())
    with TileReader(read_order=checkpoint.read_order(infos)) as reader:
        for info in infos:
            found[info.name] = b"".join(map(bytes, reader.iter_bytes(info)))
            if after is not None:
                after.append(streamed())
    return found


def wanted(tmp_path: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    folder = tmp_path / "wanted"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return read_all(open_source(str(folder)))


def alone(names: Iterable[str]) -> list[list[str]]:
    """Groups of one file each, as tensors have that lie in one."""
    return [[name] for name in names]


def test_files_come_as_they_are_read_and_stay_in_the_cache(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = open_source(NAME, fetch=Fetch.AS_READ)
    with checkpoint.fetcher:
        assert shards_sent(server) < sum(map(len, files.values()))  # headers, small files whole
        assert in_cache() == []
        read_order = checkpoint.read_order(checkpoint.tensors.values())
        assert read_order.groups == tuple((name,) for name in SHARDS)
        read_order.reach(checkpoint.shards[0])
        checkpoint.fetcher.ensure([SHARDS[1]])
        assert in_cache() == SHARDS[:2]
        assert read_all(checkpoint) == wanted(tmp_path, files)
    assert in_cache() == SHARDS
    assert (checkpoint.folder / "sub" / "notes.txt").read_text() == "carried"
    requests = len(server.requests)
    again = open_source(NAME, checkpoint.revision, Fetch.AS_READ)
    assert type(again.fetcher) is Fetcher
    assert read_all(again) == wanted(tmp_path, files)
    assert len(server.requests) == requests


def test_streaming_keeps_at_most_two_files(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[list[str]] = []
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    with checkpoint.fetcher:
        assert (checkpoint.folder / "sub" / "notes.txt").read_text() == "carried"
        assert read_all(checkpoint, seen) == wanted(tmp_path, files)
    assert max(map(len, seen)) <= 2
    assert [names[0] for names in seen[::2]] == SHARDS  # the one being read is the oldest
    assert in_cache() == streamed() == []
    assert not Path(constants.HF_HOME, "irq-convert", "streamed").exists() or not any(
        Path(constants.HF_HOME, "irq-convert", "streamed").rglob("*.json")
    )
    sizes = sum(len(files[name]) for name in SHARDS)
    assert shards_sent(server) <= 2 * sizes  # each once, and its header


def test_a_home_that_is_relative(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links would lead to where nothing is; both kinds, to small files and to cached weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", "home")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "home/hub")
    kept = open_source(NAME, fetch=Fetch.AS_READ)
    with kept.fetcher:
        kept.fetcher.ensure([SHARDS[1]])
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    with checkpoint.fetcher:
        assert (checkpoint.folder / "sub" / "notes.txt").read_text() == "carried"
        assert read_all(checkpoint) == wanted(tmp_path, files)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_a_deleted_file_is_not_held_open() -> None:
    """It would keep its room on the disk."""
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    infos = list(checkpoint.tensors.values())
    with checkpoint.fetcher, TileReader(read_order=checkpoint.read_order(infos)) as reader:
        for info in infos:
            reader.read_tensor(info)
            number = checkpoint.shards.index(info.shard)
            held = open_files()
            assert str(info.shard) in held
            for earlier in map(str, checkpoint.shards[:number]):
                assert not held & {earlier, f"{earlier} (deleted)"}


def open_files() -> set[str]:
    """What this process has open; other threads may close theirs meanwhile."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(path.readlink()))
    return found


def test_a_file_in_the_cache_is_used_and_never_deleted(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    with open_source(NAME, fetch=Fetch.AS_READ).fetcher as fetcher:
        fetcher.ensure([SHARDS[1]])
    server.sent.clear()
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    with checkpoint.fetcher as fetcher:
        _, bytes_needed = fetcher.room(alone(SHARDS))
        assert bytes_needed == len(files[SHARDS[2]]) + len(files[SHARDS[3]])
        assert read_all(checkpoint) == wanted(tmp_path, files)
    assert SHARDS[1] not in server.sent
    assert in_cache() == [SHARDS[1]]
    assert read_all(open_source(NAME)) == wanted(tmp_path, files)


def test_an_interrupted_run_leaves_its_files_to_the_next(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    first = open_source(NAME, fetch=Fetch.STREAM)
    first.fetcher.ensure(SHARDS[:2])
    first.fetcher.close(done=False)
    assert streamed() == SHARDS[:2]
    half = first.folder / ".cache" / "huggingface" / "download" / "x.incomplete"
    half.write_bytes(b"half")
    server.sent.clear()
    second = open_source(NAME, fetch=Fetch.STREAM)
    assert second.folder == first.folder
    assert not half.exists()
    with second.fetcher:
        assert read_all(second) == wanted(tmp_path, files)
    assert SHARDS[0] not in server.sent
    assert SHARDS[1] not in server.sent
    assert streamed() == []


def test_what_an_interrupted_run_left_is_checked_and_deleted_where_not_needed(
    server: Hub, files: dict[str, bytes]
) -> None:
    first = open_source(NAME, fetch=Fetch.STREAM)
    first.fetcher.ensure([SHARDS[2]])
    first.fetcher.close(done=False)
    data = bytearray(files[SHARDS[2]])
    data[-1] ^= 1
    (first.folder / SHARDS[2]).write_bytes(data)
    (first.folder / SHARDS[3]).write_bytes(b"not asked for")
    second = open_source(NAME, fetch=Fetch.STREAM)
    with second.fetcher as fetcher:
        fetcher.ensure([SHARDS[2]])
        assert streamed() == [SHARDS[2]]
        assert (second.folder / SHARDS[2]).read_bytes() == files[SHARDS[2]]


def test_what_more_processes_left_goes_with_the_end_of_a_run() -> None:
    first, second = (open_source(NAME, fetch=Fetch.STREAM) for _ in range(2))
    for opened in (first, second):
        opened.fetcher.ensure(SHARDS[:1])
        opened.fetcher.close(done=False)
    assert streamed() == [SHARDS[0], SHARDS[0]]
    third = open_source(NAME, fetch=Fetch.STREAM)
    busy = open_source(NAME, fetch=Fetch.STREAM)
    assert (third.folder, busy.folder) == (first.folder, second.folder)
    third.fetcher.close()
    assert streamed() == [SHARDS[0]]  # in use
    busy.fetcher.close(done=False)
    open_source(NAME, fetch=Fetch.STREAM).fetcher.close()
    assert streamed() == []


def test_a_run_that_is_not_to_be_continued_leaves_nothing() -> None:
    opened = open_source(NAME, fetch=Fetch.STREAM)
    opened.fetcher.keep = False

    def interrupted() -> None:
        opened.fetcher.ensure(SHARDS[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened.fetcher:
        interrupted()
    assert streamed() == []


def test_two_runs_stream_side_by_side(files: dict[str, bytes], tmp_path: Path) -> None:
    one, two = (open_source(NAME, fetch=Fetch.STREAM) for _ in range(2))
    assert one.folder != two.folder
    with one.fetcher, two.fetcher:
        assert read_all(one) == read_all(two) == wanted(tmp_path, files)
    assert streamed() == []


def test_a_run_that_fetched_nothing_leaves_nothing() -> None:
    opened = open_source(NAME, fetch=Fetch.STREAM)
    opened.fetcher.close(done=False)
    opened.fetcher.close()
    assert not opened.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("fetch", [Fetch.AS_READ, Fetch.STREAM])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("drop", {"times": 3}),
        ("reset", {"times": 2}),
        ("short", {}),
        ("corrupt", {}),
        ("slow", {"times": 9}),
        ("status", {"status": 500, "times": 2}),
        ("status", {"status": 503, "times": 2}),
        ("status", {"status": 429, "times": 2, "headers": {"Retry-After": "7"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("status", "")),
)
def test_faults_that_pass(
    server: Hub,
    clock: Clock,
    files: dict[str, bytes],
    tmp_path: Path,
    fetch: Fetch,
    kind: str,
    fields: dict[str, Any],
) -> None:
    checkpoint = open_source(NAME, fetch=fetch)
    fault = server.fail(kind, "^/storage/.*00002-of", **fields)
    with checkpoint.fetcher:
        assert read_all(checkpoint) == wanted(tmp_path, files)
    assert fault.struck == fault.times or kind == "slow"
    if fields.get("headers"):
        assert max(clock.slept) >= 7  # as the server asked


@pytest.mark.parametrize("path", ["^/api/models/org/four", "/tree/", "index.json", "^/storage/"])
@pytest.mark.parametrize("status", [429, 503])
def test_faults_of_the_first_questions(
    server: Hub, files: dict[str, bytes], tmp_path: Path, path: str, status: int
) -> None:
    for method in ("GET", "HEAD"):
        server.fail("status", path, method, status=status)
    checkpoint = open_source(NAME, fetch=Fetch.AS_READ)
    with checkpoint.fetcher:
        assert read_all(checkpoint) == wanted(tmp_path, files)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", [Fetch.AS_READ, Fetch.STREAM])
@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("status", {"status": 500}, ["HTTP 500", "later"]),
        ("status", {"status": 403}, ["HTTP 403", "token"]),
        ("status", {"status": 429, "headers": {"Retry-After": "3600"}}, ["HTTP 429", "wait"]),
        ("corrupt", {}, [SHARDS[1], "checksum", "twice"]),
        ("short", {}, ["check the connection", "size"]),
        ("drop", {}, ["check the connection"]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_faults_that_stay_are_one_line_and_leave_nothing_damaged(
    server: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
    fetch: Fetch,
    kind: str,
    fields: dict[str, Any],
    words: list[str],
) -> None:
    checkpoint = open_source(NAME, fetch=fetch)
    fault = server.fail(kind, "^/storage/.*00002-of", times=10_000, **fields)
    with pytest.raises(IrqError) as caught, checkpoint.fetcher:
        read_all(checkpoint)
    assert_one_line(str(caught.value), NAME, *words)
    assert SHARDS[1] not in in_cache() + streamed()
    fault.times = 0
    again = open_source(NAME, fetch=fetch)
    with again.fetcher:
        assert read_all(again) == wanted(tmp_path, files)


def test_a_branch_that_moves_does_not_mix_revisions(
    repo: Repo, files: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    repo.commit("main", {name: data[::-1] for name, data in files.items()})
    with checkpoint.fetcher:
        assert read_all(checkpoint) == wanted(tmp_path, files)
    assert checkpoint.revision != repo.branches["main"]


def test_gated_and_private_models_are_one_line(repo: Repo, server: Hub) -> None:
    """The list of files of a gated model is open to all, its files are not."""
    repo.gated = True
    with pytest.raises(IrqError) as caught:
        open_source(NAME, fetch=Fetch.STREAM)
    assert_one_line(str(caught.value), NAME, "accept its terms", server.url, "HF_TOKEN")
    repo.gated, repo.private = False, True
    with pytest.raises(IrqError) as caught:
        open_source(NAME, fetch=Fetch.AS_READ)
    assert_one_line(str(caught.value), NAME, "check the spelling", "HF_TOKEN")


def test_a_token_opens_a_private_model(
    repo: Repo, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with (opened := open_source(NAME, fetch=Fetch.STREAM)).fetcher:
        assert read_all(opened) == wanted(tmp_path, files)


def test_offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(NAME, fetch=Fetch.AS_READ).fetcher as fetcher:
        fetcher.ensure(SHARDS[:1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_source(NAME, fetch=Fetch.STREAM).fetcher as fetcher:
        fetcher.ensure(SHARDS[:1])
        with pytest.raises(IrqError) as caught:
            fetcher.ensure(SHARDS[1:2])
    assert_one_line(str(caught.value), NAME, "HF_HUB_OFFLINE")
    shutil.rmtree(Path(constants.HF_HOME, "irq-convert"))
    with pytest.raises(IrqError) as caught:
        open_source(NAME, fetch=Fetch.STREAM)
    assert_one_line(str(caught.value), NAME, "HF_HUB_OFFLINE")


def test_ending_a_run_ends_its_download(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    checkpoint = open_source(NAME, fetch=Fetch.AS_READ)
    server.fail("slow", "^/storage/", times=100)
    checkpoint.fetcher.ahead(SHARDS[:1])
    while not server.asked("GET", "^/storage/.*00001-of"):
        time.sleep(0.01)
    checkpoint.fetcher.close(done=False)
    assert not [t for t in threading.enumerate() if t.name == "irq-hub" and t.is_alive()]
    assert in_cache() == []


def test_a_reader_that_waits_is_let_go_when_the_run_fails(server: Hub) -> None:
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    server.fail("slow", "^/storage/", times=100, pause=0.3)
    read_order = checkpoint.read_order(checkpoint.tensors.values())
    failures: list[BaseException] = []

    def read() -> None:
        try:
            read_order.reach(checkpoint.shards[0])
        except IrqError as error:
            failures.append(error)

    def interrupted() -> None:
        while not server.asked("GET", "^/storage/.*00001-of"):
            time.sleep(0.01)
        raise KeyboardInterrupt

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.raises(KeyboardInterrupt), read_order:
        interrupted()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert "the run has ended" in str(failures[0])
    checkpoint.fetcher.close(done=False)
    assert not [t for t in threading.enumerate() if t.name == "irq-hub" and t.is_alive()]


def test_room_is_asked_for_where_files_will_lie(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(len(files[name]) for name in SHARDS)
    with open_source(NAME, fetch=Fetch.AS_READ).fetcher as kept:
        assert kept.room(alone(SHARDS)) == (Path(constants.HF_HUB_CACHE), total)
        assert kept.room(alone(SHARDS[:2]), alone(SHARDS[1:])) == kept.room(alone(SHARDS))
    checkpoint = open_source(NAME, fetch=Fetch.STREAM)
    with checkpoint.fetcher as fetcher:
        read_order = checkpoint.read_order(checkpoint.tensors.values())
        two = len(files[SHARDS[0]]) + len(files[SHARDS[1]])
        assert fetcher.room(read_order.groups) == (checkpoint.folder, two)
        assert fetcher.room(read_order.groups, alone(SHARDS[:1])) == (
            checkpoint.folder,
            two + len(files[SHARDS[0]]),  # a second process
        )
        monkeypatch.setattr("irq_convert.checkpoint.disk.free_bytes", lambda folder: 100 + two)
        require_room(tmp_path / "out", 100, [read_order])
        with pytest.raises(IrqError) as caught:
            require_room(tmp_path / "out", 101, [read_order])
    assert_one_line(str(caught.value), "not enough space", str(101 + two), "fetch the source")


class Recorder(Fetcher):
    """Notes what a read_order asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []

    def ensure(self, names: object) -> None:
        self.calls.append(("ensure", *names))  # type: ignore[misc]

    def ahead(self, names: object) -> None:
        self.calls.append(("ahead", *names))  # type: ignore[misc]

    def release(self, names: object) -> None:
        if names:
            self.calls.append(("release", *names))  # type: ignore[misc]


def test_a_feed_releases_what_is_not_needed_again() -> None:
    fetcher, folder = Recorder(), Path("/f")
    read_order = ReadOrder(fetcher, folder, alone("aabac"))
    assert read_order.groups == (("a",), ("b",), ("a",), ("c",))
    for name in "abac":
        read_order.reach(folder / name)
    assert fetcher.calls == [
        ("ahead", "a", "b"),
        ("ensure", "a"),
        ("ahead", "b", "a"),
        ("ensure", "b"),
        ("release", "b"),
        ("ahead", "a", "c"),
        ("ensure", "a"),
        ("release", "a"),
        ("ahead", "c"),
        ("ensure", "c"),
    ]
    fetcher.calls.clear()
    read_order.reach(folder / "b")  # out of order: fetched again
    assert ("ensure", "b") in fetcher.calls


def test_a_tensor_of_several_files_keeps_them_together() -> None:
    """Every tensor of Meta's files lies in all of them: none is released before the last one."""
    fetcher, folder = Recorder(), Path("/f")
    read_order = ReadOrder(fetcher, folder, ["ab", "ab", "ab", "c"])
    assert (read_order.groups, read_order.widest) == ((("a", "b"), ("c",)), 2)
    both = (folder / "a", folder / "b")
    read_order.reach(*both)
    read_order.reach(*both)
    read_order.reach(folder / "c")
    assert fetcher.calls == [
        *([("ahead", "a", "b", "c"), ("ensure", "a", "b")] * 2),
        ("release", "a", "b"),
        ("ahead", "c"),
        ("ensure", "c"),
    ]
