"""Which tensors are the weights of linear layers: by the model's class, or by name and shape.

Nothing is loaded. Where transformers knows the architecture, the model is built on the meta device
and its `nn.Linear` modules tell; the checkpoint still decides what exists. Only linears inside
numbered layers are meant: heads, embeddings, routers, vision or audio towers, and what a class
wants in full precision, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from irq_convert.artifact.config import module_name
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.source import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBERED = re.compile(r"(^|\.)\d+\.")
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|shared_expert_gate)(\.|$)")
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image)([._]|$)")
_OTHER = re.compile(r"(embed|norm|wte|wpe|lm_head|position|relative_attention_bias)")
_SMALLEST = 16
_HEAD = "lm_head"


@dataclass(frozen=True)
class Linears:
    """`tensors`: names to quantize. `modules_kept`: linear modules that are not.

    Both speak the checkpoint's names; a module without a tensor of its own, such as a tied head,
    has the model's. `decided_by` says how it was found out, for people.
    """

    tensors: frozenset[str]
    modules_kept: tuple[str, ...]
    decided_by: str


def find_linears(checkpoint: Checkpoint) -> Linears:
    """Decide which tensors of `checkpoint` are weights of linear layers."""
    config = checkpoint.config or {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        return _by_name(checkpoint.tensors, "config.json names no architecture")
    import transformers

    architecture = getattr(transformers, name, None)
    if architecture is None:
        return _by_name(checkpoint.tensors, f"transformers does not know {name}")
    try:
        with _silence():
            return _by_class(architecture, config, checkpoint.tensors)
    except Exception as error:  # any configuration may be wrong for its class in any way
        lines = str(error).split("\n")
        reason = lines[0][:80] or type(error).__name__
        return _by_name(checkpoint.tensors, f"{name} cannot be built: {reason}")


def _by_class(
    architecture: Any, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Linears:
    """Ask the class, built without memory; what the files call a module may differ from it."""
    import torch

    from irq_convert.hf.names import keys_in_model

    with torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(dict(config)))
    modules = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    stored = {module_name(key): tensor for tensor, key in keys_in_model(model, tensors).items()}
    precise = _precise(model)
    found, kept = set(), []
    for module in modules:
        tensor = stored.get(module)
        if tensor is None:
            kept.append(module)
        elif (
            _is_inner(module)
            and _is_inner(module_name(tensor))
            and not precise.search(f"{module}.weight")
            and tensors[tensor].numel
        ):
            found.add(tensor)
        else:
            kept.append(module_name(tensor))
    return Linears(frozenset(found), tuple(sorted(kept)), f"the class {architecture.__name__}")


def _precise(model: Any) -> re.Pattern[str]:
    """What the class asks to keep in float32; its code may look at the dtype of such a weight."""
    lists = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    names = sorted({name for found in lists for name in found or ()})
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names) or "(?!)")


def _by_name(tensors: Mapping[str, TensorInfo], why: str) -> Linears:
    found = frozenset(name for name, info in tensors.items() if _looks_linear(name, info))
    kept = {
        module_name(name)
        for name, info in tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight") and name not in found
    }
    # A head tied to the embedding has no tensor, and a loader must still leave it alone.
    return Linears(found, tuple(sorted({*kept, _HEAD})), f"names and shapes ({why})")


def _is_inner(module: str) -> bool:
    """Inside a numbered layer of the language model, and not a router."""
    return bool(_NUMBERED.search(module)) and not (_ROUTER.search(module) or _TOWER.search(module))


def _looks_linear(name: str, info: TensorInfo) -> bool:
    return (
        name.endswith(".weight")
        and len(info.shape) == 2
        and min(info.shape) >= _SMALLEST
        and _is_inner(module_name(name))
        and not _OTHER.search(name)
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from warning about configurations: nothing is going to be run."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
