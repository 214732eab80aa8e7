"""Which tensors are the weights of linear layers: by the model's class, or by name and shape.

Nothing is loaded. Where transformers knows the architecture, the model is built on the meta device
and its `nn.Linear` and `Conv1D` modules and its experts tell; the checkpoint still decides what
exists. Only linears inside numbered layers are meant: routers and what a class wants in full
precision stay as they are, and unless asked for heads, embeddings, vision and audio towers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from irq_convert.artifact.config import module_name
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import UsageError
from irq_convert.hf.empty_model import NoModel, ask_model

_NUMBERED = re.compile(r"(^|\.)\d+\.")
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|shared_expert_gate)(\.|$)")
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image)([._]|$)")
_OTHER = re.compile(r"(embed|norm|wte|wpe|lm_head|position|relative_attention_bias)")
_EMBEDDING = re.compile(r"(embed|wte|wpe|lm_head|(^|\.)head\.|(^|\.)output\.weight$)")
EMBEDDINGS = "embeddings and heads (--include-embeddings quantizes them)"
OTHER_TABLES = "other embeddings than those of the input"
TOWERS = "vision and audio towers (--include-towers quantizes them)"
SMALL = "norms, biases, routers and other tensors that are no linear layers"
_SMALLEST = 16
_HEAD = "lm_head"


@dataclass(frozen=True)
class Linears:
    """`tensors`: names to quantize. `modules_kept`: linear modules that are not.

    Both speak the checkpoint's names; a module without a tensor of its own, such as a tied head,
    has the model's. `decided_by` says how it was found out, for people. `transposed` are those of
    `tensors` that keep their inputs in the last dimension but one. `reasons` says of tensors that
    stay dense why, where their name alone does not (`why_kept`). `tables` are those of `tensors`
    that are asked for embeddings and heads, each with the modules whose weight it is; `left` says
    of embeddings and heads that were asked for why they stay dense. `apart`: the class ties them
    and the files have each, so that config.json has to untie what is quantized.
    """

    tensors: frozenset[str]
    modules_kept: tuple[str, ...]
    decided_by: str
    transposed: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    def why_kept(self, tensor: str) -> str:
        """In words, why `tensor` is not quantized."""
        known = self.reasons.get(tensor)
        return known or (EMBEDDINGS if _EMBEDDING.search(tensor) else SMALL)


def find_linears(
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, TensorInfo],
    include_towers: bool = False,
    include_embeddings: bool = False,
) -> Linears:
    """Decide which of a checkpoint's `tensors` are weights of linear layers; `config` is its own.

    Those of vision and audio towers only with `include_towers`, input embeddings and output heads
    only with `include_embeddings`. Raises `UsageError` where no class can be asked for the latter.
    """

    def ask(model: Any) -> Linears:
        return linears_of(model, tensors, include_towers, include_embeddings)

    try:
        return ask_model(config, ask)
    except NoModel as no_model:
        if include_embeddings:
            raise UsageError(
                f"--include-embeddings needs a class that says which they are ({no_model}): "
                "leave it out"
            ) from no_model
        return _by_name(tensors, str(no_model), include_towers)


def linears_of(
    model: Any,
    tensors: Mapping[str, TensorInfo],
    include_towers: bool = False,
    include_embeddings: bool = False,
) -> Linears:
    """`find_linears` of a model at hand, on meta; the files may call its modules otherwise."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from irq_convert.hf.experts import find_experts
    from irq_convert.hf.names import keys_in_model
    from irq_convert.hf.tables import Tables, find_tables

    kinds = {name: type(module) for name, module in model.named_modules()}
    stored = {module_name(key): tensor for tensor, key in keys_in_model(model, tensors).items()}
    sort = _Sorter(model, tensors, include_towers)
    tables = find_tables(model, stored, _precise(model)) if include_embeddings else Tables()
    sort.found.update(tables.tensors)
    if include_embeddings:
        other = (tensor for tensor in tensors if _EMBEDDING.search(tensor))
        sort.reasons = dict.fromkeys(other, OTHER_TABLES) | sort.reasons
    for module, kind in kinds.items():
        if kind not in (torch.nn.Linear, Conv1D) or module in tables.modules:
            continue
        tensor = stored.get(module)
        if tensor is None:
            sort.kept.append(module)
        else:
            sort.add(module, tensor, transposed=kind is Conv1D)
    experts = find_experts(model, {name: info.shape for name, info in tensors.items()})
    for found in experts.found.values():
        for tensor in found.tensors:
            sort.add(found.weight.module, tensor, found.transposed)
    for tensor, why in experts.unknown.items():
        sort.kept.append(module_name(tensor))
        sort.reasons[tensor] = f"experts ({why})" if "expert" in tensor else why
    return Linears(
        frozenset(sort.found),
        tuple(sorted(sort.kept)),
        f"the class {type(model).__name__}",
        frozenset(sort.transposed),
        sort.reasons | {t: f"embeddings and heads ({why})" for t, why in tables.reasons.items()},
        tables.tensors,
        tables.reasons,
        tables.apart,
    )


