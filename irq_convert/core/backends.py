"""Which implementation computes: numba on the CPU, Triton on NVIDIA GPUs, plain torch anywhere."""

from __future__ import annotations

import warnings

import torch

from irq_convert.core.triton.support import why_not
from irq_convert.errors import UsageError

BACKENDS = ("auto", "numba", "triton", "torch")


def resolve_backend(backend: str, device: torch.device) -> str:
    """What `backend` means for tensors on `device`: "numba", "triton" or "torch".

    Raises `UsageError` for an unknown name, and for "triton" where its kernels do not run.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "numba" if device.type == "cpu" else _for_accelerator(device)
    reason = why_not(device) if backend == "triton" else None
    if reason:
        raise UsageError(f"the triton backend does not serve tensors on {device}: {reason}")
    return backend


def _for_accelerator(device: torch.device) -> str:
    """Triton where it runs, else torch: with a warning on a GPU that could do better."""
    reason = why_not(device)
    if reason is None:
        return "triton"
    if device.type == "cuda" and torch.version.cuda is not None:
        warnings.warn(
            f"{device} is served by plain torch, which is slower than Triton: {reason}",
            stacklevel=3,
        )
    return "torch"
