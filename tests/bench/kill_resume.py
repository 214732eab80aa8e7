"""Kill a conversion at random moments, or at each of its steps on the disk, and continue it.

    python tests/bench/kill_resume.py 200            # random moments
    python tests/bench/kill_resume.py 0 --steps 1    # before every change to the disk

After each kill nothing but whole files may bear a final name, and the output folder may not be
there unless it is finished; in the end it is compared byte for byte with that of an undisturbed
run. Random moments are uniform over the length of an undisturbed run, up to four kills on one
folder. Prints where the kills fell, as a table for docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # the threads that survive a fork
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cli.process import listing
from tests.cli.sources import make_source

LONGEST_CHAIN = 4
STEPS = ("open", "replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "write", "pwrite")
WHERE = (
    "before the folder is there",
    "before the first shard is finished",
    "between the first shard and the last",
    "after the last shard, before the rename",
    "after the rename",
    "while layers are calibrated",
)


class Conversion:
    """A source, the run that turns it into `out`, and what an undisturbed one makes.

    With `overwrite` an older artifact is there, and stays until the new one is whole.
    """

    def __init__(self, folder: Path, rows: int, shard_bytes: int, overwrite: bool = False) -> None:
        self.folder = folder
        self._make(rows)
        self.out = folder / "work" / "out"
        self.partial = self.out.with_name("out.partial")
        self.calibration = self.out.with_name("out.calibration")
        self.out.parent.mkdir(parents=True)
        self.options = self._options(shard_bytes, overwrite)
        self._convert(folder / "whole")  # here, so that children have all imports and kernels
        self.whole = listing(folder / "whole")
        self.old = {**self.whole, "config.json": b"older"} if overwrite else None
        self._put_old()
        self.shards = [name for name in self.whole if name.endswith(".safetensors")]

    def _make(self, rows: int) -> None:
        """Write the source."""
        self.source = make_source(self.folder / "source", rows=rows)

    def _options(self, shard_bytes: int, overwrite: bool) -> Any:
        from irq_convert.core.spec import QuantSpec
        from irq_convert.jobs.quantize.options import QuantizeOptions

        spec = QuantSpec("nf4", 16, "mse")
        return QuantizeOptions(spec, max_shard_bytes=shard_bytes, threads=1, overwrite=overwrite)

    def _convert(self, out: Path) -> None:
        from irq_convert.jobs.quantize.quantize import quantize

        quantize(str(self.source), out, self.options)

    def _put_old(self) -> None:
        """Leave in the place of the output what a run is to find there."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.old is not None:
            shutil.copytree(self.folder / "whole", self.out)
            (self.out / "config.json").write_bytes(b"older")

    @property
    def finished(self) -> bool:
        """Whether the output is there; `AssertionError` when it is not whole."""
        if not self.out.exists():
            return False
        found = listing(self.out)
        assert found in (self.whole, self.old), "the output is there but not whole"
        return found == self.whole

    def start(self, before: Callable[[], None] = lambda: None) -> int:
        """Begin a run in a process of its own, which calls `before` first."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            before()
            self._convert(self.out)
            code = 0
        finally:
            os._exit(code)

    def end(self, pid: int) -> bool:
        """Wait for a run; False when it was killed, `AssertionError` when it failed."""
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the run ended with {status}"
        return status == 0

    def place(self) -> str:
        """Where a kill has fallen, by what it left."""
        if self.finished:
            return WHERE[4]
        if not self.partial.exists():
            return WHERE[0] if not self.calibration.exists() else WHERE[5]
        count = len(list(self.partial.glob("records/model*.record")))
        return WHERE[3] if count == len(self.shards) else WHERE[2] if count else WHERE[1]

    def check(self) -> None:
        """Everything with a final name is whole, whatever has happened."""
        assert self.finished in (True, False)
        for path in self.partial.glob("files/**/*"):
            if path.is_file() and not path.name.startswith("."):
                name = path.relative_to(self.partial / "files").as_posix()
                assert path.read_bytes() == self.whole[name], f"{path} is half-written"

    def finish(self) -> None:
        """Run to the end, compare, and make room for the next."""
        if not self.finished:
            assert self.end(self.start()), "the last run was killed"
        elif self.old is None:
            from irq_convert.checkpoint.disk import remove_leftovers
            from irq_convert.jobs.calibration.workspace import remove_finished

            remove_leftovers(self.out)  # what any further command does
            remove_finished(self.out)
        else:
            assert self.end(self.start()), "the last run was killed"
        assert listing(self.out) == self.whole, "continued, it comes out otherwise"
        assert [path.name for path in self.out.parent.iterdir()] == ["out"], (
            f"something is left: {[p.as_posix() for p in self.out.parent.rglob('*')]}"
        )
        self._put_old()

    def seconds(self) -> float:
        """How long an undisturbed run takes, in a process of its own."""
        found = []
        for _ in range(3):
            begun = time.perf_counter()
            assert self.end(self.start())
            found.append(time.perf_counter() - begun)
            self.finish()
        return statistics.median(found)


class Calibrated(Conversion):
    """A conversion that calibrates its weights first."""

    def _make(self, rows: int) -> None:
        from tests.jobs.calibration.words import word_text, write_word_tokenizer
        from tests.tiny import LLAMA, VOCABULARY, llama_tensors, write_source

        self.source = self.folder / "source"
        write_source(self.source, llama_tensors(), LLAMA, 1)
        write_word_tokenizer(self.source, VOCABULARY)
        self.text = self.folder / "text.txt"
        self.text.write_text(word_text(VOCABULARY, rows))

    def _options(self, shard_bytes: int, overwrite: bool) -> Any:
        from irq_convert.jobs.calibration.options import CalibrationOptions
        from irq_convert.jobs.quantize.options import QuantizeOptions

        calibrate = CalibrationOptions(str(self.text), tokens=512, window=32)
        return QuantizeOptions.of(
            bits=3, block_size=16, calibrate=calibrate, max_shard_bytes=shard_bytes, threads=1,
            overwrite=overwrite,
        )  # fmt: skip


def random_kills(conversion: Conversion, kills: int, seed: int) -> Counter[str]:
    """Kill at `kills` random moments; where they fell, and how many runs they were in a row."""
    chance, length = random.Random(seed), conversion.seconds()
    fell: Counter[str] = Counter()
    while sum(fell.values()) < kills:
        for _ in range(min(chance.randint(1, LONGEST_CHAIN), kills - sum(fell.values()))):
            pid = conversion.start()
            time.sleep(chance.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
            killed = not conversion.end(pid)
            conversion.check()
            if killed:
                fell[conversion.place()] += 1
            if conversion.finished:
                break
        conversion.finish()
    return fell


def step_kills(conversion: Conversion, every: int) -> Counter[str]:
    """Kill before each `every`-th change to the disk, from the first to the last."""
    fell: Counter[str] = Counter()
    at = 0
    while True:
        killed = not conversion.end(conversion.start(lambda step=at: die_at(step)))  # type: ignore[misc]
        conversion.check()
        if killed:
            fell[conversion.place()] += 1
        conversion.finish()
        if not killed:
            return fell
        at += every


def die_at(step: int) -> None:
    """Let this process kill itself when it is about to take one more of `STEPS` than `step`."""
    left = step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **more)

        return counting

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def report(title: str, fell: Counter[str]) -> None:
    print(f"| {title}: {sum(fell.values())} kills | |\n|---|---|")
    for where in WHERE:
        print(f"| {where} | {fell[where]} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="kill conversions and continue them")
    parser.add_argument("kills", nargs="?", type=int, default=200, help="at random moments")
    parser.add_argument("--steps", type=int, default=0, help="at every so manieth step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.kills:
            large = Conversion(folder / "random", rows=10_000, shard_bytes=100_000)
            report("random moments", random_kills(large, args.kills, args.seed))
            fitted = Calibrated(folder / "fitted", rows=2_000, shard_bytes=40_000)
            fell = random_kills(fitted, args.kills, args.seed)
            report("random moments of a calibrated conversion", fell)
        for overwrite in (False, True) if args.steps else ():
            small = Conversion(folder / f"steps {overwrite}", 172, 10_000, overwrite)
            what = "steps, replacing an older artifact" if overwrite else "steps"
            report(what, step_kills(small, args.steps))
    print(f"every result byte-identical, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
