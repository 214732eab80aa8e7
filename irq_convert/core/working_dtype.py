"""The dtype in which numbers are multiplied: their own, or float32 where a CPU is no good at it.

Without instructions for a 16-bit dtype torch multiplies number by number: forward four to five
times as slowly as in float32, and a gradient tens of times (tests/bench/half_on_cpu.py).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch

_ASKED = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
"""What torch asks itself before it hands a product of the dtype to oneDNN; not public."""


def working_dtype(like: torch.Tensor) -> torch.dtype:
    """The dtype to take products with `like` in; a result is rounded to that of `like` once."""
    slow = like.is_cpu and like.dtype in _ASKED and not cpu_multiplies(like.dtype)
    return torch.float32 if slow else like.dtype


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of bfloat16 or float16 on this CPU; so it has of others."""
    if dtype not in _ASKED:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, _ASKED[dtype])())
    except (AttributeError, RuntimeError):  # built without oneDNN, as for Macs
        return False


def no_autocast() -> AbstractContextManager[object]:
    """In which a CPU's autocast does not take a float32 product back to 16 bits."""
    return torch.autocast("cpu", enabled=False)
