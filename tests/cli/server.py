"""Run by `process.Commands`: imports what commands import once, then forks for each of them.

One JSON line in says what to run, one line out gives the process, and one its exit status. The
child is a process like any other: `main()` runs at the top of it and the interpreter ends it.
"""

from __future__ import annotations

import json
import os
import sys

import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401 - imported when it is first named

import irq_convert.cli.bar
import irq_convert.cli.show
import irq_convert.convert.estimate
import irq_convert.convert.run
import irq_convert.hf.names  # noqa: F401
from irq_convert.cli.main import main

NOBODY = 65534


def become(request: dict[str, object]) -> None:
    """Make the fresh child the process that was asked for."""
    for number, key in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(str(request[key]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(str(request["cwd"]))
    os.environ.update(request["env"])  # type: ignore[arg-type]
    if request["nobody"]:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    sys.argv = ["irq-convert", *request["args"]]  # type: ignore[misc]


def serve() -> None:
    """Return in each child; never return in the server while requests come."""
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            become(json.loads(line))
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


serve()
main()
