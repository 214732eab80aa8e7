"""Downloading a model from the Hugging Face Hub: only what is needed, every failure one line."""

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

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
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from irq_convert.checkpoint.disk import output_folder
from irq_convert.checkpoint.files import copy_file_atomic, write_bytes_atomic, write_json_atomic
from irq_convert.checkpoint.header import header_length, parse_header
from irq_convert.checkpoint.layout import (
    HEADERS_ONLY_NAME,
    is_hidden,
    is_weight_file,
    select_weights,
    shards_of_index,
)
from irq_convert.checkpoint.source import parse_index
from irq_convert.checkpoint.system import explain_os_error
from irq_convert.errors import IrqError

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_FIRST_READ = 1 << 20  # most headers fit, so one request a shard is enough


def download(repo_id: str, revision: str | None, *, headers_only: bool) -> tuple[Path, str]:
    """Bring the model `repo_id` to this machine; return its folder and commit hash.

    When the Hub cannot be reached, a complete copy in the Hub cache is used. See `locate` for what
    is downloaded and for `headers_only`. Raises `IrqError`.
    """
    with hub_errors(repo_id, revision):
        commit = HfApi().resolve_revision(repo_id, revision=revision)
        sizes = _repo_files(repo_id, commit)
        if sizes is None:  # unreachable, and cached by a version that kept no file list
            folder = Path(snapshot_download(repo_id, revision=commit, local_files_only=True))
            return folder, commit.resolved
        shards, index = _choose(repo_id, commit, sizes)
        other = [path for path in sizes if not is_hidden(path) and not is_weight_file(path)]
        other += [index] if index else []
        if headers_only and not _all_cached(repo_id, commit, shards):
            return _download_headers(repo_id, commit, shards, other, sizes), commit.resolved
        return _snapshot(repo_id, commit, [*shards, *other]), commit.resolved


def _repo_files(repo_id: str, commit: ResolvedRevision) -> dict[str, int] | None:
    """Return path to size of all files; None if the Hub is out of reach and the cache lacks it."""
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
    return {file.path: file.size for file in files}


def _choose(
    repo_id: str, commit: ResolvedRevision, sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], str | None]:
    """Return the weight files to download, and the index among them."""
    selection = select_weights(sizes, repo_id)
    if selection.index is None:
        return selection.shards, None
    path = hf_hub_download(repo_id, selection.index, revision=commit)
    shards = shards_of_index(selection, parse_index(Path(path))[0])
    for name in shards:
        if name not in sizes:
            raise IrqError(
                f"{repo_id}: {selection.index} names {name}, which the repository lacks; "
                "its upload is incomplete: take another revision or ask its owner"
            )
    return shards, selection.index


def _all_cached(repo_id: str, commit: ResolvedRevision, names: tuple[str, ...]) -> bool:
    found = (try_to_load_from_cache(repo_id, name, revision=commit.resolved) for name in names)
    return all(isinstance(path, str) for path in found)


def _snapshot(repo_id: str, commit: ResolvedRevision, names: list[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns))


def _download_headers(
    repo_id: str,
    commit: ResolvedRevision,
    shards: tuple[str, ...],
    other: list[str],
    sizes: Mapping[str, int],
) -> Path:
    """Make, or find, a folder with each shard cut off after its header and all other files."""
    entry = "models--" + repo_id.replace("/", "--")
    folder = Path(constants.HF_HOME, "irq-convert", "headers", entry, commit.resolved)
    if (folder / HEADERS_ONLY_NAME).is_file():
        return folder
    with output_folder(folder, overwrite=True) as staging:
        if other:
            snapshot = _snapshot(repo_id, commit, other)
            for name in other:
                copy_file_atomic(snapshot / name, staging / name)
        for name in shards:
            url = hf_hub_url(repo_id, name, revision=commit.resolved)
            head = _fetch_header(url, Path(f"{repo_id}/{name}"), sizes[name])
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(staging / name, head)
        write_json_atomic(staging / HEADERS_ONLY_NAME, {name: sizes[name] for name in shards})
    return folder


def _fetch_header(url: str, path: Path, size: int) -> bytes:
    """Return the first 8 + N bytes of the safetensors file of `size` bytes at `url`, checked."""
    head = _fetch_range(url, 0, min(_FIRST_READ, size))
    stop = 8 + header_length(path, head)
    if stop > len(head):
        head += _fetch_range(url, len(head), stop)
    head = head[:stop]
    parse_header(path, head[8:], size)
    return head


def _fetch_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` of a file, even from a server that ignores ranges."""
    headers = build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
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


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Run the block; whatever the Hub client raises in it becomes a one-line `IrqError`."""
    try:
        yield
    except (IrqError, TypeError, AttributeError, NameError):  # ours: told already, or a bug
        raise
    except Exception as error:  # the client raises many kinds, RuntimeError from hf_xet among them
        raise IrqError(explain_hub_error(error, repo_id, revision)) from error


def explain_hub_error(error: Exception, repo_id: str, revision: str | None = None) -> str:
    """Return one line for an exception of huggingface_hub: what happened and the way out."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error.__cause__, HfHubHTTPError) and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # "cannot resolve the revision", because of this answer
    if isinstance(error, GatedRepoError):
        return f"{repo_id}: access is restricted; accept its terms at {page} and {_LOG_IN}"
    if isinstance(error, DisabledRepoError):
        return f"{repo_id}: disabled by the Hub; see {page}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id}: has no revision {revision!r}; see {page}/commits for what there is"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id}: neither a local folder nor a model on {constants.ENDPOINT} that you may "
            f"read; check the spelling, and for a private model {_LOG_IN}"
        )
    if isinstance(error, HfHubHTTPError):
        return f"{repo_id}: {_explain_status(error.response.status_code)}"
    if _caused_by(error, OfflineModeIsEnabled):
        return (
            f"{repo_id}: not a local folder, not complete in the Hub cache, and HF_HUB_OFFLINE "
            "forbids downloading; unset it, or give a local folder"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(
            error, f"download {repo_id}", Path(error.filename or constants.HF_HUB_CACHE)
        )
    detail = " ".join(str(error.__cause__ or error).split())[:200]
    return (
        f"{repo_id}: not a local folder, not complete in the Hub cache, and downloading from "
        f"{constants.ENDPOINT} failed ({detail or type(error).__name__}); check the connection and "
        "try again, or give a local folder"
    )


def _explain_status(status: int) -> str:
    if status in (401, 403):
        return (
            f"the Hub refused access (HTTP {status}): no such model, or not for your token; "
            f"check the spelling, and {_LOG_IN} with a valid token that may read it"
        )
    if status == 429:
        return f"the Hub is limiting requests (HTTP 429); wait a few minutes, or {_LOG_IN}"
    return f"the Hub answered with an error (HTTP {status}); try again later"


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False
