"""How kernels are compiled: IEEE arithmetic, no contraction, cached at entry points."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from irq_convert.core.codebook import MOST_LEVELS

# No fastmath anywhere: LLVM may neither reassociate nor fuse, so every machine gives the same bits.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "forceinline": True}

# Kernels borrow their arrays and allocate nothing. Reference counts would be atomic operations
# on every call, half of the whole run time, so the runtime that keeps them is off.
_njit: Any = njit  # its annotations leave options out
kernel: Callable[..., Any] = _njit(_nrt=False, **_OPTIONS)
allocator: Callable[..., Any] = _njit(**_OPTIONS)


def _source_digest() -> str:
    # With the one number from outside this folder that kernels are compiled with.
    digest = hashlib.sha256(str(MOST_LEVELS).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def entry_point(make: Callable[[str], Callable[..., Any]], parallel: bool = True) -> Any:
    """Compile the function that `make(digest)` returns, with a cache on disk.

    numba notices a change of the file that holds a cached function but not of the files it calls.
    It does key on closure variables, so the function has to mention `digest`, a hash of
    all kernels.
    """
    compiled = njit(parallel=parallel, cache=True, error_model="numpy", nogil=True)
    return compiled(make(_source_digest()))
