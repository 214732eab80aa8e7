"""The entry point: optional, silent where all is well, one line where it is not."""

from __future__ import annotations

import logging
import sys
import tomllib
from importlib import import_module

import pytest

from irq_convert.vllm.register import TRIED, register
from tests.paths import ROOT
from tests.vllm import engine


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, function = project["entry-points"]["vllm.general_plugins"]["irq"].partition(":")
    assert getattr(import_module(name), function) is register


def test_without_vllm_one_line_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed, or another that fails
    monkeypatch.delitem(sys.modules, "irq_convert.vllm.config", raising=False)
    with caplog.at_level(logging.WARNING, "irq_convert"):
        register()
    (record,) = caplog.records
    assert TRIED[0] in record.getMessage()
    assert "\n" not in record.getMessage()


def test_registering_again_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered = engine.stand_in(monkeypatch)
    with caplog.at_level(logging.INFO, "irq_convert"):
        register()
        register()
    engine.forget(monkeypatch)
    assert [*registered] == ["irq"]
    assert not caplog.records
