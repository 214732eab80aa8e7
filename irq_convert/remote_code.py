"""Whether code that comes with a model may run: asked for once, never on the terminal.

transformers asks whoever sits at the terminal when nothing was said. So everything here that reads
a configuration, a tokenizer or a model says `trust_remote_code`, and a job says it for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRUSTED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def trusted() -> bool:
    """What to give transformers as `trust_remote_code`."""
    return _TRUSTED.get()


@contextmanager
def remote_code(trust: bool) -> Iterator[None]:
    """Within the block, run the code of models where `trust`, else refuse models that need it."""
    before = _TRUSTED.set(trust)
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def why_refused(error: Exception) -> str | None:
    """What to say of transformers' refusal to run code; None where `error` is another."""
    if trusted() or "trust_remote_code" not in str(error):
        return None
    return (
        "it comes with code of its own, which is not run unless it is trusted: read it, then add "
        "--trust-remote-code (trust_remote_code=True)"
    )
