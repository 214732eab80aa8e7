"""Names of modules in the model and of tensors in the files, and which modules are linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact
from irq_convert.hf.empty_model import NoModel, ask_model
from irq_convert.hf.tied import tied_by_name


@dataclass(frozen=True)
class ModelNames:
    """What the model class, built on meta, knows of names; nothing where it is unknown.

    `tensors`: state-dict key to the tensor of the files. `linears`: linear layers, those of experts
    included where the files have one for each. `stacks`: packed stacks of experts, by key.
    `experts`: tensors of the files that hold experts, in any layout.
    `embeddings`: embedding layers. `kinds`: the class
    of each module. `tied`: keys that share their memory with another, `groups` those that share it
    with each other, where a class could be asked, and `absent` the names that files would have for
    those that they lack. `says_tied`: whether the configuration says so at its top. `renamed`: keys
    that were asked about and that the model has under another name, because they are of its base
    model, or of an older version of the class.
    """

    known: bool
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    linears: frozenset[str] = frozenset()
    stacks: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    groups: tuple[frozenset[str], ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    says_tied: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def key(self, key: str) -> str:
        """The model's name of `key`."""
        return self.renamed.get(key, key)

    def module(self, name: str) -> str:
        """The model's name of a module, by that of its weight."""
        return module_name(self.key(f"{name}.weight"))

    @property
    def inside(self) -> str | None:
        """The module that all of `renamed` are called as inside of; "" where none is renamed."""
        ends = {k.removesuffix(a) if k.endswith(f".{a}") else None for a, k in self.renamed.items()}
        found = (ends or {""}).pop() if len(ends) < 2 else None
        return None if found is None else found.removesuffix(".")

    def as_asked(self, module: str) -> str:
        """What whoever asked would call `module` of the model."""
        for asked, key in self.renamed.items():
            same = 0
            while asked[-1 - same :] == key[-1 - same :] and same < min(len(asked), len(key)):
                same += 1
            before, now = asked[: len(asked) - same], key[: len(key) - same]
            if module.startswith(now):
                return before + module[len(now) :]
        return module

    def tensor(self, key: str, files: Mapping[str, Any]) -> str | None:
        """The tensor of `files` that holds `key` of the model: of that very name, or renamed."""
        if key in files:
            return key
        key = self.key(key)
        found = self.tensors.get(key) or self.absent.get(key)
        return found if found in files else None


def model_names(artifact: Artifact, asked: Iterable[str] = ()) -> ModelNames:
    """Ask the class that config.json names; without one, linears are told by their shape.

    `asked` are keys of tensors that may be called as in the base model, or as the class was built
    before.
    """
    keys = tuple(asked)
    try:
        return ask_model(artifact.checkpoint.config, lambda model: _by_class(model, artifact, keys))
    except NoModel:
        return _by_name(artifact)


def tied_without_flag(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys that a model of `config`, which says that nothing is tied, has tied all the same.

    None where no class can be asked.
    """
    from irq_convert.hf.tied import tied_keys

    try:
        return ask_model(config, lambda model: frozenset(tied_keys(model)))
    except NoModel:
        return frozenset()


def _sources(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Source tensors and their shapes."""
    shapes = {tensor.name: tensor.source_shape for tensor in artifact.quantized}
    return shapes | {info.name: info.shape for info in artifact.copied}


def _by_class(model: Any, artifact: Artifact, asked: tuple[str, ...]) -> ModelNames:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from irq_convert.hf.experts import find_experts
    from irq_convert.hf.names import keys_in_model
    from irq_convert.hf.tied import tied_groups, tied_keys

    sources = _sources(artifact)
    tensors = {key: tensor for tensor, key in keys_in_model(model, sources).items()}
    modules = dict(model.named_modules())
    linears = {n for n, m in modules.items() if type(m) in (nn.Linear, Conv1D)}
    experts = find_experts(model, sources).found
    packed = {tensor.name for tensor in artifact.quantized}
    for found in experts.values():
        for part in (part for expert in found.parts for part in expert):
            layer = f"{found.weight.module}.{part.child}"
            tensors[f"{layer}.weight"] = part.tensor
            linears.add(layer)
    known = {*model.state_dict(), *tensors}
    places = keys_in_model(model, [key for key in asked if key not in known])
    tied = tied_keys(model)
    lacking = keys_in_model(model, [key for key in tied if key not in tensors])
    return ModelNames(
        known=True,
        tensors=tensors,
        kinds={name: type(module).__name__ for name, module in modules.items()},
        linears=frozenset(n for n in linears if f"{n}.weight" in tensors),
        experts=frozenset(name for found in experts.values() for name in found.tensors),
        stacks=frozenset(key for key, found in experts.items() if found.whole in packed),
        embeddings=frozenset(n for n, m in modules.items() if isinstance(m, nn.Embedding)),
        tied=frozenset(tied),
        groups=tied_groups(model),
        absent={key: name for name, key in lacking.items() if key == name},
        says_tied=bool(model.config.to_dict().get("tie_word_embeddings")),
        renamed={asked: key for asked, key in places.items() if key in known and key != asked},
    )


def _by_name(artifact: Artifact) -> ModelNames:
    linears = {module_name(tensor.name) for tensor in artifact.quantized}
    tied = tied_by_name(artifact.checkpoint.config, _sources(artifact))
    return ModelNames(known=False, linears=frozenset(linears), tied=frozenset(tied))
