"""Every class of experts in transformers, packed against dense.

`python -m tests.architectures.every_class` takes half a minute, for importing them all. Each class
is made small, its weights are quantized, and its output and the gradient of its input are compared
between its own code on the decoded weights and its own code on packed ones. Classes that are left
dense are named. Ends with 1 if one differs.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.forwards import orientation
from irq_convert.nn.experts import Stacked, pack_experts

EXPERTS, HIDDEN, WIDE, TOKENS = 4, 32, 24, 6
TOLERANCE = 1e-5
FORMAT = ModuleFormat("nf4", 16)


class AnyConfig:
    """Answers whatever a class asks of its configuration, with something small."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "limit" in name:
            return 7.0
        if any(word in name for word in ("alpha", "beta", "eps", "scale")):
            return 1.5
        if "act" in name:
            return "silu"
        if "expert" in name and "size" not in name and "dim" not in name:
            return EXPERTS
        if "bias" in name:
            return False
        return WIDE if "intermediate" in name or "ffn" in name else HIDDEN


def classes() -> Iterator[type[nn.Module]]:
    """Classes with "Experts" in their names, of all models."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        if "Experts(nn.Module)" in file.read_text():
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            for name, cls in inspect.getmembers(module, inspect.isclass):
                own = cls.__module__ == module.__name__
                if own and "Experts" in name and issubclass(cls, nn.Module):
                    yield cls


def make(cls: Any) -> nn.Module | None:
    """A small instance with random weights; None for a class that wants something else."""
    for arguments in ((AnyConfig(),), (EXPERTS, HIDDEN, WIDE)):
        try:
            module: nn.Module = cls(*arguments)
        except Exception:  # a class may ask anything of its configuration
            continue
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        return module
    return None


def arguments(module: nn.Module) -> tuple[Any, ...]:
    """What the forward of `module` takes."""
    generator = torch.Generator().manual_seed(1)
    names = list(inspect.signature(type(module).forward).parameters)
    if "expert_size" in names:
        return torch.randn((12, HIDDEN), generator=generator), [3] * EXPERTS
    if len(names) == 2:
        return (torch.randn((3 * EXPERTS, HIDDEN), generator=generator),)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    x = torch.randn((TOKENS, HIDDEN), generator=generator)
    return x, chosen, torch.rand((TOKENS, 2), generator=generator)


def difference(module: nn.Module, turned: bool) -> float:
    """The largest of outputs and input gradients, relative, between dense and packed weights."""
    layouts, parts = {}, {}
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.dim() != 3:
            continue
        rows = weight.data.mT if turned else weight.data
        experts, outputs, inputs = rows.shape
        q = quantize_tensor(rows.reshape(-1, inputs).contiguous(), QuantSpec("nf4", 16))
        dense = dequantize_tensor(q).view(rows.shape)
        weight.data = dense.mT.contiguous() if turned else dense
        layouts[name] = Stacked(FORMAT, experts, outputs, inputs, turned)
        for suffix, part in q.parts().items():
            grid = suffix.endswith("_grid")
            parts[name + suffix] = part if grid else part.view(experts, outputs, -1)
    given = arguments(module)
    dense_result = _result(module, given)
    pack_experts(module, layouts, {})
    for name, part in parts.items():
        module._parameters[name] = nn.Parameter(part, requires_grad=False)
    pairs = zip(dense_result, _result(module, given), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _result(module: nn.Module, given: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, *rest = given
    y = module(x.requires_grad_(), *rest)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


def main() -> int:
    """Print one line a class."""
    warnings.simplefilter("ignore")
    wrong = 0
    for cls in classes():
        kind: Any = cls
        module = make(cls)
        names = [n for n, p in (module.named_parameters() if module else ()) if p.dim() == 3]
        ways = {orientation(kind, name.rpartition(".")[2]) for name in names}
        if module is None or len(ways) != 1 or None in ways:
            why = "not made here" if module is None else "stays dense" if names else "no stacks"
            print(f"{cls.__name__:32} {why}")
            continue
        found = difference(module, bool(ways.pop()))
        wrong += not found <= TOLERANCE
        print(f"{cls.__name__:32} {found:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
