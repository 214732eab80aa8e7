"""`push` with the real client against the Hub of the tests: all of it, or one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoCard, constants, snapshot_download

from irq_convert.artifact.verify import verify_artifact
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.push import push as push_room
from irq_convert.jobs.push.push import PushOptions, PushReport, check_push, push
from irq_convert.jobs.push.pushed_folder import FolderKind

from .client import Clock
from .server import Hub
from .state import Repo, World

NAME = "org/base-irq"
pytestmark = pytest.mark.usefixtures("clock")


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_whole(repo: Repo, folder: Path, report: PushReport, branch: str = "main") -> None:
    """The branch holds the folder's files and the card, and nothing else."""
    files = dict(repo.files(repo.branches[branch]))
    files.pop(".gitattributes")
    assert files == contents(folder) | {"README.md": report.card.encode()}


def metadata(repo: Repo) -> dict[str, object]:
    return dict(RepoCard(repo.main["README.md"].decode()).data.to_dict())


def assert_refused(
    kind: type[IrqError], words: list[str], folder: Path, repo_id: str, **options: object
) -> None:
    with pytest.raises(IrqError) as caught:
        push(folder, repo_id, PushOptions(**options))  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_push_and_a_second_one(world: World, server: Hub, artifact: Path, tmp_path: Path) -> None:
    report = push(artifact, NAME)
    repo = world.repos[NAME]
    assert_whole(repo, artifact, report)
    assert repo.messages == ["initial commit", "Upload artifact with irq-convert"]
    assert (report.created, repo.private) == (True, False)
    assert report.commit == repo.branches["main"]
    assert set(report.uploaded) == {*contents(artifact), "README.md"}
    copy = Path(snapshot_download(NAME, local_dir=tmp_path / "copy"))
    assert verify_artifact(copy).ok
    server.requests.clear()
    again = push(artifact, NAME)
    assert (again.uploaded, again.bytes, again.commit, again.created) == ((), 0, None, False)
    assert not server.asked("POST", "") + server.asked("PUT", "")
    assert set(again.unchanged) == set(report.uploaded)
    # A copy of the repository, card and all, is the same to push.
    assert push(copy, NAME).uploaded == ()


def test_only_what_changed_is_sent(world: World, server: Hub, artifact: Path) -> None:
    push(artifact, NAME)
    (artifact / "tokenizer_config.json").write_text('{"changed": true}')
    server.requests.clear()
    report = push(artifact, NAME, PushOptions(verify=False))
    assert report.uploaded == ("README.md", "tokenizer_config.json")  # the card names its hash
    assert not server.asked("PUT", "")
    assert_whole(world.repos[NAME], artifact, report)


def test_the_card_of_an_artifact(world: World, artifact: Path) -> None:
    push(artifact, NAME)
    manifest = json.loads((artifact / "irq_manifest.json").read_text())
    found = metadata(world.repos[NAME])
    assert found["base_model"] == "org/base"
    assert found["base_model_relation"] == "quantized"
    assert found["library_name"] == "transformers"
    assert (found["license"], found["license_name"]) == ("other", "tales")
    assert found["language"] == ["en", "no"]
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["irq-convert", "irq", "icq", "3-bit", "4-bit", "nf3", "nf4"]
    text = world.repos[NAME].main["README.md"].decode()
    command = (
        f"irq-convert quantize org/base --revision {manifest['source']['revision']} "
        "--bits 3 --codebook nf --bits-for down_proj=4 --block-size 64 --objective entropy"
    )
    assert command in text
    for entry in manifest["files"].values():
        assert entry["sha256"] in text
    assert f"{manifest['totals']['relative_error']:.6f}" in text
    assert f"{manifest['totals']['entropy']:.4f} bits" in text
    assert "It tells tales" not in text


def test_the_lines_of_the_card_load_the_model(world: World, artifact: Path) -> None:
    report = push(artifact, NAME)
    code = report.card.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert names["tokenizer"]("once upon a time")["input_ids"]  # type: ignore[operator]


