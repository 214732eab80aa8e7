"""Names of modules in the model and of tensors in the files, and which modules are linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact

_TIED_WORDS = ("embed", "lm_head", "wte")


@dataclass(frozen=True)
class ModelNames:
    """What the model class, built on meta, knows of names; nothing where it is unknown.

    `tensors`: state-dict key to the tensor of the files. `linears`: linear layers, those of experts
    included where the files have one for each. `kinds`: the class of each module. `tied`: keys that
    share their memory with another.
    """

    known: bool
    tensors: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    linears: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()

    def tensor(self, key: str, files: Mapping[str, Any]) -> str | None:
        """The tensor of `files` that holds `key` of the model: of that very name, or renamed."""
        if key in files:
            return key
        found = self.tensors.get(key)
        return found if found in files else None


def model_names(artifact: Artifact) -> ModelNames:
    """Ask the class that config.json names; without one, linears are told by their shape."""
    config = dict(artifact.checkpoint.config or {})
    config.pop("quantization_config", None)
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(name, str):
        import transformers

        architecture = getattr(transformers, name, None)
        if architecture is not None:
            try:
                return _by_class(architecture, config, artifact)
            except Exception:  # a configuration may not fit its class in any way
                pass
    return _by_name(artifact, config)


def _sources(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Source tensors and their shapes."""
    shapes = {tensor.name: tensor.source_shape for tensor in artifact.quantized}
    return shapes | {info.name: info.shape for info in artifact.copied}


def _by_class(architecture: Any, config: dict[str, Any], artifact: Artifact) -> ModelNames:
    import torch
    from transformers.pytorch_utils import Conv1D

    from irq_convert.convert.linears import _silence
    from irq_convert.hf.experts import find_experts
    from irq_convert.hf.names import keys_in_model, tied_keys

    with _silence(), torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(config))
    sources = _sources(artifact)
    tensors = {key: tensor for tensor, key in keys_in_model(model, sources).items()}
    modules = dict(model.named_modules())
    linears = {n for n, m in modules.items() if type(m) in (torch.nn.Linear, Conv1D)}
    for found in find_experts(model, sources).found.values():
        for part in (part for expert in found.parts for part in expert):
            layer = f"{found.weight.module}.{part.child}"
            tensors[f"{layer}.weight"] = part.tensor
            linears.add(layer)
    return ModelNames(
        known=True,
        tensors=tensors,
        kinds={name: type(module).__name__ for name, module in modules.items()},
        linears=frozenset(n for n in linears if f"{n}.weight" in tensors),
        tied=frozenset(tied_keys(model)),
    )


def _by_name(artifact: Artifact, config: Mapping[str, Any]) -> ModelNames:
    tied: set[str] = set()
    if config.get("tie_word_embeddings") is True:
        names = _sources(artifact)
        tied = {name for name in names if any(word in name for word in _TIED_WORDS)}
    linears = {module_name(tensor.name) for tensor in artifact.quantized}
    return ModelNames(known=False, linears=frozenset(linears), tied=frozenset(tied))
