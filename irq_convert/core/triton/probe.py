# mypy: disallow-untyped-defs=False
"""One tiny launch that tells whether Triton works on a device and rounds as the format needs.

Triton compiles its launcher with the machine's C compiler and Python's headers; where those are
missing, only trying shows it.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import LAUNCH


@triton.jit
def _product_and_sum(x, out):
    tl.store(out, tl.load(x) * tl.load(x + 1) + tl.load(x + 2))


@functools.cache
def failure(device: torch.device) -> str | None:
    """What is wrong with Triton on `device`, in a line; None when all is well."""
    near = 1.0 + 2.0**-12
    try:
        x = torch.tensor([near, near, -1.0], device=device)
        out = torch.empty(1, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _product_and_sum[(1,)](x, out, **LAUNCH)
        rounded_twice = out.item() == 2.0**-11  # in one step: 2**-24 more
    except Exception as error:  # whatever a compiler or driver comes up with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"Triton does not run here: {reason}"
    return None if rounded_twice else "the device rounds a product and a sum in one step"
