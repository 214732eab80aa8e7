"""What was generated, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Ended(StrEnum):
    """Why a text goes no further."""

    END = "end"
    """The model gave a token that ends a text."""
    LENGTH = "length"
    """As many tokens as were asked for."""
    POSITIONS = "positions"
    """As many tokens as the model can take."""
    STOPPED = "stopped"
    """By a person."""


@dataclass(frozen=True)
class Generated:
    """The text of one model.

    Attributes:
        model: its folder or Hub id.
        text: what follows the prompt, without it.
        prompt_tokens, tokens: tokens of the prompt, and new ones, an end token among them.
        ended: why there are no more.
        seconds: from the start to the last token, of computing alone.
        first_seconds: of these, until the first token: the time of the prompt. None without one.
    """

    model: str
    text: str
    prompt_tokens: int
    tokens: int
    ended: Ended
    seconds: float
    first_seconds: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which alone are made one by one; None without any."""
        if self.first_seconds is None or self.tokens < 2 or self.seconds <= self.first_seconds:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the speed, for JSON."""
        return {
            "model": self.model,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "ended": self.ended.value,
            "seconds": self.seconds,
            "first_seconds": self.first_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class GenerateReport:
    """What a model made of a prompt and, where one is given, another model of the same."""

    prompt: str
    generated: Generated
    reference: Generated | None = None

    @property
    def same_characters(self) -> int | None:
        """How many characters both texts begin with alike; None without a second."""
        if self.reference is None:
            return None
        return same_start(self.generated.text, self.reference.text)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the second text only where there is one."""
        found: dict[str, Any] = {"prompt": self.prompt, **self.generated.to_dict()}
        if self.reference is not None:
            found["reference"] = self.reference.to_dict()
            found["same_characters"] = self.same_characters
        return found


def same_start(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
