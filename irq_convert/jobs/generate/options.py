"""How text is generated: how tokens are chosen, how many, in which type and on which device.

Nothing heavy is imported here, so that the command line can name the choices without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import fix_choices


class GenerateDtype(StrEnum):
    """Floating-point type that models are run in; `auto` is what each says itself."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def check_text(name: str, text: str) -> None:
    """Raise `UsageError` for a text, of that `name`, that was made of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name}: not UTF-8, as tokenizers need it; convert it first") from None


@dataclass(frozen=True)
class GenerateOptions:
    """Options of generating.

    Greedy unless `temperature` or `top_p` is given: what two models make of one prompt compares
    only so. Of a model's own generation settings the tokens that end a text count, and nothing
    else: temperature, penalties and the like would hide what became of the weights.

    Attributes:
        max_tokens: at most so many new tokens.
        temperature: logits are divided by it before sampling; 0 takes the likeliest token. None is
            0, or 1 with `top_p`.
        top_p: sample among the likeliest tokens that together have this probability; None is all.
        seed: of sampling. The same seed gives the same text, alone or beside another model.
        dtype: of dense weights and activations.
        device: a torch device (`cpu`, `cuda`, `cuda:1`, `mps`), or `auto` to spread over devices.
        trust_remote_code: run code that comes with the models, which is refused else.

    Raises `UsageError` where a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: GenerateDtype = GenerateDtype.AUTO
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        fix_choices(self, dtype=GenerateDtype)
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: at least 1")
        if self.temperature is not None and not 0 <= self.temperature < 1e4:
            raise UsageError(f"--temperature {self.temperature:g}: 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: it must lie in (0, 1]")
        if self.top_p is not None and self.temperature == 0:
            raise UsageError(f"--top-p {self.top_p:g}: samples, and --temperature 0 does not")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: it must lie in [0, 2^63)")

    @property
    def sampled_at(self) -> float | None:
        """The temperature of sampling; None takes the likeliest token each time."""
        if self.temperature is None:
            return None if self.top_p is None else 1.0
        return self.temperature or None