def test_an_existing_card_keeps_its_own_text(world: World, artifact: Path) -> None:
    mine = (
        "---\n# a note\nlicense: mit\ntags: [mine]\nwidget:\n- text: Once\n---\n# Title\n\nHello.\n"
    )
    world.add(NAME, {".gitattributes": b"", "README.md": mine.encode()})
    report = push(artifact, NAME)
    repo = world.repos[NAME]
    assert_whole(repo, artifact, report)
    found = metadata(repo)
    assert found["license"] == "mit"
    assert "license_name" not in found
    assert found["widget"] == [{"text": "Once"}]
    assert found["tags"][:2] == ["mine", "irq-convert"]  # type: ignore[index]
    assert found["base_model_relation"] == "quantized"
    text = report.card
    assert "# Title\n\nHello.\n\n<!-- irq-convert begins" in text
    edited = text.replace("Hello.", "Hello again.") + "\nAfter.\n"
    repo.commit("main", dict(repo.main) | {"README.md": edited.encode()})
    assert push(artifact, NAME).uploaded == ()
    repo.commit("main", dict(repo.main) | {"README.md": edited.replace("## Load", "x").encode()})
    renewed = push(artifact, NAME)
    assert renewed.uploaded == ("README.md",)
    assert renewed.card == edited


def test_private_branch_and_message(world: World, artifact: Path) -> None:
    options = PushOptions(private=True, revision="v1/test", message="First of its kind")
    report = push(artifact, "base-irq", options)
    repo = world.repos["me/base-irq"]
    assert repo.private
    assert set(repo.main) == {".gitattributes"}
    assert_whole(repo, artifact, report, "v1/test")
    assert repo.messages[-1] == "First of its kind"
    assert 'from_pretrained("me/base-irq", revision="v1/test"' in report.card
    assert report.repo_id == "me/base-irq"
    assert push(artifact, "base-irq", options).uploaded == ()
    assert push(artifact, "base-irq").commit is not None
    world.add("org/open", {".gitattributes": b""})
    assert_refused(UsageError, ["org/open", "public"], artifact, "org/open", private=True)


FAULTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "drop in a file": ("drop", "PUT", "^/put/", {"times": 2}),
    "reset in a file": ("reset", "PUT", "^/put/", {"times": 2}),
    "500 for a file": ("status", "PUT", "^/put/", {"times": 2}),
    "answer to a file lost": ("lost", "PUT", "^/put/", {}),
    "503 for the batch": ("status", "POST", "batch$", {"status": 503}),
    "429 for the batch": (
        *("status", "POST", "batch$"),
        {"status": 429, "headers": {"Retry-After": "9"}},
    ),
    "500 for the check of a file": ("status", "POST", "^/verify/", {}),
    "drop of the commit": ("drop", "POST", "/commit/", {}),
    "500 for the commit": ("status", "POST", "/commit/", {"times": 2}),
    "429 for the commit": (
        *("status", "POST", "/commit/"),
        {"status": 429, "headers": {"Retry-After": "9"}},
    ),
    "answer to the commit lost": ("lost", "POST", "/commit/", {}),
    "500 for the new repository": ("status", "POST", "/repos/create", {}),
    "answer to the new repository lost": ("lost", "POST", "/repos/create", {}),
    "502 for the modes": ("status", "POST", "/preupload/", {"status": 502}),
    "504 for the token": ("status", "GET", "whoami", {"status": 504}),
    "500 for the list": ("status", "GET", "/tree/", {}),
    "slow answers": ("slow", "POST", "", {"times": 9, "pause": 0.005}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [(name, parts) for name in FAULTS for parts in (False, True) if not parts or "file" in name],
)
def test_faults_that_pass(
    world: World, server: Hub, clock: Clock, artifact: Path, name: str, parts: bool
) -> None:
    kind, method, path, fields = FAULTS[name]
    world.part_size = 20_000 if parts else None
    fault = server.fail(kind, path, method, **fields)
    report = push(artifact, NAME, PushOptions(verify=False))
    repo = world.repos[NAME]
    assert fault.struck
    assert_whole(repo, artifact, report)
    assert len(repo.commits) == 2
    assert report.commit == repo.branches["main"]
    if "headers" in fields:
        assert max(clock.slept) >= 9
    assert push(artifact, NAME, PushOptions(verify=False)).uploaded == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("PUT", "^/put/", 500, ["HTTP 500", "push again"]),
        ("PUT", "^/put/", 403, ["HTTP 403"]),
        ("POST", "batch$", 429, ["HTTP 429", "push again"]),
        ("POST", "/commit/", 503, ["HTTP 503", "push again"]),
        ("POST", "/commit/", 403, ["may not write", "HTTP 403"]),
        ("POST", "/commit/", 412, ["changed during the push"]),
        ("POST", "/commit/", 400, ["refused the push", "HTTP 400"]),
        ("POST", "/repos/create", 500, ["HTTP 500"]),
        ("GET", "whoami", 401, ["HTTP 401", "token"]),
        ("GET", "/tree/", 500, ["HTTP 500"]),
    ],
)
def test_faults_that_stay_are_one_line_and_a_later_push_completes(
    world: World,
    server: Hub,
    artifact: Path,
    method: str,
    path: str,
    status: int,
    words: list[str],
) -> None:
    fault = server.fail("status", path, method, times=10_000, status=status)
    assert_refused(IrqError, [NAME, *words], artifact, NAME, verify=False)
    if NAME in world.repos:
        assert set(world.repos[NAME].main) == {".gitattributes"}
    fault.times = 0
    sent = set(server.world.large)
    server.requests.clear()
    report = push(artifact, NAME, PushOptions(verify=False))
    assert_whole(world.repos[NAME], artifact, report)
    assert not [oid for oid in sent if server.asked("PUT", oid)]  # nothing is sent twice


