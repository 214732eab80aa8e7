"""A repository on the Hub that is pushed to: what it holds, and one commit that changes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from irq_convert.artifact.manifest import CARD_NAME
from irq_convert.checkpoint.files import git_sha1
from irq_convert.checkpoint.hub_errors import error_detail, retrying
from irq_convert.checkpoint.system import explain_os_error
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.push.pushed_folder import content_bytes

_TOKEN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Remote:
    """A branch of a repository, `files` by path, at commit `head`.

    `head` is None where the branch does not exist, `exists` tells whether the repository does.
    `card` is the text of its README.md.
    """

    repo_id: str
    branch: str
    exists: bool = False
    private: bool | None = None
    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    card: str | None = None

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"

    def same(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Whether the repository holds this very file."""
        there = self.files.get(name)
        if there is None or there.size != content_bytes(content):
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == sha256
        return there.blob_id == git_sha1(content)


def check_repo_id(repo_id: str) -> None:
    """Raise `UsageError` unless `repo_id` can name a model repository."""
    kind = repo_id.partition("/")[0]
    if kind in ("datasets", "spaces", "models") or "://" in repo_id:
        raise UsageError(
            f"{repo_id}: give the id alone, ORG/NAME; only model repositories are pushed to"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id}: not a Hub id: ORG/NAME, of letters, digits, '-', '_' and '.'"
        ) from error


def who_pushes(repo_id: str) -> str:
    """The full id, ORG/NAME, after a look at the token: `NAME` alone is the user's own.

    Raises `IrqError` when there is no token, it is not valid, or it may only read.
    """
    if constants.HF_HUB_OFFLINE:
        raise IrqError(f"{repo_id}: HF_HUB_OFFLINE forbids pushing; unset it")
    if get_token() is None:
        raise IrqError(f"{repo_id}: no token to push with; {_TOKEN}")
    with push_errors(repo_id):
        user = retrying(HfApi().whoami, first=True)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise IrqError(f"{repo_id}: the token of {user.get('name')} may only read; {_TOKEN}")
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def read_remote(repo_id: str, branch: str) -> Remote:
    """Ask the Hub what a branch holds; a repository or branch that is missing is no error."""
    api = HfApi()
    with push_errors(repo_id):
        try:
            info = retrying(lambda: api.model_info(repo_id), first=True)
        except RepositoryNotFoundError:
            return Remote(repo_id, branch)
        try:
            head = retrying(lambda: api.model_info(repo_id, revision=branch), first=True).sha
        except RevisionNotFoundError:
            return Remote(repo_id, branch, exists=True, private=info.private)
        tree = retrying(
            lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head)), first=True
        )
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        card = None
        if CARD_NAME in files:
            path = retrying(lambda: hf_hub_download(repo_id, CARD_NAME, revision=head), first=True)
            card = Path(path).read_bytes().decode("utf-8", "replace")
    return Remote(repo_id, branch, True, info.private, head, files, card)


def create(remote: Remote, private: bool) -> None:
    """Make the repository and the branch where they do not exist."""
    api = HfApi()
    with push_errors(remote.repo_id):
        if not remote.exists:
            visible = private or None
            retrying(lambda: api.create_repo(remote.repo_id, private=visible, exist_ok=True))
        if remote.branch != constants.DEFAULT_REVISION and remote.head is None:
            retrying(lambda: api.create_branch(remote.repo_id, branch=remote.branch, exist_ok=True))


def commit(
    remote: Remote,
    files: Mapping[str, Path | bytes],
    deleted: list[str],
    message: str,
) -> str:
    """Upload `files` and make one commit on the branch; returns its hash.

    Large files go up first; those that an interrupted attempt has brought there are not sent again.
    The commit is refused when the branch has moved from `remote.head` meanwhile.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, data) for name, data in files.items()),
        *(CommitOperationDelete(name) for name in deleted),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the Hub would like to see in a card
        made = HfApi().create_commit(
            remote.repo_id,
            operations,
            commit_message=message,
            revision=remote.branch,
            parent_commit=remote.head,
        )
    return made.oid


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Run the block; whatever the Hub client raises in it becomes a one-line `IrqError`."""
    try:
        yield
    except (IrqError, TypeError, AttributeError, NameError):
        raise
    except Exception as error:
        raise IrqError(f"{repo_id}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, HfHubHTTPError):
        if isinstance(answer, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids pushing; unset it"
        answer = answer.__cause__
    if answer is None:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            return explain_os_error(error, "read it", Path(error.filename))
        return (
            f"pushing to {constants.ENDPOINT} failed ({error_detail(error)}); check the connection "
            "and push again: what has arrived is not sent twice"
        )
    status = answer.response.status_code
    said = (answer.server_message or "").split("\n")[0][:160]
    if status == 401:
        return f"the Hub does not accept the token (HTTP 401); {_TOKEN}"
    if isinstance(answer, RepositoryNotFoundError) or status in (403, 404):
        return f"the token may not write there (HTTP {status}{_said(said)}); {_TOKEN} to it"
    if status in (409, 412):
        return f"the repository changed during the push (HTTP {status}); push again"
    if isinstance(answer, BadRequestError) or (status < 500 and status != 429):
        return f"the Hub refused the push (HTTP {status}{_said(said)})"
    return (
        f"the Hub answered with an error (HTTP {status}); push again later: what has arrived is "
        "not sent twice"
    )


def _said(text: str) -> str:
    return f": {text}" if text else ""
