"""What the Hub and its client answer when they cannot serve: one line each, and what to try again.

huggingface_hub itself resumes a download after a drop, and waits and tries again after HTTP 429
(as long as Retry-After says) and some of the 5xx answers. `retrying` adds what it gives up on:
a file that comes short, a reset connection, an answer of 5xx in the middle of a conversion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from irq_convert.checkpoint.system import explain_os_error
from irq_convert.errors import IrqError

T = TypeVar("T")

PAUSES = (2.0, 8.0, 30.0)
"""Seconds before each further attempt."""
FIRST_PAUSES = (1.0, 4.0)
"""The same for the first questions, where someone waits and nothing is lost yet."""
LONGEST_PAUSE = 300.0
"""More than this is not waited for, whatever a Retry-After asks."""

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_BUSY = (408, 425, 429, 500, 502, 503, 504)


def retrying(
    call: Callable[[], T],
    *,
    first: bool = False,
    wait: Callable[[float], object] | None = None,
) -> T:
    """Return `call()`, called again after a pause while it fails for a reason that may pass.

    With `first` a Hub that cannot be reached is not tried again: its address may be wrong.
    `wait` sleeps (`time.sleep`), and may raise to give up. The last error is raised.
    """
    for pause in FIRST_PAUSES if first else PAUSES:
        try:
            return call()
        except Exception as error:
            if not is_transient(error, answers_only=first):
                raise
            asked = _retry_after(error)
            if asked > LONGEST_PAUSE:
                raise
            (wait or time.sleep)(max(pause, asked))
    return call()


def is_transient(error: BaseException, answers_only: bool = False) -> bool:
    """Whether the same call may succeed a little later."""
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in _BUSY
        if isinstance(cause, HTTPError | XetDownloadError):  # no answer, or not a whole one
            return not answers_only
    # "Consistency check failed" is a plain OSError; hf_xet raises RuntimeError for its transfers.
    short = isinstance(error, OSError) and error.errno is None and "onsistency" in str(error)
    return not answers_only and (short or type(error) is RuntimeError)


def _retry_after(error: BaseException) -> float:
    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            value = cause.response.headers.get("Retry-After", "")
            return float(value) if value.isdigit() else 0.0
    return 0.0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


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
        return f"{repo_id}: {explain_status(error.response.status_code)}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _chain(error)):
        return (
            f"{repo_id}: not a local folder, not complete in the Hub cache, and HF_HUB_OFFLINE "
            "forbids downloading; unset it, or give a local folder"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(
            error, f"download {repo_id}", Path(error.filename or constants.HF_HUB_CACHE)
        )
    return (
        f"{repo_id}: not a local folder, not complete in the Hub cache, and downloading from "
        f"{constants.ENDPOINT} failed ({error_detail(error)}); check the connection and "
        "try again, or give a local folder"
    )


def error_detail(error: Exception) -> str:
    """What an exception says, on one line of at most 200 characters."""
    detail = " ".join(str(error.__cause__ or error).split())[:200]
    return detail or type(error).__name__


def explain_status(status: int) -> str:
    """What an HTTP status means for the one who reads, and the way out."""
    if status in (401, 403):
        return (
            f"the Hub refused access (HTTP {status}): no such model, or not for your token; "
            f"check the spelling, and {_LOG_IN} with a valid token that may read it"
        )
    if status == 429:
        return f"the Hub is limiting requests (HTTP 429); wait a few minutes, or {_LOG_IN}"
    return f"the Hub answered with an error (HTTP {status}); try again later"