def test_a_file_that_fails_in_the_middle_is_taken_up_again(
    world: World, server: Hub, artifact: Path
) -> None:
    shard = sorted(artifact.glob("*.safetensors"))[-1]
    oid = json.loads((artifact / "irq_manifest.json").read_text())["files"][shard.name]["sha256"]
    fault = server.fail("drop", f"^/put/{oid}", "PUT", times=10_000)
    words = [NAME, "check the connection", "not sent twice"]
    assert_refused(IrqError, words, artifact, NAME, verify=False)
    arrived = set(world.large)
    fault.times = 0
    server.requests.clear()
    report = push(artifact, NAME, PushOptions(verify=False))
    assert_whole(world.repos[NAME], artifact, report)
    assert arrived
    assert not [done for done in arrived if server.asked("PUT", done)]


def test_another_commit_in_between_is_not_overrun(
    world: World, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(artifact, NAME)
    repo = world.repos[NAME]
    (artifact / "config.json").write_text("{}")
    send = push_room.commit

    def late(*args: object) -> str:
        repo.commit("main", dict(repo.main) | {"other.txt": b"theirs"})
        return send(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(push_room, "commit", late)
    assert_refused(IrqError, [NAME, "changed during"], artifact, NAME, verify=False)
    assert repo.main["other.txt"] == b"theirs"
    monkeypatch.setattr(push_room, "commit", send)
    push(artifact, NAME, PushOptions(verify=False))
    assert repo.main["config.json"] == b"{}"
    assert repo.main["other.txt"] == b"theirs"


def test_shards_of_an_earlier_push_go_and_others_weights_stay(
    world: World, artifact: Path, tmp_path: Path
) -> None:
    push(artifact, NAME)
    repo = world.repos[NAME]
    old = dict(repo.main) | {"model-00001-of-00099.safetensors": b"old", "mine.txt": b"kept"}
    repo.commit("main", old)
    report = push(artifact, NAME)
    assert report.deleted == ("model-00001-of-00099.safetensors",)
    assert report.deleted[0] not in repo.main
    assert repo.main["mine.txt"] == b"kept"
    world.add("org/other", {"model.safetensors": b"theirs", "config.json": b"{}"})
    words = ["org/other", "model.safetensors", "--overwrite"]
    assert_refused(UsageError, words, artifact, "org/other", verify=False)
    with pytest.raises(UsageError, match="`irq-convert push OUT org/other --overwrite`"):
        check_push("org/other", FolderKind.ARTIFACT, PushOptions())
    assert world.repos["org/other"].main["model.safetensors"] == b"theirs"
    done = push(artifact, "org/other", PushOptions(overwrite=True))
    assert done.deleted == ("model.safetensors",)


def test_another_kind_of_the_same_file_names_is_not_written_over(
    world: World, artifact: Path
) -> None:
    shards = [path.name for path in artifact.glob("*.safetensors")]
    world.add("org/same", dict.fromkeys(shards, b"theirs"))
    assert_refused(UsageError, [shards[0][:5], "--overwrite"], artifact, "org/same", verify=False)
    assert world.repos["org/same"].main[shards[0]] == b"theirs"
    files = {"model.safetensors": b"merged", "irq_merge.json": b"{}"}
    world.add("org/dense", {**files, ".gitattributes": b""})
    assert_refused(UsageError, ["`push --overwrite`"], artifact, "org/dense", verify=False)
    check_push("org/dense", FolderKind.DENSE, PushOptions())
    for kind in (FolderKind.ARTIFACT, FolderKind.MERGED, FolderKind.ADAPTER):  # told before hours
        with pytest.raises(UsageError, match=r"`irq-convert push OUT org/dense --overwrite`"):
            check_push("org/dense", kind, PushOptions())
    done = push(artifact, "org/dense", PushOptions(overwrite=True))
    assert sorted(done.deleted) == ["irq_merge.json", "model.safetensors"]
    assert_whole(world.repos["org/dense"], artifact, done)


def test_a_dry_run_sends_nothing(
    world: World, server: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = contents(artifact)
    report = push(artifact, NAME, PushOptions(dry_run=True))
    assert world.repos == {}
    assert not server.asked("POST", "") + server.asked("PUT", "")
    assert set(report.uploaded) == {*before, "README.md"}
    assert report.commit is None
    assert contents(artifact) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(artifact, NAME, PushOptions(dry_run=True)).card == report.card
    monkeypatch.undo()


def test_a_damaged_artifact_is_not_pushed(world: World, artifact: Path) -> None:
    path = artifact / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert_refused(IrqError, ["not pushed", "tokenizer.json", "verify"], artifact, NAME)
    assert world.repos == {}
    assert push(artifact, NAME, PushOptions(verify=False)).commit


@pytest.mark.parametrize(
    ("repo_id", "word"),
    [
        ("datasets/org/x", "only model repositories"),
        ("https://huggingface.co/org/x", "only model repositories"),
        ("a/b/c", "not a Hub id"),
        ("org/a b", "not a Hub id"),
        ("", "not a Hub id"),
        ("org/x.git", "not a Hub id"),
    ],
)
def test_ids_that_are_none(artifact: Path, repo_id: str, word: str) -> None:
    assert_refused(UsageError, [word], artifact, repo_id)
    with pytest.raises(UsageError):
        check_push(repo_id, FolderKind.ARTIFACT, PushOptions())


def test_folders_that_cannot_be_pushed(artifact: Path, tmp_path: Path) -> None:
    words = {
        "absent": "no such folder",
        "empty": "irq_export.json",
        "x.partial": "not finished",
        "locked": "not finished",
        "dirty": "killed",
    }
    (tmp_path / "empty").mkdir()
    for name in ("x.partial", "locked", "dirty"):
        shutil.copytree(artifact, tmp_path / name)
    (tmp_path / "locked" / ".output.lock").touch()
    (tmp_path / "dirty" / ".model.safetensors.tmp-1-2").touch()
    for name, word in words.items():
        assert_refused(UsageError, [name, word], tmp_path / name, NAME)


def test_tokens_and_rights(world: World, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(IrqError, [NAME, "no token", "hf auth login"], artifact, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(IrqError, [NAME, "HTTP 401", "token"], artifact, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert_refused(IrqError, [NAME, "may only read"], artifact, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert_refused(IrqError, ["else/x", "may not write"], artifact, "else/x")
    world.add("else/there", {".gitattributes": b""})
    assert_refused(IrqError, ["else/there", "may not write"], artifact, "else/there")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(IrqError, [NAME, "HF_HUB_OFFLINE"], artifact, NAME)


def test_cards_that_cannot_be_updated(world: World, artifact: Path) -> None:
    cases: Mapping[str, str] = {
        "---\n a: [\n---\n": "metadata cannot be read",
        "---\n- a\n---\n": "metadata cannot be read",
        "# T\n<!-- irq-convert ends -->\n": "not one pair",
    }
    for number, (card, word) in enumerate(cases.items()):
        world.add(f"org/{number}", {"README.md": card.encode()})
        assert_refused(IrqError, ["README.md", word], artifact, f"org/{number}", verify=False)
        assert set(world.repos[f"org/{number}"].main) == {"README.md"}


def test_a_hub_that_is_not_there(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(IrqError, [NAME, "127.0.0.1:9", "check the connection"], artifact, NAME)
