"""What the serve scripts share: engines of vLLM in an environment of their own, asked by lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ENGINE = Path(__file__).with_name("serve_engine.py")
SPACE_GB = 1
"""Memory for keys and values."""


class Engine:
    """A process with a model in vLLM, or with one after the other. `log` takes what vLLM prints.

    `cores` are their numbers, such as "0" or "0-1", with a bar between those of ranks. `alone`: all
    in one process, which vLLM does on CPUs for one rank only; otherwise as it serves.
    """

    def __init__(self, environment: Path, log: Path, cores: str = "0", alone: bool = False) -> None:
        self.log = log
        own = {
            "VLLM_CPU_KVCACHE_SPACE": str(SPACE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not alone)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [environment / "bin" / "python", ENGINE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env={**os.environ, **own},
                start_new_session=True,
            )

    def load(self, model: Path, **settings: Any) -> dict[str, Any]:
        """Load `model`; the seconds under `loaded`, or the `error`."""
        return self._ask({"engine": _arguments(model, settings)})

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy text: `answers` with `ids` and `logprobs` for each prompt, and the `seconds`."""
        return self._ask({"prompts": prompts, "tokens": tokens})

    def once(
        self,
        model: Path,
        prompts: list[list[int]],
        tokens: int,
        adapter: Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """`load` and `generate` in a fork of the process, which stays empty."""
        given = None if adapter is None else str(adapter)
        job = {"prompts": prompts, "tokens": tokens, "adapter": given}
        return self._ask({"engine": _arguments(model, settings), **job})

    def close(self) -> None:
        """End the process, and workers of ranks that a fork of it has left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
            with self.log.open("a") as out:
                out.write(line)
        return {"error": self._reason()}

    def _reason(self) -> str:
        """The last line of the log that names an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\w*Error: ", line)]
        own = [line for line in errors if "Engine core" not in line] or errors or ["ended"]
        return re.sub(r"^.*?(\w*Error: )", r"\1", own[-1])


def _arguments(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {"model": str(model), "max_model_len": 256, **settings}
