"""A model on the Hugging Face Hub: its files at one commit, and bringing them to this machine."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    HfApi,
    ResolvedRevision,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    tqdm,
)

from irq_convert.checkpoint.disk import output_folder
from irq_convert.checkpoint.files import copy_file_atomic, write_bytes_atomic, write_json_atomic
from irq_convert.checkpoint.hub_errors import hub_errors, retrying
from irq_convert.checkpoint.layout import (
    HEADERS_ONLY_NAME,
    is_hidden,
    is_left_out,
    shards_of_index,
)
from irq_convert.checkpoint.source import parse_index
from irq_convert.checkpoint.source_formats import SourceFormat, find_format
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError

_TOKENIZER = re.compile("token|vocab|spiece|tekken|[.]model$")


class NoBar(tqdm):
    """A bar that is not drawn."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **{**named, "disable": True})


@dataclass(frozen=True)
class RemoteModel:
    """A model repository at one commit: what a conversion reads of it.

    `shards` are the weight files that `open_checkpoint` would read, `others` all that is carried
    over, and the index; `left_out` is not downloaded. `files` are all files by path.
    """

    repo_id: str
    commit: ResolvedRevision
    files: Mapping[str, RepoFile]
    shards: tuple[str, ...]
    others: tuple[str, ...]
    source_format: SourceFormat
    left_out: tuple[str, ...] = ()

    @property
    def revision(self) -> str:
        """The commit hash."""
        return self.commit.resolved

    @property
    def entry(self) -> str:
        """The name of a folder for this repository, as in the Hub cache."""
        return "models--" + self.repo_id.replace("/", "--")

    def cached(self, name: str) -> Path | None:
        """Where a file lies in the Hub cache, complete; None when it does not."""
        path = try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        return Path(path) if isinstance(path, str) else None


def download(repo_id: str, revision: str | None, *, headers_only: bool) -> tuple[Path, str]:
    """Bring the model `repo_id` to this machine; return its folder and commit hash.

    When the Hub cannot be reached, a complete copy in the Hub cache is used. See `locate` for what
    is downloaded and for `headers_only`. Raises `IrqError`.
    """
    with hub_errors(repo_id, revision):
        found = find_model(repo_id, revision)
        if not isinstance(found, RemoteModel):
            return found
        if headers_only and not all(map(found.cached, found.shards)):
            return download_headers(found), found.revision
        return snapshot(found, (*found.shards, *found.others)), found.revision


def find_model(repo_id: str, revision: str | None) -> RemoteModel | tuple[Path, str]:
    """Ask the Hub, or its cache, what a repository holds; the commit is settled here, once.

    Returns the folder and commit of a copy in the cache when the Hub cannot be reached and the
    cache has no list of files: whatever brought it left that out. Then weights tell whether they
    are all there, and a tokenizer has to be. To be called in `hub_errors`; raises `IrqError`.
    """
    commit = retrying(lambda: HfApi().resolve_revision(repo_id, revision=revision), first=True)
    files = retrying(lambda: _repo_files(repo_id, commit), first=True)
    if files is None:
        folder = Path(snapshot_download(repo_id, revision=commit, local_files_only=True))
        if not any(_TOKENIZER.search(path.name) for path in folder.iterdir()):
            raise IrqError(
                f"{repo_id}: the Hub cache has neither a list of its files nor a tokenizer, so it "
                f"may not be complete: go online once, or if it has none give {folder} itself"
            )
        return folder, commit.resolved
    source_format, shards, index = _choose(repo_id, commit, files)
    seen = [path for path in files if not is_hidden(path)]
    others = [path for path in seen if not is_left_out(path, shards)]
    others += [index] if index else []
    left_out = tuple(path for path in seen if path not in (*shards, *others))
    return RemoteModel(repo_id, commit, files, shards, tuple(others), source_format, left_out)


def _repo_files(repo_id: str, commit: ResolvedRevision) -> dict[str, RepoFile] | None:
    """Return all files by path; None if the Hub is out of reach and the cache lacks the list."""
    try:
        files = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        try:
            tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit.resolved)
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
        except HfHubHTTPError:
            raise
        except Exception as error:
            if try_to_load_from_cache(repo_id, "config.json", revision=commit.resolved) is None:
                raise error
            return None
    for file in files:
        if ".." in PurePosixPath(file.path).parts or file.path.startswith("/"):
            raise IrqError(f"{repo_id}: lists a file {file.path!r} outside of itself; refused")
    return {file.path: file for file in files}


def _choose(
    repo_id: str, commit: ResolvedRevision, files: Mapping[str, RepoFile]
) -> tuple[SourceFormat, tuple[str, ...], str | None]:
    """Return the format, the weight files to download, and the index among them."""
    source_format, selection = find_format(files, repo_id)
    index = selection.index
    if index is None:
        return source_format, selection.shards, None
    path = retrying(lambda: hf_hub_download(repo_id, index, revision=commit))
    shards = shards_of_index(selection, parse_index(Path(path))[0])
    for name in shards:
        if name not in files:
            raise IrqError(
                f"{repo_id}: {index} names {name}, which the repository lacks; "
                "its upload is incomplete: take another revision or ask its owner"
            )
    return source_format, shards, index


def snapshot(model: RemoteModel, names: tuple[str, ...], *, quiet: bool = False) -> Path:
    """Bring files into the Hub cache; return the folder where the cache shows them."""
    patterns = [glob.escape(name) for name in names]
    bars: Any = {"tqdm_class": NoBar} if quiet else {}
    fetch = partial(
        snapshot_download, model.repo_id, revision=model.commit, allow_patterns=patterns, **bars
    )
    return Path(str(retrying(fetch)))


def download_headers(model: RemoteModel) -> Path:
    """Make, or find, a folder with the header of each shard, without data, and all other files."""
    root = Path(constants.HF_HOME, "irq-convert", "headers", model.entry)
    folder = root / model.revision
    if (folder / HEADERS_ONLY_NAME).is_file():
        return folder
    with os_errors("create it", root):
        root.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(root / f"{model.revision}.lock"):  # of several ranks, one makes the folder
        if (folder / HEADERS_ONLY_NAME).is_file():
            return folder
        with output_folder(folder, overwrite=True) as staging:
            _write_headers(model, staging)
    return folder


def _write_headers(model: RemoteModel, folder: Path) -> None:
    if model.others:
        cache = snapshot(model, model.others, quiet=True)
        for name in model.others:
            copy_file_atomic(cache / name, folder / name)
    sizes = {name: model.files[name].size for name in model.shards}
    for name, size in sizes.items():
        url = hf_hub_url(model.repo_id, name, revision=model.revision)
        where = Path(f"{model.repo_id}/{name}")
        head = model.source_format.fetch_header(partial(_fetch_range, url), where, size)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(folder / name, head)
    write_json_atomic(folder / HEADERS_ONLY_NAME, sizes)


def _fetch_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` of a file, even from a server that ignores ranges."""
    headers = build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def fetch() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=60) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= skip + stop - start:
                    break
        return bytes(data[skip : skip + stop - start])

    return retrying(fetch)
