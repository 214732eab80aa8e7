"""One engine of vLLM that answers lines of JSON: the part of the serve scripts that vLLM runs.

    ENV/bin/python tests/bench/serve_engine.py

A line on standard input has the arguments of `vllm.LLM`, in place of the engine that was there,
or is a job for it: `prompts` (lists of token ids), `tokens` to generate greedily, `adapter` (a
folder, or null). Each is answered by one line on standard output that begins with `@`: seconds,
token ids and their log-probabilities, or an error.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any


def answer(**found: Any) -> None:
    print("@" + json.dumps(found), flush=True)


def generate(engine: Any, job: dict[str, Any]) -> None:
    """Run one job and answer."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(
        temperature=0.0, max_tokens=job["tokens"], min_tokens=job["tokens"], logprobs=0
    )
    adapter = job.get("adapter")
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    begun = time.perf_counter()
    outputs = engine.generate(prompts, params, lora_request=request, use_tqdm=False)
    seconds = time.perf_counter() - begun
    answers = []
    for output in outputs:
        (one,) = output.outputs
        ids = list(one.token_ids)
        chosen = [at[token].logprob for at, token in zip(one.logprobs, ids, strict=True)]
        answers.append({"ids": ids, "logprobs": chosen})
    answer(answers=answers, seconds=seconds)


def load(arguments: dict[str, Any]) -> Any:
    """An engine, or None where the model cannot be loaded; answers either way."""
    from vllm import LLM

    begun = time.perf_counter()
    try:
        engine = LLM(**arguments)
    except Exception as error:  # whatever a model that cannot be loaded ends in
        answer(error=" ".join(f"{type(error).__name__}: {error}".split()))
        return None
    answer(seconds=time.perf_counter() - begun)
    return engine


def main() -> None:
    engine: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        if "prompts" in job:
            generate(engine, job)
            continue
        if engine is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            engine = None
            gc.collect()
            cleanup_dist_env_and_memory()
        engine = load(job)


if __name__ == "__main__":
    main()
