"""Python code as a process of its own, without the seconds that torch takes to be imported.

`Forks` has an interpreter that has imported torch and accelerate, and forks for each piece of
code. Nothing of transformers, PEFT or this package is imported then (torch's entry points are not
called): which of these comes first is for the code to say. What runs before torch is imported needs
a real process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

LATER = {"irq_convert", "peft", "transformers"}


class Forks:
    """Runs code in forks of an interpreter that has imported torch."""

    def __init__(self, scratch: Path) -> None:
        self._out, self._err = scratch / "out", scratch / "err"
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def __call__(
        self, code: str, *args: object, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """What `python -c code *args` would have left."""
        arguments = [str(arg) for arg in args]
        request = {
            "code": code,
            "args": arguments,
            "cwd": str(cwd or Path.cwd()),
            "env": env,
            "stdout": str(self._out),
            "stderr": str(self._err),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(
            ["python", "-c", code, *arguments],
            status,
            self._out.read_text(),
            self._err.read_text(),
        )


def become(request: dict[str, object]) -> None:
    """Make the fresh child the process that was asked for."""
    for number, key in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(str(request[key]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(str(request["cwd"]))
    os.environ.update(request["env"])  # type: ignore[call-overload]
    sys.argv = ["-c", *request["args"]]  # type: ignore[misc]


def run(code: str) -> int:
    """Run `code` as the main module; the exit status."""
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(code, "<string>", "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """One JSON line in says what to run; one line out gives its exit status."""
    import accelerate  # noqa: F401

    sys.path[0] = ""  # as of `python -c`, not the folder of this file
    assert not LATER & set(sys.modules)
    gc.collect()
    gc.freeze()  # a child that looked for garbage in all this would copy it
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            become(request)
            os._exit(run(request["code"]))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)  # an interpreter takes seconds to clean up


if __name__ == "__main__":
    serve()
