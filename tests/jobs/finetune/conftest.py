"""An artifact, its tokenizer and a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.paths import DEMO

from .base import write_tales


@pytest.fixture(scope="session")
def artifact(demo_nf3: Path) -> Path:
    return demo_nf3


@pytest.fixture(scope="session")
def int2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at 2 bits, which is far from it."""
    folder = tmp_path_factory.mktemp("demo") / "demo-int2"
    quantize(str(DEMO), folder, QuantizeOptions(QuantSpec("int2", 64)))
    return folder


@pytest.fixture(scope="session")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tales(tmp_path_factory.mktemp("text") / "tales.txt")


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
