"""Compile for a real GPU every kernel that a quantization would launch, and print what is in it.

No GPU is needed: Triton brings NVIDIA's assembler. Run by `test_triton.py` in a process of its own:
`python -m tests.core.triton_build ARCHITECTURE...` prints JSON, kernel by kernel, with the
floating-point instructions of its PTX and whether the assembler took it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from irq_convert.core.blocks import BlockShape
from irq_convert.core.solver.portable import Book
from irq_convert.core.spec import QuantSpec
from irq_convert.core.triton.decode import decode_rows_triton
from irq_convert.core.triton.dequantize import dequantize_triton
from irq_convert.core.triton.descend import descend_panel_triton
from irq_convert.core.triton.probe import failure
from irq_convert.core.triton.quantize import quantize_triton
from irq_convert.core.triton.sweep import sweep_panel_triton

from .oracle import random_sample

SPECS = (QuantSpec("nf4", 64, "entropy", 2), QuantSpec("int3", 32, "mse", 2, "integer"))


class Assembling:
    """Stands where the driver of a GPU is; only what a launch asks for before it starts."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    class launcher_cls:
        def __init__(self, *args: object) -> None:
            pass


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def build(self, architecture: int, **more: Any) -> Any:
        """Bind, specialize and compile as a launch does, all but the launch itself."""
        driver.set_active(Assembling(architecture))
        options = {**self.options, **more}
        return JITFunction.run(self.kernel, *self.args, grid=(1,), warmup=True, **options)


def recorded(run: Callable[[], object]) -> list[Launch]:
    """What `run` would launch; nothing is."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: launches.append(Launch(kernel, args, options))

    real, JITFunction.__getitem__ = JITFunction.__getitem__, record
    try:
        run()
    finally:
        JITFunction.__getitem__ = real
    return launches


def solving(spec: QuantSpec) -> list[Launch]:
    """A panel of the sweep and a block of the descent, each with a tail and whole."""
    book = Book(
        spec.block_size,
        torch.from_numpy(spec.book.level_array()),
        torch.from_numpy(spec.book.midpoint_array()),
    )
    launches = []
    for width in (24, spec.block_size):
        tile, square, row = torch.zeros(16, width), torch.zeros(width, 256), torch.zeros(16)
        square = square[:, 3 : 3 + width]
        sweep = tile, tile, tile, tile, square, book
        descend = tile, tile, square, square[0], row, row, book
        launches += recorded(lambda: sweep_panel_triton(*sweep))  # noqa: B023
        launches += recorded(lambda: descend_panel_triton(*descend))  # noqa: B023
    return launches


def floating(ptx: str) -> list[str]:
    """The instructions on floating-point numbers, each once."""
    code = re.findall(r"^\s*(?:@\S+\s+)?([a-z]+(?:\.\w+)+)\s", ptx, re.MULTILINE)
    return sorted({name for name in code if re.search(r"\.(b?f(16|32|64))", name)})


def main(architectures: list[int]) -> None:
    reason = failure(torch.device("cpu"))  # before a driver seems to be there
    found = []
    q = random_sample(0, 16, 96).q
    for spec, architecture in zip(SPECS, architectures, strict=True):
        weight = torch.zeros(16, 256, dtype=torch.bfloat16)
        shape = BlockShape(16, 256, spec.block_size, spec.bits)
        shares = np.ones((4, 256), np.int32), np.arange(16, dtype=np.int32) // 4
        launches = []
        for weighing in (None, shares) if spec is SPECS[0] else (shares,):
            launches += recorded(lambda: quantize_triton(weight, shape, spec, weighing))  # noqa: B023
        launches += solving(spec)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(16, 96, dtype=dtype)
            launches += recorded(lambda: dequantize_triton(q, 0, 16, out))  # noqa: B023
            x = torch.empty(3, 96, dtype=dtype)
            launches += recorded(lambda: decode_rows_triton(x, q))  # noqa: B023
        for launch in launches:
            built = launch.build(architecture)
            name = launch.kernel.fn.__name__
            found.append([name, floating(built.asm["ptx"]), "cubin" in built.asm])
    emit = next(launch for launch in launches if launch.kernel.fn.__name__ == "emit")
    fused = floating(emit.build(architectures[0], enable_fp_fusion=True).asm["ptx"])
    print(json.dumps({"kernels": found, "fused": fused, "failure": reason}))


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]])