class _Sorter:
    """Sorts weights of linear layers into those to quantize and those to keep."""

    def __init__(self, model: Any, tensors: Mapping[str, TensorInfo], include_towers: bool) -> None:
        self._tensors = tensors
        self._precise = _precise(model)
        self._towers = () if include_towers else _tower_prefixes(model)
        self._include_towers = include_towers
        self.found: set[str] = set()
        self.transposed: set[str] = set()
        self.kept: list[str] = []
        self.reasons: dict[str, str] = {}
        for tensor in () if include_towers else tensors:
            if self._in_tower(tensor):
                self.reasons[tensor] = TOWERS

    def _in_tower(self, name: str) -> bool:
        return bool(_TOWER.search(name)) or name.startswith(self._towers)

    def add(self, module: str, tensor: str, transposed: bool) -> None:
        """`tensor` of the files is the weight of `module` of the model, or a part of it."""
        names = (module, module_name(tensor))
        if not self._include_towers and any(map(self._in_tower, names)):
            self.reasons[tensor] = TOWERS
        elif (
            all(_is_inner(name, include_towers=True) for name in names)
            and not self._precise.search(f"{module}.weight")
            and self._tensors[tensor].numel
        ):
            self.found.add(tensor)
            if transposed:
                self.transposed.add(tensor)
            return
        self.kept.append(module_name(tensor))


def _tower_prefixes(model: Any) -> tuple[str, ...]:
    """Names, with a dot, of models inside `model` that neither are nor hold its language model."""
    from transformers import PreTrainedModel

    inner = {n: m for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel)}
    text = type(model.config.get_text_config())
    language = [name for name, module in inner.items() if type(module.config) is text]
    if not language:
        return ()
    return tuple(
        f"{name}."
        for name in inner
        if not any(
            f"{each}.".startswith(f"{name}.") or name.startswith(f"{each}.") for each in language
        )
    )


def _precise(model: Any) -> re.Pattern[str]:
    """What the class asks to keep in float32; its code may look at the dtype of such a weight."""
    lists = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    names = sorted({name for found in lists for name in found or ()})
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names) or "(?!)")


def _by_name(tensors: Mapping[str, TensorInfo], why: str, include_towers: bool) -> Linears:
    found = frozenset(n for n, info in tensors.items() if _looks_linear(n, info, include_towers))
    kept = {
        module_name(name)
        for name, info in tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight") and name not in found
    }
    # A head tied to the embedding has no tensor, and a loader must still leave it alone.
    towers = () if include_towers else tuple(name for name in tensors if _TOWER.search(name))
    return Linears(
        found,
        tuple(sorted({*kept, _HEAD})),
        f"names and shapes ({why})",
        reasons=dict.fromkeys(towers, TOWERS),
    )


def _is_inner(module: str, include_towers: bool) -> bool:
    """Inside a numbered layer, of the language model unless towers are meant; no router."""
    if not include_towers and _TOWER.search(module):
        return False
    return bool(_NUMBERED.search(module)) and not _ROUTER.search(module)


def _looks_linear(name: str, info: TensorInfo, include_towers: bool) -> bool:
    return (
        name.endswith(".weight")
        and len(info.shape) == 2
        and min(info.shape) >= _SMALLEST
        and _is_inner(module_name(name), include_towers)
        and not _OTHER.search(name)
    )
