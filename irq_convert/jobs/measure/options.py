"""What measuring is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_convert.checkpoint.meta_params import VERSIONS
from irq_convert.core.codebook import in_words
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration.options import TOKENS, WINDOW


@dataclass(frozen=True)
class MeasureOptions:
    """Options of one run.

    `text`: a file, or the name of a Hub dataset. `tokens` at most, in windows of `window` tokens
    (None: 512, at most the model's context), chosen by `seed` where the text has more. `threads` is
    for torch, None for as many as it takes. `stream`: files of a Hub model are deleted when they
    were read. `llama_version` is asked for where Meta's own files do not tell it.
    `trust_remote_code` runs code that comes with the model.
    """

    text: str
    tokens: int = TOKENS
    window: int | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    stream: bool = False
    llama_version: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.text, Path):
            object.__setattr__(self, "text", str(self.text))
        if self.window is not None and self.window < 1:
            raise UsageError(f"--window {self.window}: at least 1 token")
        if self.tokens < (self.window or 1):
            raise UsageError(
                f"--tokens {self.tokens}: not one window of {self.window or 1}; give more, or a "
                "smaller --window"
            )
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1")
        if self.llama_version not in (None, *VERSIONS):
            raise UsageError(f"--llama-version {self.llama_version}: choose {in_words(VERSIONS)}")

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.window or WINDOW
