"""Where a model is: an existing local folder, or a Hugging Face Hub id that is downloaded."""

from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from irq_convert.checkpoint import hub
from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.hub_errors import hub_errors
from irq_convert.checkpoint.hub_fetcher import CacheFetcher, HubFetcher
from irq_convert.checkpoint.hub_stream import StreamFetcher
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.checkpoint.system import expand_home, os_errors
from irq_convert.errors import UsageError


@dataclass(frozen=True)
class Located:
    """A local folder that holds a model and, when it came from the Hub, its id and commit hash."""

    folder: Path
    repo_id: str | None = None
    revision: str | None = None


def locate(model: str, revision: str | None = None, *, headers_only: bool = False) -> Located:
    """Find the model called `model`: a folder if one exists there, else a Hub id.

    A Hub model is downloaded into the Hub cache, or taken from it, at `revision` (branch, tag or
    commit; by default the main branch): the weight files that `open_checkpoint` would read, of any
    format, and every file that holds no weights. With `headers_only` the data of the weights is not
    downloaded: the folder then holds each shard cut off after its header, enough for
    `open_checkpoint`, while reading a tensor from it is an `IrqError`.
    A local folder inside a Hub cache reports the id and commit it belongs to.

    Raises `UsageError` for a file, a path that does not exist, a name that cannot be a Hub id, or a
    `revision` for a local folder; `IrqError` when the Hub or its cache does not provide the model.
    """
    folder = find_folder(model, revision)
    if folder is not None:
        return Located(folder, *_cached_origin(folder))
    path, commit = hub.download(model, revision, headers_only=headers_only)
    return Located(path, model, commit)


class Fetch(Enum):
    """How much of a Hub model `open_source` brings to this machine, and when."""

    ALL = auto()
    """Everything, before it returns."""
    HEADERS = auto()
    """Only headers: tensors cannot be read."""
    AS_READ = auto()
    """Weight files as they are read (`Checkpoint.read_order`), into the Hub cache."""
    STREAM = auto()
    """As they are read, and each is deleted afterwards; those in the cache are not."""


def open_source(
    model: str,
    revision: str | None = None,
    fetch: Fetch = Fetch.ALL,
    hints: SourceHints | None = None,
) -> Checkpoint:
    """The checkpoint that `model`, a local folder or a Hub id, names.

    `hints` tell what the files of some formats do not. With `AS_READ` and `STREAM` its `fetcher`
    has to be closed. Raises as `locate` and `open_checkpoint`.
    """
    if fetch in (Fetch.ALL, Fetch.HEADERS) or find_folder(model, revision) is not None:
        found = locate(model, revision, headers_only=fetch is Fetch.HEADERS)
        return open_checkpoint(found.folder, found.repo_id, found.revision, hints)
    with hub_errors(model, revision):
        remote = hub.find_model(model, revision)
        if not isinstance(remote, hub.RemoteModel):
            return open_checkpoint(remote[0], model, remote[1], hints)
        if all(map(remote.cached, remote.shards)):
            folder = hub.snapshot(remote, (*remote.shards, *remote.others))
            opened = open_checkpoint(folder, model, remote.revision, hints)
            return replace(opened, left_out=remote.left_out)
        heads = hub.download_headers(remote)
        opened = open_checkpoint(heads, model, remote.revision, hints)
        opened = replace(opened, left_out=remote.left_out)
        if fetch is Fetch.STREAM:
            return _moved(opened, StreamFetcher(remote, heads))
        cache = hub.snapshot(remote, remote.others, quiet=True)
        return _moved(opened, CacheFetcher(remote, cache, heads))


def _moved(opened: Checkpoint, fetcher: HubFetcher) -> Checkpoint:
    """The same checkpoint where `fetcher` will put its files."""

    def place(path: Path) -> Path:
        return fetcher.folder / path.relative_to(opened.folder)

    return replace(
        opened,
        folder=fetcher.folder,
        shards=tuple(map(place, opened.shards)),
        tensors={name: info.moved(place) for name, info in opened.tensors.items()},
        shard_metadata={place(path): text for path, text in opened.shard_metadata.items()},
        headers_only=False,
        fetcher=fetcher,
    )


def find_folder(model: str, revision: str | None = None) -> Path | None:
    """The local folder that `model` names; None when it can only be a Hub id.

    Raises `UsageError` as `locate`.
    """
    if not model:
        raise UsageError("no model given; give a folder or a Hub id")
    path = expand_home(model)
    with os_errors("look at it", path):
        exists, is_folder = path.exists(), path.is_dir()
    if exists:
        if not is_folder:
            raise UsageError(f"{model}: a file, not a folder; give the folder that holds it")
        if revision is not None:
            raise UsageError(f"{model}: a local folder has no revisions; leave out the revision")
        return path
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        hint = "; for a Hub model give its id, name or organization/name" if "://" in model else ""
        raise UsageError(f"{model}: no such folder{hint}")
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise UsageError(
            f"{model}: no such folder, and not a Hub id (name or organization/name of letters, "
            "digits, '-', '_' and '.')"
        ) from error
    return None


def _cached_origin(folder: Path) -> tuple[str | None, str | None]:
    """Read id and commit off a Hub cache path, `.../models--org--name/snapshots/<commit>`."""
    real = folder.resolve()
    kind, _, name = real.parent.parent.name.partition("--")
    if real.parent.name != "snapshots" or kind != "models" or not name:
        return None, None
    return name.replace("--", "/"), real.name
