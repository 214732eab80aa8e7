"""`push`, and `quantize --push-to-hub`, as a user runs them, with the Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from irq_convert.cli.merge import _KINDS
from irq_convert.jobs.push.pushed_folder import FolderKind
from tests.folders import listing
from tests.jobs.push.server import Hub, serve
from tests.jobs.push.state import World

from .process import Commands, Result, assert_fails, fresh
from .sources import make_source


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World()
    folder = make_source(tmp_path / "repo", shards=3)
    world.add("org/model", {path.name: path.read_bytes() for path in folder.iterdir()})
    return world


@pytest.fixture
def server(world: World) -> Iterator[Hub]:
    with serve(world) as running:
        yield running


Run = Callable[..., Result]


@pytest.fixture
def settings(server: Hub, hub_settings: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return hub_settings(server.url)


@pytest.fixture
def run(irq: Commands, settings: dict[str, str], work: Path) -> Run:
    """A command that may write to the Hub of the test, run in `work`."""
    return lambda *args, **env: irq(*args, cwd=work, **{**settings, **env})


@pytest.mark.slow
def test_from_the_hub_to_the_hub(
    run: Run, world: World, settings: dict[str, str], work: Path
) -> None:
    args = ["quantize", "org/model", "out", "--bits", 3, "--stream", "--json"]
    args += ["--push-to-hub", "org/model-3bit", "--private"]
    result = fresh(*args, cwd=work, **settings)
    assert (result.code, result.err) == (0, ""), result
    report = json.loads(result.out)
    repo = world.repos["org/model-3bit"]
    assert repo.private
    assert report["push"]["commit"] == repo.branches["main"]
    files = {n: b for n, b in repo.main.items() if n not in (".gitattributes", "README.md")}
    assert files == listing(work / "out")
    kept = [path for path in (work / "home").rglob("*.safetensors") if "headers" not in path.parts]
    assert kept == []  # nothing stays of the source but its headers
    local = run("quantize", work.with_name("repo"), "local", "--bits", 3)
    assert local.code == 0, local
    both = listing(work / "local"), listing(work / "out")
    assert both[0].pop("irq_manifest.json") != both[1].pop("irq_manifest.json")
    assert both[0] == both[1]
    again = run("push", "out", "org/model-3bit")
    assert (again.code, again.err) == (0, ""), again
    assert "nothing: the repository is up to date" in again.out
    dry = run("push", "out", "org/elsewhere", "--dry-run", HF_TOKEN="")
    assert (dry.code, dry.err) == (0, ""), dry
    for words in ("would upload", "model.safetensors", "base_model: org/model", "# elsewhere"):
        assert words in dry.out
    assert "org/elsewhere" not in world.repos


def test_a_target_that_cannot_be_pushed_to_is_refused_first(
    run: Run, server: Hub, work: Path
) -> None:
    args = ["quantize", "org/model", "out"]
    to = ["--push-to-hub", "org/x"]
    assert_fails(run(*args, *to, HF_TOKEN=""), 1, "org/x", "no token")
    assert_fails(run(*args, "--private"), 2, "--private", "--push-to-hub")
    assert not (work / "out").exists()
    assert not server.asked("GET", "org/model")


def test_a_push_that_fails_leaves_the_artifact_and_says_how_to_go_on(
    run: Run, world: World, server: Hub
) -> None:
    server.fail("status", "/commit/", "POST", times=1000, status=400)
    to = ["--push-to-hub", "org/x", "--private", "--push-revision", "v1"]
    result = run("quantize", "org/model", "out", "--json", *to)
    later = "irq-convert push out org/x --private --revision v1"  # or else all could read it
    report = json.loads(result.out)  # of the conversion, which is done
    assert (report["out"], "push" in report) == ("out", False)
    assert_fails(replace(result, out=""), 1, "org/x", "HTTP 400", later)
    server.faults.clear()
    assert run("push", "out", "org/x").code == 0
    assert "irq_manifest.json" in world.repos["org/x"].main


def test_a_repository_of_another_kind_is_refused_first(run: Run, world: World, work: Path) -> None:
    world.add("org/dense", {"model.safetensors": b"merged", "irq_merge.json": b"{}"})
    result = run("quantize", "org/model", "out", "--push-to-hub", "org/dense")
    assert_fails(result, 2, "org/dense", "`irq-convert push OUT org/dense --overwrite`")
    assert not (work / "out").exists()


def test_what_a_merge_pushes_is_what_its_folder_will_be() -> None:
    assert {to.value: FolderKind(kind) for to, kind in _KINDS.items()} == {
        "dense": FolderKind.DENSE,
        "adapter": FolderKind.ADAPTER,
        "irq": FolderKind.MERGED,
    }
