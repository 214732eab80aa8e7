"""Engines of vLLM that answer lines of JSON: the part of the serve scripts that vLLM runs.

    ENV/bin/python tests/bench/serve_engine.py

A line on standard input has under `engine` the arguments of `vllm.LLM`, or is a job for the engine
that is there: `prompts` (lists of token ids), `tokens` to generate greedily, `adapter` (a folder,
or null). One with both is done by a fork, and leaves nothing: vLLM on a CPU takes one model a
process. Each is answered by one line on standard output that begins with `@`: seconds, token ids
and their log-probabilities, or an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def answer(**found: Any) -> None:
    print("@" + json.dumps(found), flush=True)


def described(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def load(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine with the seconds it took, or None with the error that it ended in."""
    from vllm import LLM

    begun = time.perf_counter()
    try:
        engine = LLM(**arguments)
    except Exception as error:  # whatever a model that cannot be loaded ends in
        return None, {"error": described(error)}
    return engine, {"loaded": time.perf_counter() - begun}


def generate(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What one job gives."""
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
    return {"answers": answers, "seconds": seconds}


def once(job: dict[str, Any]) -> None:
    """Load, generate and answer in a fork."""
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_model_runner  # noqa: F401

    sys.stdout.flush()
    pid = os.fork()
    if pid:
        if os.waitpid(pid, 0)[1]:
            answer(error="the process with the engine ended")
        return
    engine, found = load(job["engine"])
    if engine is not None:
        try:
            found |= generate(engine, job)
        except Exception as error:  # a kernel that this machine lacks
            found["error"] = f"loaded, then {described(error)}"
    answer(**found)
    os._exit(0)


def main() -> None:
    engine: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        if "engine" in job and "prompts" in job:
            once(job)
        elif "engine" in job:
            engine, found = load(job["engine"])
            answer(**found)
        else:
            answer(**generate(engine, job))


if __name__ == "__main__":
    main()
