"""Adapter and artifact laid side by side: every key used, every target found, every shape right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter, StoredLayer, read_layer
from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact, StoredTensor
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.model_names import ModelNames, model_names
from irq_convert.jobs.merge.beside import Vocabulary, match_whole

_BYPASSED = ("NonDynamicallyQuantizableLinear",)
"""Layers of `nn.MultiheadAttention`, on which an adapter has no effect."""
SHORT = 12
"""Letters of a hash that a message shows."""


@dataclass(frozen=True)
class Adapted:
    """One layer of the adapter on the tensor that it changes, `[rows, cols]`.

    `block_size` is that of the pooling, None for an adapter that sees the input itself.
    """

    layer: StoredLayer
    tensor: str
    rows: int
    cols: int
    block_size: int | None


@dataclass(frozen=True)
class Match:
    """By tensor of the artifact: layers that change it, and saved tensors that take its place.

    `bases` are what layers are added to instead of the artifact's tensor, where `vocabulary` has
    another size than the artifact's. `inside` is the module that the adapter's names begin in, ""
    for the model itself; None where names are otherwise.
    """

    layers: Mapping[str, Adapted]
    saved: Mapping[str, TensorInfo]
    bases: Mapping[str, TensorInfo] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    inside: str | None = ""

    @property
    def rows(self) -> int | None:
        """Size of the vocabulary, where it is another than the artifact's."""
        return None if self.vocabulary is None else self.vocabulary.new


def check_base(
    adapter: StoredAdapter, identity: str, manifest: Mapping[str, Any] | None, any_base: bool
) -> None:
    """Refuse an adapter that belongs to another artifact, or that has been merged already.

    Raises `UsageError`; with `any_base` only for an adapter that this artifact already holds.
    """
    source = {} if manifest is None else manifest["source"]
    merged = source.get("adapters")
    for entry in merged if isinstance(merged, list) else ():
        if isinstance(entry, dict) and entry.get("sha256") == adapter.sha256:
            raise UsageError(
                f"{adapter.folder}: merged already: the artifact {identity[:SHORT]} is the result "
                f"of merging the adapter {adapter.sha256[:SHORT]}"
            )
    recorded = adapter.config.base_sha256
    if any_base or recorded == identity:
        return
    if recorded is None:
        raise UsageError(
            f"{adapter.folder}: does not say which base it was trained on; if it is the artifact "
            f"{identity[:SHORT]}, add --any-base"
        )
    raise UsageError(
        f"{adapter.folder}: trained on the artifact {recorded[:SHORT]}, this one is "
        f"{identity[:SHORT]}; give the one it was trained on (--any-base merges all the same)"
    )


def match(artifact: Artifact, adapter: StoredAdapter) -> Match:
    """Find what every tensor of `adapter` changes.

    Raises `IrqError`, naming module, tensor and shapes, for a module that the artifact lacks, one
    of the wrong shape, two for one tensor, a tied tensor, a layer that is no linear one, and a
    linear layer that the adapter's settings target and its file leaves out.
    """
    keys = (f"{module}.weight" for module in adapter.layers)
    names = model_names(artifact, (*keys, *adapter.saved, *adapter.bases))
    quantized = {tensor.name: tensor for tensor in artifact.quantized}
    copied = {info.name: info for info in artifact.copied}
    files: dict[str, Any] = {**quantized, **copied}
    whole = match_whole(artifact, adapter, names, files)
    files |= whole.bases
    layers: dict[str, Adapted] = {}
    for layer in adapter.layers.values():
        found = _adapted(adapter, layer, names, files)
        if found.tensor in layers:
            raise IrqError(
                f"{adapter.folder}: {layer.module} and {layers[found.tensor].layer.module} both "
                f"stand for {found.tensor}: the adapter is damaged"
            )
        if found.tensor in whole.saved:
            raise IrqError(
                f"{adapter.folder}: {found.tensor} is both adapted and saved whole: damaged"
            )
        layers[found.tensor] = found
    _check_complete(adapter, names)
    return Match(layers, whole.saved, whole.bases, whole.vocabulary, names.inside)


def _check_complete(adapter: StoredAdapter, names: ModelNames) -> None:
    """Refuse an adapter whose settings name what the model has and the file has not."""
    there = {names.module(module) for module in adapter.layers}
    missing = [
        asked
        for module in sorted(names.linears - there)
        if adapter.config.targets(asked := names.as_asked(module))
    ]
    what = "target_modules"
    if not missing:
        what = "modules_to_save"
        missing = [
            wanted
            for wanted in adapter.config.modules_to_save
            if any(f".{module}".endswith(f".{wanted}") for module in names.kinds)
            and not any(adapter.config.is_saved(key, wanted) for key in adapter.saved)
        ]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise IrqError(
            f"{adapter.folder}: {what} names {missing[0]}{more}, but its file holds "
            "nothing for it: the adapter is incomplete: save or download it again"
        )


