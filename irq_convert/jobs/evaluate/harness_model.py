"""A loaded model as lm-evaluation-harness asks it: its own class for transformers, with progress.

Imports lm-eval: only for who has it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from irq_convert.errors import UsageError
from irq_convert.hf.limits import check_vocabulary
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
        longest = max((self._written(request) for request in requests), default=0)
        room = self.max_length - longest
        if room < 1:
            raise UsageError(
                f"--tasks: an answer may take {longest:,} tokens, and with the question there is "
                f"room for {self.max_length:,}: leave this task out, or raise --context"
            )
        self._tell_cut([len(self.tok_encode(request.args[0])) for request in requests], room)
        self._begin(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        lengths = [len(before or ()) + len(after) - 1 for _, before, after in requests]
        self._tell_cut(lengths, self.max_length)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

    def _model_call(self, inps: Any, *others: Any, **more: Any) -> Any:
        check_vocabulary(self.model, inps)
        return super()._model_call(inps, *others, **more)

    def _model_generate(self, context: Any, *others: Any, **more: Any) -> Any:
        check_vocabulary(self.model, context)
        return super()._model_generate(context, *others, **more)

    def _written(self, request: Any) -> int:
        """How many tokens an answer may have."""
        return int(request.args[1].get("max_gen_toks", self.max_gen_toks))

    def _tell_cut(self, lengths: list[int], most: int) -> None:
        cut = sum(length > most for length in lengths)
        if cut:
            self._progress.note(
                f"{cut:,} of {len(lengths):,} requests are longer than {most:,} tokens and lose "
                "their beginning: lower --fewshot"
            )

    def _begin(self, requests: list[Any]) -> None:
        self._progress.phase("requests", len(requests), len(requests))


class _Answers:
    """Stands where lm-eval keeps answers for the next time, and counts them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Called once for each request that was answered."""
        self._progress.advance(1, 1)
