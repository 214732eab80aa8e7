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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from irq_convert.core.blocks import BlockShape
from irq_convert.core.spec import QuantSpec
from irq_convert.core.triton.dequantize import dequantize_triton
from irq_convert.core.triton.probe import failure
from irq_convert.core.triton.quantize import quantize_triton

from .oracle import random_sample

SPECS = (QuantSpec("nf4", 64, "entropy", 2), QuantSpec("int3", 32, "mse", 2, "integer"))
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """The kernel for exactly these arguments."""
        given = {p.name: v for p, v in zip(self.kernel.params, self.args, strict=False)}
        given |= {k: v for k, v in self.options.items() if k in self.kernel.arg_names}
        signature, constants, aligned = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(at,)] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
            if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                aligned[(at,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, aligned)

    def build(self, architecture: int, **more: Any) -> Any:
        own = {k: v for k, v in self.options.items() if k not in self.kernel.arg_names}
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(self.source(), target=target, options={**own, **more})


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


def floating(ptx: str) -> list[str]:
    """The instructions on floating-point numbers, each once."""
    code = re.findall(r"^\s*(?:@\S+\s+)?([a-z]+(?:\.\w+)+)\s", ptx, re.MULTILINE)
    return sorted({name for name in code if re.search(r"\.(b?f(16|32|64))", name)})


def main(architectures: list[int]) -> None:
    found = []
    q = random_sample(0, 16, 96).q
    for spec, architecture in zip(SPECS, architectures, strict=True):
        weight = torch.zeros(16, 256, dtype=torch.bfloat16)
        shape = BlockShape(16, 256, spec.block_size, spec.bits)
        launches = recorded(lambda: quantize_triton(weight, shape, spec))  # noqa: B023
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(16, 96, dtype=dtype)
            launches += recorded(lambda: dequantize_triton(q, 0, 16, out))  # noqa: B023
        for launch in launches:
            built = launch.build(architecture)
            name = launch.kernel.fn.__name__
            found.append([name, floating(built.asm["ptx"]), "cubin" in built.asm])
    emit = next(launch for launch in launches if launch.kernel.fn.__name__ == "emit")
    fused = floating(emit.build(architectures[0], enable_fp_fusion=True).asm["ptx"])
    reason = failure(torch.device("cpu"))
    print(json.dumps({"kernels": found, "fused": fused, "failure": reason}))


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]])
