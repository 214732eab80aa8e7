"""`push`: a finished folder and its model card to the Hub, in one commit, checked afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download

from irq_convert.artifact.manifest import CARD_NAME
from irq_convert.checkpoint import hub_errors
from irq_convert.checkpoint.files import git_sha1, sha256_file
from irq_convert.checkpoint.layout import SCORES_NAME
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.push.card import is_ours, make_card
from irq_convert.jobs.push.local_paths import last_part
from irq_convert.jobs.push.pushed_folder import (
    RECORDS,
    FolderKind,
    PushedFolder,
    open_pushed_folder,
)
from irq_convert.jobs.push.remote import (
    Remote,
    check_repo_id,
    commit,
    create,
    push_errors,
    read_remote,
    who_pushes,
)
from irq_convert.jobs.push.verify import verify_pushed_folder
from irq_convert.progress import Progress

_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class PushOptions:
    """Options of one push.

    `revision` is the branch, made where it is missing. `private` is for a repository that is made.
    `overwrite` replaces the weights of a repository that holds something else. `base_model` names
    the base on the Hub where the folder's record does not.
    """

    revision: str = constants.DEFAULT_REVISION
    private: bool = False
    message: str | None = None
    verify: bool = True
    overwrite: bool = False
    base_model: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class PushReport:
    """What a push did, or with `dry_run` would do.

    `commit` is None when nothing had to be sent. `uploaded` are the files that the repository did
    not hold in this form, with `bytes` together; `card` is the text of README.md.
    """

    repo_id: str
    url: str
    revision: str
    kind: str
    base_model: str | None
    relation: str
    commit: str | None
    created: bool
    dry_run: bool
    uploaded: tuple[str, ...]
    bytes: int
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    card: str
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def check_push(repo_id: str, kind: FolderKind, options: PushOptions) -> None:
    """Refuse a push that cannot succeed, before hours are spent on what would be pushed.

    Raises `UsageError` for an id that is none and a repository that holds another kind of folder,
    and `IrqError` without a token that may write.
    """
    check_repo_id(repo_id)
    if options.base_model is not None:
        check_repo_id(options.base_model)
    remote = read_remote(who_pushes(repo_id), options.revision)
    _check_private(remote, options)
    later = f"push it afterwards with `irq-convert push OUT {remote.repo_id} --overwrite`"
    _check_foreign(remote, kind, _ours(remote), options, later)


def push(
    folder: Path | str,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> PushReport:
    """Bring what a command has written to the repository `repo_id` on the Hub.

    `options`, or single `settings` of `PushOptions` (`private=True`).

    The folder is verified, the card written or renewed (`make_card`), and everything that the
    repository does not hold yet goes up in one commit: it shows the old state or the new one, never
    a part. Weight files of an earlier push that the folder has no more are deleted in the same
    commit. Pushing the same folder again sends nothing. Raises `UsageError` for a request that
    cannot be served, `IrqError` for a folder that is damaged and for all that the Hub refuses.
    """
    begun = time.perf_counter()
    options, progress = chosen(PushOptions, options, settings), progress or Progress()
    check_repo_id(repo_id)
    if options.base_model is not None:
        check_repo_id(options.base_model)
    subject = open_pushed_folder(Path(folder))
    _note_path(subject, progress)
    if not options.dry_run or "/" not in repo_id:
        repo_id = who_pushes(repo_id)
    if options.verify:
        verify_pushed_folder(subject, progress)
    progress.stage("comparing with the Hub")
    unseen = options.dry_run and constants.HF_HUB_OFFLINE
    remote = Remote(repo_id, options.revision) if unseen else read_remote(repo_id, options.revision)
    _check_private(remote, options)
    sums = _checksums(subject, options.verify)
    push = _plan(subject, remote, sums, options)
    if options.dry_run or not (push.uploaded or push.deleted):
        return replace(push, seconds=time.perf_counter() - begun)
    progress.stage("uploading")
    create(remote, options.private)
    if remote.head is None:
        remote = read_remote(repo_id, options.revision)
    made = _commit(subject, remote, push, options)
    _check_arrived(subject, read_remote(repo_id, options.revision), sums, push)
    return replace(push, commit=made, seconds=time.perf_counter() - begun)


def _note_path(subject: PushedFolder, progress: Progress) -> None:
    """Say which paths of this machine, written down by PEFT, do not go up as they are."""
    for path in subject.paths:
        progress.note(
            f"the adapter names its base by a path of this machine, {path}: it is pushed as "
            f"{last_part(path)}, the folder stays as it is"
        )


def _checksums(subject: PushedFolder, verified: bool) -> dict[str, str]:
    """SHA-256 of every file; where the manifest was just verified, the ones that it lists."""
    listed = subject.note.get("files") if verified else None
    known = {n: e["sha256"] for n, e in listed.items()} if isinstance(listed, dict) else {}
    return {n: known.get(n) or _sha256(subject.content(n)) for n in subject.files}


def _sha256(content: Path | bytes) -> str:
    return sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


def _check_private(remote: Remote, options: PushOptions) -> None:
    if options.private and remote.exists and remote.private is False:
        raise UsageError(
            f"{remote.repo_id}: exists and is public; --private is for a repository that is made: "
            "choose another name, or change its visibility in its settings"
        )


def _ours(remote: Remote) -> list[str]:
    """The files of a repository that a push may replace or delete."""
    written = {SCORES_NAME, *(record for records in RECORDS.values() for record in records)}
    return [name for name in remote.files if _WEIGHTS.fullmatch(name) or name in written]


def _check_foreign(
    remote: Remote, kind: FolderKind, lost: list[str], options: PushOptions, replace: str
) -> None:
    """Refuse that files are `lost` that no folder of this `kind` left; `replace` is the way to."""
    alike = any(record in remote.files for record in RECORDS[kind])
    if lost and not alike and not options.overwrite:
        raise UsageError(
            f"{remote.repo_id}: holds something else than such a folder ({lost[0]}); choose "
            f"another repository, or {replace}"
        )


def _plan(
    subject: PushedFolder, remote: Remote, sums: Mapping[str, str], options: PushOptions
) -> PushReport:
    """What has to change in the repository."""
    changed = [n for n in sums if not remote.same(n, subject.content(n), sums[n])]
    stale = [name for name in _ours(remote) if name not in subject.files]
    lost = [*stale, *(n for n in changed if n in remote.files and _WEIGHTS.fullmatch(n))]
    _check_foreign(remote, subject.kind, lost, options, "`push --overwrite` to replace it")
    base_model = options.base_model or subject.base_model
    card = make_card(
        subject,
        remote.repo_id,
        sums,
        base_model=base_model,
        source_card=_source_card(subject, base_model),
        existing=remote.card or (subject.local_card if _is_own_text(subject) else None),
        revision=None if remote.branch == constants.DEFAULT_REVISION else remote.branch,
    )
    size = sum(subject.sizes[name] for name in changed)
    there = remote.files.get(CARD_NAME)
    data = card.encode()
    if there is None or there.blob_id != git_sha1(data):
        changed.append(CARD_NAME)
        size += len(data)
    return PushReport(
        repo_id=remote.repo_id,
        url=remote.url,
        revision=remote.branch,
        kind=subject.kind.value,
        base_model=base_model,
        relation=subject.relation,
        commit=None,
        created=not remote.exists,
        dry_run=options.dry_run,
        uploaded=tuple(sorted(changed)),
        bytes=size,
        unchanged=tuple(sorted({*sums, CARD_NAME} - {*changed})),
        deleted=tuple(stale),
        card=card,
        seconds=0.0,
    )


def _is_own_text(subject: PushedFolder) -> bool:
    """Whether the folder's README.md is about the folder, not a copy of the source's card."""
    return is_ours(subject.local_card) or subject.kind == FolderKind.ADAPTER


def _source_card(subject: PushedFolder, base_model: str | None) -> str | None:
    """The card of the base model: the copy in the folder, else from the Hub where it can be had."""
    if subject.local_card is not None and not _is_own_text(subject):
        return subject.local_card
    if base_model is None:
        return None
    revision = subject.source.get("revision") if base_model == subject.source.get("model") else None
    try:
        path = hf_hub_download(base_model, CARD_NAME, revision=revision)
    except Exception:  # gated, private, gone: the licence can be written into the card by hand
        return None
    return Path(path).read_bytes().decode("utf-8", "replace")


def _commit(subject: PushedFolder, remote: Remote, push: PushReport, options: PushOptions) -> str:
    """Commit, and try again where that may help; an answer that got lost is found out about."""
    files: dict[str, Path | bytes] = {
        name: push.card.encode() if name == CARD_NAME else subject.content(name)
        for name in push.uploaded
    }
    deleted = [name for name in push.deleted if name in remote.files]
    message = options.message or f"Upload {subject.kind.value} with irq-convert"

    def attempt() -> str:
        try:
            return commit(remote, files, deleted, message)
        except Exception as error:
            if not hub_errors.is_transient(error):
                raise
            now = read_remote(remote.repo_id, remote.branch)
            card = now.files.get(CARD_NAME)
            if now.head == remote.head or card is None:
                raise
            return now.head or ""  # `_check_arrived` tells whether it is ours

    with push_errors(remote.repo_id):
        return hub_errors.retrying(attempt)


def _check_arrived(
    subject: PushedFolder, remote: Remote, sums: Mapping[str, str], push: PushReport
) -> None:
    """Compare what the Hub lists with the folder. Raises `IrqError` naming what is missing."""
    wrong = [n for n in sums if not remote.same(n, subject.content(n), sums[n])]
    card = remote.files.get(CARD_NAME)
    if card is None or card.blob_id != git_sha1(push.card.encode()):
        wrong.append(CARD_NAME)
    wrong += [name for name in push.deleted if name in remote.files]
    if wrong:
        raise IrqError(
            f"{remote.repo_id}: after the push {wrong[0]} is not what was sent: another push may "
            "have come in between; push again"
        )
