"""One engine of vLLM that answers lines of JSON: the part of the serve scripts that vLLM runs.

    ENV/bin/python tests/bench/serve_engine.py

The first line on standard input has the arguments of `vllm.LLM`, every further one a job: `prompts`
(lists of token ids), `tokens` to generate greedily, `adapter` (a folder, or null). Each is answered
by one line on standard output that begins with `@`: token ids, their log-probabilities, seconds.
"""

from __future__ import annotations

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


def main() -> None:
    from vllm import LLM

    arguments = json.loads(sys.stdin.readline())
    begun = time.perf_counter()
    try:
        engine = LLM(**arguments)
    except Exception as error:  # whatever a model that cannot be loaded ends in
        answer(error=f"{type(error).__name__}: {error}".partition("\n")[0])
        return
    answer(seconds=time.perf_counter() - begun)
    for line in sys.stdin:
        generate(engine, json.loads(line))


if __name__ == "__main__":
    main()
