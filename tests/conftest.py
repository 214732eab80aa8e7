"""What all tests share: one profile of hypothesis, and artifacts that many read and none changes.

A loaded machine keeps no deadline, so the profile has none. Each artifact is made when a test first
asks for it, once a process, and compared at the end with what it was.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cli.process import Commands
from tests.folders import listing
from tests.fresh import Forks
from tests.warm import compile_others, compile_search

settings.register_profile("irq", deadline=None, max_examples=60)
settings.register_profile("quick", deadline=None, max_examples=6)
settings.load_profile("irq")

MODULES = 20
"""So many new ones are worth a look of the garbage collector at all objects."""
_frozen: list[int] = []


def pytest_sessionstart() -> None:
    """Two processes compile what a fresh clone lacks between them."""
    own = os.environ.get("PYTEST_XDIST_WORKER")
    if own is not None:
        (compile_search if own == "gw0" else compile_others)()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: one that began last would run on alone."""
    slow = {item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("slow")}
    count = Counter(name.partition("::")[0] for name in slow)
    items.sort(key=lambda item: -count[item.nodeid.partition("::")[0]])


def pytest_collection_finish() -> None:
    _freeze_imports()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Much of transformers is imported when a test first names it."""
    if len(sys.modules) > _frozen[-1] + MODULES:
        _freeze_imports()


def _freeze_imports() -> None:
    """What has been imported stays: every look of the garbage collector at it would be in vain."""
    _frozen.append(len(sys.modules))
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries in C++ look for leaks at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs code as a process that has imported torch, and nothing that hooks into it."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def irq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The program, each command a process that has imported all it needs."""
    scratch = tmp_path_factory.mktemp("streams")
    for folder in (scratch, scratch.parent):
        folder.chmod(0o755)
    commands = Commands(scratch)
    yield commands
    commands.close()


def unchanged(folder: Path) -> Iterator[Path]:
    """Hand out `folder`, and check in the end that no test has changed it."""
    before = listing(folder)
    yield folder
    assert listing(folder) == before, f"a test has changed {folder}, which others read"


@pytest.fixture(scope="session")
def demo_nf3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model, tokenizer and all, at 3 bits."""
    from irq_convert.core.spec import QuantSpec
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize
    from tests.paths import DEMO

    folder = tmp_path_factory.mktemp("demo") / "demo-nf3"
    quantize(str(DEMO), folder, QuantizeOptions(QuantSpec("nf3", 64)))
    yield from unchanged(folder)


@pytest.fixture(scope="session")
def tiny_nf4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny LLaMA of `tests.tiny` in nf4, blocks of 32, from float32."""
    from tests.jobs.merge.make import make_artifact

    yield from unchanged(make_artifact(tmp_path_factory.mktemp("tiny") / "tiny-irq"))


@pytest.fixture(scope="session")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random LLaMA in bfloat16 that every export takes: widths 128 and 352."""
    from tests.jobs.export.make import save_model

    yield from unchanged(save_model(tmp_path_factory.mktemp("whole") / "source"))


@pytest.fixture(scope="session")
def whole_int4(whole_blocks: Path) -> Iterator[Path]:
    """`whole_blocks` in int4, blocks of 32."""
    from tests.jobs.export.make import quantized

    yield from unchanged(quantized(whole_blocks, whole_blocks.with_name("int4")))


@pytest.fixture(scope="session")
def whole_nf4(whole_blocks: Path) -> Iterator[Path]:
    """`whole_blocks` in nf4, blocks of 32."""
    from tests.jobs.export.make import quantized

    yield from unchanged(quantized(whole_blocks, whole_blocks.with_name("nf4"), "nf4"))