def _find(adapter: StoredAdapter, key: str, names: ModelNames, files: Mapping[str, Any]) -> str:
    """The tensor of the artifact for state-dict key `key`, if it may be changed."""
    name = names.tensor(key, files)
    if names.key(key) in names.tied or name in names.tied:
        raise IrqError(
            f"{adapter.folder}: changes {key}, which the model ties to another weight, so that a "
            "merge would change both: train without it"
        )
    if name is None:
        raise IrqError(
            f"{adapter.folder}: is for {module_name(key)}, which the artifact does not have: it "
            "belongs to another model"
        )
    return name


def _adapted(
    adapter: StoredAdapter, layer: StoredLayer, names: ModelNames, files: Mapping[str, Any]
) -> Adapted:
    tensor = _find(adapter, f"{layer.module}.weight", names, files)
    found = files[tensor]
    kind = names.kinds.get(names.module(layer.module), "Linear")
    turned = isinstance(found, StoredTensor) and found.format.transposed
    if kind in _BYPASSED and _is_zero(adapter, layer):
        kind = "Linear"  # its model reads the weight and not the layer: nothing was learned
    if kind != ("Conv1D" if turned else "Linear"):
        raise IrqError(
            f"{adapter.folder}: adapts {layer.module}, a {kind}: only linear layers are merged, "
            "and Conv1D ones where they are quantized"
        )
    shape = found.stored_shape if isinstance(found, StoredTensor) else found.shape
    if len(shape) != 2 or not (isinstance(found, StoredTensor) or found.dtype in FLOATS):
        stored = "" if isinstance(found, StoredTensor) else f" {found.dtype}"
        raise IrqError(
            f"{adapter.folder}: adapts {tensor}{stored} {list(shape)}, which is no matrix of "
            "floating-point numbers"
        )
    rows, cols = shape
    block_size = _block_size(adapter, tensor, found)
    inputs = cols if block_size is None else -(-cols // block_size)
    wanted = ((layer.rank, inputs), (rows, layer.rank))
    if (layer.a.shape, layer.b.shape) != wanted:
        pooled = "" if block_size is None else f" in blocks of {block_size}"
        raise IrqError(
            f"{layer.a.shard.name}: {layer.module} has A {list(layer.a.shape)} and B "
            f"{list(layer.b.shape)}, but {tensor} is [{rows}, {cols}]{pooled} and needs "
            f"{list(wanted[0])} and {list(wanted[1])}: it belongs to another model"
        )
    return Adapted(layer, tensor, rows, cols, block_size)


def _is_zero(adapter: StoredAdapter, layer: StoredLayer) -> bool:
    """Whether `layer` changes nothing, as one that training never reached."""
    with TileReader() as reader:
        values = read_layer(reader, adapter.config, layer)
    return not bool(values.b.any()) and values.beta[1] == 0


def _block_size(
    adapter: StoredAdapter, tensor: str, found: StoredTensor | TensorInfo
) -> int | None:
    """Of the pooling: a quantized layer's own, for others what the settings say."""
    config = adapter.config
    if not config.pooled:
        return None
    own = found.format.block_size if isinstance(found, StoredTensor) else config.block_size
    if own is None:
        raise IrqError(
            f"{adapter.folder}: pools the inputs of {tensor}, which is not quantized, and its "
            "settings have no block_size: the adapter is damaged"
        )
    if config.block_size not in (None, own):
        raise IrqError(
            f"{adapter.folder}: pools blocks of {config.block_size}, but {tensor} has blocks of "
            f"{own}: it belongs to another artifact"
        )
    return own


def check_folded_targets(artifact: Artifact, adapter: StoredAdapter, match: Match) -> None:
    """Refuse what stock PEFT would load as something else: it rewrites targets of some mixtures.

    Raises `UsageError` for a layer that it would take for a stack of experts, by its name.
    """
    from types import SimpleNamespace

    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config: Any = artifact.checkpoint.config or {}
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=config.get("model_type")))

    def rewritten(modules: list[str]) -> bool:
        plain = LoraConfig(target_modules=modules)
        try:
            convert_peft_config_for_transformers(plain, model=model, conversions=None)
        except ValueError:  # half of what it would stack
            return True
        return bool(plain.target_parameters)

    modules = [found.layer.module for found in match.layers.values()]
    if rewritten(modules):
        taken = next((name for name in modules if rewritten([name])), modules[0])
        raise UsageError(
            f"{adapter.folder}: adapts {taken}, which PEFT would take for a part of stacked "
            "experts when it loads a plain LoRA: merge --to dense"
        )
