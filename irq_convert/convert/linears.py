"""Which tensors are the weights of linear layers: by the model's class, or by name and shape.

Nothing is loaded. Where transformers knows the architecture, the model is built on the meta device
and its `nn.Linear` modules tell; the checkpoint still decides what exists. Only linears inside
numbered layers are meant: heads, embeddings, routers and vision or audio towers stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from irq_convert.artifact.config import module_name
from irq_convert.checkpoint.source import Checkpoint

_NUMBERED = re.compile(r"(^|\.)\d+\.")
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|shared_expert_gate)(\.|$)")
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image)([._]|$)")
_OTHER = re.compile(r"(embed|norm|wte|wpe|lm_head|position|relative_attention_bias)")
_SMALLEST = 16


@dataclass(frozen=True)
class Linears:
    """`tensors`: names to quantize. `modules_kept`: linear modules that are not.

    `decided_by` says how it was found out, for people.
    """

    tensors: frozenset[str]
    modules_kept: tuple[str, ...]
    decided_by: str


def find_linears(checkpoint: Checkpoint) -> Linears:
    """Decide which tensors of `checkpoint` are weights of linear layers."""
    modules, decided_by = _modules_of_class(checkpoint)
    if modules is None:
        names = [name for name in checkpoint.tensors if _looks_linear(checkpoint, name)]
        kept = [
            module_name(name)
            for name, info in checkpoint.tensors.items()
            if len(info.shape) == 2 and name.endswith(".weight") and name not in names
        ]
        return Linears(frozenset(names), tuple(sorted(kept)), decided_by)
    found = frozenset(
        f"{module}.weight"
        for module in modules
        if f"{module}.weight" in checkpoint.tensors and _is_inner(module)
    )
    kept = [module for module in modules if f"{module}.weight" not in found]
    return Linears(found, tuple(sorted(kept)), decided_by)


def _is_inner(module: str) -> bool:
    """Inside a numbered layer of the language model, and not a router."""
    return bool(_NUMBERED.search(module)) and not (_ROUTER.search(module) or _TOWER.search(module))


def _looks_linear(checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint.tensors[name].shape
    return (
        name.endswith(".weight")
        and len(shape) == 2
        and min(shape) >= _SMALLEST
        and _is_inner(module_name(name))
        and not _OTHER.search(name)
    )


def _modules_of_class(checkpoint: Checkpoint) -> tuple[list[str] | None, str]:
    """Names of the `nn.Linear` modules of the architecture, or None and why not."""
    names = (checkpoint.config or {}).get("architectures") or []
    if not names:
        return None, "names and shapes (config.json names no architecture)"
    import torch
    import transformers

    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None:
        return None, f"names and shapes (transformers does not know {names[0]})"
    try:
        config = architecture.config_class.from_dict(dict(checkpoint.config or {}))
        with torch.device("meta"):
            model = architecture(config)
    except Exception as error:  # any configuration may be wrong for its class in any way
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        return None, f"names and shapes ({names[0]} cannot be built: {reason})"
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return linears, f"the class {names[0]}"
