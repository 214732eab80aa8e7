"""`vllm serve DIR` as a user starts it, asked through OpenAI's own client."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 8137
LONGEST = 900
"""Seconds to wait for the server."""
CLIENT = """
import sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none")
model = client.models.list().data[0].id
made = client.completions.create(model=model, prompt=sys.argv[2], max_tokens=24, temperature=0)
print(model, "|", made.choices[0].text.strip().replace("\\n", " "))
"""


def ask_server(environment: Path, model: Path, log: Path, prompt: str, eager: bool = False) -> str:
    """Start the server on `model`, ask it to go on from `prompt`, print and return its answer.

    `eager`: without torch.compile, which takes minutes of a CPU before the first answer.

    Raises `RuntimeError` with the log's end where it does not come up.
    """
    command = [environment / "bin" / "vllm", "serve", model, "--port", str(PORT)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    more = ["--max-model-len", "256", *(["--enforce-eager"] if eager else [])]
    begun = time.perf_counter()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*command, *more], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
    try:
        _wait(server, log, begun)
        print(f"vllm serve was up after {time.perf_counter() - begun:.0f} s", flush=True)
        asked = [environment / "bin" / "python", "-c", CLIENT]
        url = f"http://127.0.0.1:{PORT}/v1"
        found = subprocess.run([*asked, url, prompt], capture_output=True, text=True, check=True)
        print(found.stdout.strip(), flush=True)
        return found.stdout
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait(server: subprocess.Popen[bytes], log: Path, begun: float) -> None:
    while time.perf_counter() - begun < LONGEST and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not come up:\n{log.read_text(errors='replace')[-2000:]}")
