"""Where the Triton kernels run: one explicit rule, which imports Triton only on an NVIDIA GPU."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton was asked to interpret kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: torch.device) -> str | None:
    """Why kernels do not run on tensors of `device`; None where they do.

    NVIDIA GPUs only (and CPU tensors under the interpreter, for tests): there every rounding
    that the kernels rely on can be read off the generated code. The portable torch path serves
    all others.
    """
    if not _installed():
        return "Triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "on the CPU only Triton's interpreter runs"
    if device.type != "cuda" or torch.version.cuda is None:
        return "the kernels are for NVIDIA GPUs"
    if interpreting():
        return "Triton's interpreter is on"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than Triton supports"
    return _failure(device)


def _failure(device: torch.device) -> str | None:
    from irq_convert.core.triton.probe import failure

    return failure(device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
