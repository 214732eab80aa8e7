# mypy: disallow-untyped-defs=False
"""One tiny launch that tells whether Triton works on a device and rounds as the format needs.

Triton compiles its launcher with the machine's C compiler and Python's headers; where those are
missing, only trying shows it. Nor do its versions compute alike: up to 3.5 its divisions take
denormals for zero, and up to 3.3 its sort makes NaN of infinities.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import LAUNCH

NEAR = 1.0 + 2.0**-12
INFINITY = float("inf")
MIXED = (INFINITY, 3.0, -1.0, INFINITY, 0.0, 2.0, INFINITY, -4.0)


@triton.jit
def _sample(x, out, N: tl.constexpr):
    tl.store(out, tl.load(x) * tl.load(x + 1) + tl.load(x + 2))
    tl.store(out + 1, tl.div_rn(tl.load(x + 3), tl.load(x + 4)))
    i = tl.arange(0, N)[None, :]
    tl.store(out + 2 + i, tl.sort(tl.load(x + 5 + i), dim=1))


@functools.cache
def failure(device: torch.device) -> str | None:
    """What is wrong with Triton on `device`, in a line; None when all is well."""
    given = [NEAR, NEAR, -1.0, 2.0**-126, 4.0, *MIXED]
    try:
        x = torch.tensor(given, dtype=torch.float32, device=device)
        out = torch.empty(2 + len(MIXED), dtype=torch.float32, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _sample[(1,)](x, out, N=len(MIXED), **LAUNCH)
        total, quotient, *ordered = out.tolist()
    except Exception as error:  # whatever a compiler or driver comes up with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"Triton does not run here: {reason}"
    if total != 2.0**-11:  # in one step: 2**-24 more
        return "the device rounds a product and a sum in one step"
    if quotient != 2.0**-128:
        return f"Triton {triton.__version__} takes denormals for zero; 3.6 does not"
    if ordered != sorted(MIXED):
        return f"Triton {triton.__version__} cannot sort infinities; 3.4 can"
    return None
