"""A loaded model as lm-evaluation-harness asks it: its own class for transformers, with progress.

Imports lm-eval: only for who has it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from irq_convert.jobs.evaluate.task_options import TaskOptions
from irq_convert.progress import Progress


class HarnessModel(HFLM):
    """lm-eval's `hf` model around one that is loaded; scores are those of `lm_eval --model hf`.

    Tells `progress` each request that was answered, and notes requests that are longer than the
    model can take, of which lm-eval cuts the beginning off.
    """

    def __init__(self, model: Any, tokenizer: Any, options: TaskOptions, progress: Progress):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=options.batch_size,
            max_length=options.context,
        )
        self._progress = progress
        self.set_cache_hook(_Answers(progress))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        most = self.max_length + 1
        cut = sum(len(before or ()) + len(after) > most for _, before, after in requests)
        if cut:
            self._progress.note(
                f"{cut:,} of {len(requests):,} requests are longer than {self.max_length:,} tokens "
                "and lose their beginning: lower --fewshot"
            )
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

    def _begin(self, requests: list[Any]) -> None:
        self._progress.phase("requests", len(requests), len(requests))


class _Answers:
    """Stands where lm-eval keeps answers for the next time, and counts them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Called once for each request that was answered."""
        self._progress.advance(1, 1)
