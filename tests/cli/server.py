"""Run by `process.Commands`: does a small conversion once, then forks for each command.

One JSON line in says what to run; one line out gives the process, and one its exit status. A child
has all imports made and kernels loaded; apart from that it is a process like any other, but for
the seconds that an interpreter takes to clean up.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM  # noqa: F401 - imported when it is first named
from typer.testing import CliRunner

import irq_convert.jobs.finetune.training_run
import irq_convert.jobs.merge.merge  # noqa: F401 - for the commands that import them
from irq_convert.cli.main import app, main
from tests.ranks import run_ranks
from tests.tiny import LLAMA, llama_tensors, write_source

NOBODY = 65534


def warm_up() -> None:
    """Import, parse, build and compile what a command will."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_source(Path(folder, "source"), llama_tensors(), LLAMA)
        for more in ([], ["--dry-run", "--json"], ["--bits", "5"], ["--device", "meta"], ["--x"]):
            CliRunner().invoke(app, ["quantize", str(source), f"{folder}/{len(more)}", *more])
        CliRunner().invoke(app, ["quantize", "org/model", f"{folder}/out"])
        done = CliRunner().invoke(app, ["verify", f"{folder}/0"])
        assert done.exit_code == 0, "nothing was made, so that no kernel is loaded"


def become(request: dict[str, object]) -> None:
    """Make the fresh child the process that was asked for."""
    for number, key in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(str(request[key]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if request["unread"]:
        unread, written = os.pipe()
        os.dup2(written, 1)
        os.close(unread)
    if request["terminal"]:
        for number in range(3):
            os.dup2(os.open(str(request["terminal"]), os.O_RDWR), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the one there is has been read from
    os.chdir(str(request["cwd"]))
    os.environ.update(request["env"])  # type: ignore[call-overload]
    importlib.reload(constants)  # which Hub, and what of it is cached where
    if request["nobody"]:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    sys.argv = ["irq-convert", *request["args"]]  # type: ignore[misc]


def run() -> int:
    """`main()` as the interpreter would run it; returns the exit status."""
    # torch replaces its thread pool at the first call after a fork, and fails with "Invalid thread
    # pool!" when two threads make that call at once, as a backward pass and its caller may.
    torch.set_num_threads(torch.get_num_threads())
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


warm_up()
gc.collect()
gc.freeze()  # a child that looked for garbage in all this would copy it
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        request = json.loads(line)
        become(request)
        os._exit(run_ranks(request["ranks"], run) if request["ranks"] else run())
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)  # an interpreter takes seconds to clean up
