"""Finding models: local folders, and the Hub as played by an HTTP server on loopback."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from irq_convert.checkpoint.locate import Located, locate
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import UsageError
from tests.folders import assert_one_line
from tests.fresh import Forks

from .helpers import make_checkpoint, snapshot
from .hub_server import COMMIT, ERRORS, FakeHub, serve

LOCATE = """
import json, sys
from irq_convert.checkpoint import hub_errors
from irq_convert.checkpoint.locate import locate
from irq_convert.errors import IrqError
hub_errors.FIRST_PAUSES = (0.01, 0.01)
for request in json.loads(sys.argv[1]):
    try:
        found = locate(request[0], request[1], headers_only=len(request) > 2)
        print(json.dumps([str(found.folder), found.repo_id, found.revision]))
    except IrqError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Client:
    """Runs `locate` in a process of its own with its own Hub cache."""

    def __init__(self, python: Forks, home: Path) -> None:
        self.python, self.home = python, home

    def __call__(self, *requests: list[object], hub: str, **env: str) -> list[list[str]]:
        result = self.python(
            LOCATE,
            json.dumps(requests),
            **{
                "HF_ENDPOINT": hub,
                "HF_HOME": str(self.home),
                "HF_HUB_CACHE": str(self.home / "hub"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
                **env,
            },
        )
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def client(python: Forks, tmp_path: Path) -> Client:
    return Client(python, tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded model with second copies of its weights and files that are not wanted."""
    folder = make_checkpoint(tmp_path / "repo", 2, {"README.md": "# hi", "LICENSE": "MIT"})
    for name in ("consolidated.safetensors", "pytorch_model.bin", "sub/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"unwanted")
    (folder / "sub" / "a [1].txt").write_text("odd name")
    (folder / ".gitattributes").write_text("x")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[FakeHub]:
    with serve(model) as server:
        yield server


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "org" / "model")
    assert locate(str(folder)) == Located(folder)
    monkeypatch.chdir(tmp_path)
    assert locate("org/model") == Located(Path("org/model"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/org/model") == Located(folder)
    with pytest.raises(UsageError, match="no revisions"):
        locate("org/model", "main")


def test_folder_in_a_hub_cache_knows_its_origin(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--my-model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert locate(str(folder)) == Located(folder, "org/my-model", COMMIT)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("./absent", "no such folder"),
        ("../absent", "no such folder"),
        ("/absent", "no such folder"),
        ("~/absent", "no such folder"),
        ("~no-such-user-here/m", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/model/", "no such folder"),
        ("", "no model given"),
        ("https://huggingface.co/org/model", "organization/name"),
        ("a b", "not a Hub id"),
        ("a--b/c", "not a Hub id"),
        ("model.git", "not a Hub id"),
        ("-x", "not a Hub id"),
        ("model.safetensors", "a file"),
    ],
)
def test_names_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError) as caught:
        locate(name)
    assert_one_line(str(caught.value), name, word)


@pytest.mark.slow
def test_download(client: Client, hub: FakeHub, model: Path) -> None:
    (found,) = client(["org/model", None], hub=hub.url)
    folder = Path(found[0])
    assert found[1:] == ["org/model", COMMIT]
    opened = open_checkpoint(folder)
    wanted = set(snapshot(model)) - {
        "consolidated.safetensors",
        "pytorch_model.bin",
        "sub/model.safetensors",
        ".gitattributes",
    }
    assert snapshot(folder) == {name: snapshot(model)[name] for name in wanted}
    assert opened.other_files == ("LICENSE", "README.md", "config.json", "sub/a [1].txt")
    assert len(opened.tensors) == 6
    assert locate(str(folder)) == Located(folder, "org/model", COMMIT)


def test_cached_model_needs_no_hub(client: Client, hub: FakeHub) -> None:
    (online,) = client(["org/model", "main"], hub=hub.url)
    requests = len(hub.requests)
    (again,) = client(["org/model", COMMIT], hub=hub.url)
    assert len(hub.requests) == requests
    (down,) = client(["org/model", "main"], hub=closed_port())
    (offline,) = client(["org/model", "main"], hub=hub.url, HF_HUB_OFFLINE="1")
    assert online == again == down == offline


def test_incomplete_cache_is_refused_offline(client: Client, hub: FakeHub) -> None:
    (online,) = client(["org/model", None], hub=hub.url)
    next(Path(online[0]).glob("*-00002-of-*")).unlink()
    (offline,) = client(["org/model", None], hub=hub.url, HF_HUB_OFFLINE="1")
    assert offline[0] == "IrqError"
    assert_one_line(offline[1], "org/model", "not complete in the Hub cache", "HF_HUB_OFFLINE")


def test_a_cache_that_may_lack_the_tokenizer_is_refused_offline(
    client: Client, hub: FakeHub
) -> None:
    """As from a program that brought the weights alone, and no list of files."""
    (online,) = client(["org/model", None], hub=hub.url)
    for path in client.home.rglob("trees/*.json"):
        path.unlink()
    (offline,) = client(["org/model", None], hub=hub.url, HF_HUB_OFFLINE="1")
    assert offline[0] == "IrqError"
    assert_one_line(offline[1], "org/model", "neither a list of its files nor a tokenizer")
    (Path(online[0]) / "tokenizer.json").write_text("{}")
    (again,) = client(["org/model", None], hub=hub.url, HF_HUB_OFFLINE="1")
    assert again == online


def test_headers_only(client: Client, hub: FakeHub, model: Path) -> None:
    big = np.zeros((256, 1024, 16), dtype=np.float32)
    save_file({"layer.1.a": big}, model / "model-00001-of-00002.safetensors")
    index = model / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"] = {k: v for k, v in names["weight_map"].items() if "1.b" not in k}
    names["weight_map"].pop("layer.1.c")
    index.write_text(json.dumps(names))
    (found,) = client(["org/model", None, "headers"], hub=hub.url)
    opened = open_checkpoint(Path(found[0]))
    assert opened.headers_only
    assert opened.tensors["layer.1.a"].shape == big.shape
    assert opened.nbytes == big.nbytes + 65
    assert opened.other_files == ("LICENSE", "README.md", "config.json", "sub/a [1].txt")
    assert sum(size for name, size in hub.sent.items() if "model-0" in name) < big.nbytes // 4
    check = client.python(
        "import sys, pathlib\n"
        "from irq_convert.checkpoint import source, reader\n"
        "info = source.open_checkpoint(pathlib.Path(sys.argv[1])).tensors['layer.1.a']\n"
        "from irq_convert.errors import IrqError\n"
        "try: reader.TileReader().read_tensor(info)\n"
        "except IrqError as error: print(error)\n",
        found[0],
    )
    assert_one_line(check.stdout.strip(), "layer.1.a", "missing")
    (again,) = client(["org/model", None, "headers"], hub=hub.url, HF_HUB_OFFLINE="1")
    assert again == found
    (whole,) = client(["org/model", None], hub=hub.url)
    (reused,) = client(["org/model", None, "headers"], hub=hub.url)
    assert reused == whole != found


def test_headers_only_from_a_server_without_ranges(client: Client, model: Path) -> None:
    """A header over the first megabyte asked for, from a server that always sends everything."""
    many = {f"{k:0100d}": np.zeros(1, dtype=np.uint8) for k in range(8000)}
    save_file(many, model / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(many, "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for ranges in (True, False):
        with serve(model, ranges) as hub:
            home = Client(client.python, client.home / str(ranges))
            (found,) = home(["org/model", None, "headers"], hub=hub.url)
        assert len(open_checkpoint(Path(found[0])).tensors) == 8000


def test_hub_errors_are_one_line(client: Client, hub: FakeHub) -> None:
    words = {
        "org/missing": ["check the spelling", "hf auth login"],
        "org/private": ["check the spelling", "HF_TOKEN"],
        "org/gated": ["accept its terms", f"{hub.url}/org/gated", "hf auth login"],
        "org/gated401": ["accept its terms", "HF_TOKEN"],
        "org/disabled": ["disabled"],
        "org/badtoken": ["HTTP 401", "token"],
        "org/forbidden": ["HTTP 403", "token"],
        "org/limited": ["HTTP 429", "wait"],
        "org/down": ["HTTP 500", "later"],
    }
    assert set(words) == set(ERRORS)
    requests: list[list[object]] = [[name, None] for name in words]
    answers = client(*requests, ["org/model", "no-such-branch"], hub=hub.url)
    for (name, expected), (kind, message) in zip(words.items(), answers[:-1], strict=True):
        assert kind == "IrqError"
        assert_one_line(message, name, *expected)
    assert answers[-1][0] == "IrqError"
    assert_one_line(answers[-1][1], "org/model", "no revision 'no-such-branch'")


def test_unreachable_hub_is_one_line(client: Client) -> None:
    url = closed_port()
    ((kind, message),) = client(["org/model", None], hub=url)
    assert kind == "IrqError"
    assert_one_line(message, "org/model", url, "check the connection")
    ((kind, message),) = client(["org/model", None], hub=url, HF_HUB_OFFLINE="1")
    assert kind == "IrqError"
    assert_one_line(message, "org/model", "HF_HUB_OFFLINE")


def test_repositories_that_cannot_be_used(client: Client, model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    with serve(model) as hub:
        ((kind, message),) = client(["org/model", None], hub=hub.url)
        assert kind == "IrqError"
        assert_one_line(message, "org/model", "model-00002-of-00002.safetensors", "lacks")
        assert not hub.sent.get("model-00001-of-00002.safetensors")
    for path in [*model.rglob("*.safetensors*"), *model.rglob("*.bin")]:
        path.unlink()
    (model / "tf_model.h5").write_bytes(b"x")
    with serve(model) as hub:
        ((kind, message),) = Client(client.python, client.home / "2")(
            ["org/model", None], hub=hub.url
        )
        assert kind == "IrqError"
        assert_one_line(message, "org/model", "no *.safetensors files")


def test_cache_that_cannot_be_written_is_one_line(
    client: Client, tmp_path: Path, hub: FakeHub
) -> None:
    (tmp_path / "home").touch()
    ((kind, message),) = client(["org/model", None], hub=hub.url)
    assert kind == "IrqError"
    assert_one_line(message, str(tmp_path / "home"), "not a folder")
