"""What an evaluation is asked to do: window length, batch, part of the text, dtype and device.

Nothing heavy is imported here, so that the command line can name the choices without torch.
"""

from dataclasses import dataclass
from enum import StrEnum

from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import fix_choices


class EvalDtype(StrEnum):
    """Floating-point type the models are loaded and run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class EvalOptions:
    """Options of one evaluation.

    Attributes:
        context: window length in tokens; None takes the models' own, at most 2048.
        batch_size: windows in one forward pass. One batch of logits of each model is held,
            `batch_size * context * vocabulary` numbers, so this is the memory knob.
        max_tokens: score at most this many tokens from the start of the chosen part; None is all.
        from_fraction: skip this fraction of the text's characters (0.9 keeps the last tenth).
        dtype: floating-point type of both models.
        device: a torch device (`cpu`, `cuda`, `cuda:1`, `mps`), or `auto` to spread over devices.
        trust_remote_code: run code that comes with the models, which is refused else.

    Raises `UsageError` where a value is out of its range.
    """

    context: int | None = None
    batch_size: int = 1
    max_tokens: int | None = None
    from_fraction: float = 0.0
    dtype: EvalDtype = EvalDtype.FLOAT32
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        fix_choices(self, dtype=EvalDtype)
        if self.context is not None and self.context < 2:
            raise UsageError(f"context is {self.context}: a window needs at least 2 tokens")
        if self.batch_size < 1:
            raise UsageError(f"batch size is {self.batch_size}: it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UsageError(f"max tokens is {self.max_tokens}: at least 2 are needed")
        if not 0.0 <= self.from_fraction < 1.0:
            raise UsageError(f"from fraction is {self.from_fraction}: it must lie in [0, 1)")
