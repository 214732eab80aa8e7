"""One layer of an adapter, or some trained rows, and the artifact's tensor that they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter, StoredLayer, read_layer
from irq_convert.artifact.adapter_tokens import StoredTokens
from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import StoredTensor
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import ModelNames

_BYPASSED = ("NonDynamicallyQuantizableLinear",)
"""Layers of `nn.MultiheadAttention`, on which an adapter has no effect."""


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


def find_tensor(
    adapter: StoredAdapter, key: str, names: ModelNames, files: Mapping[str, Any]
) -> str:
    """The tensor of the artifact for state-dict key `key`, if it may be changed.

    Raises `IrqError` where there is none, and where it is tied by all that can be known.
    """
    name = names.tensor(key, files)
    if not names.known and (key in names.tied or name in names.tied):
        raise IrqError(
            f"{adapter.folder}: changes {key}, which the model ties to another weight, so that a "
            "merge would change both: train without it"
        )
    if name is None:
        keys = {k for group in names.groups if names.key(key) in group for k in group}
        shared = sorted(found for k in keys if (found := names.tensor(k, files)) is not None)
        if shared:
            raise IrqError(
                f"{adapter.folder}: changes {key}, which the model ties to {shared[0]}, quantized "
                "in the artifact, so that a merge would change both: train without it"
            )
        raise IrqError(
            f"{adapter.folder}: is for {module_name(key)}, which the artifact does not have: it "
            "belongs to another model"
        )
    return name


def match_layer(
    adapter: StoredAdapter, layer: StoredLayer, names: ModelNames, files: Mapping[str, Any]
) -> Adapted:
    """The layer on the tensor that it changes.

    Raises `IrqError` for one that the artifact lacks, of another kind or of another shape.
    """
    tensor = find_tensor(adapter, f"{layer.module}.weight", names, files)
    found = files[tensor]
    if layer.embedding:
        return _match_embedding(adapter, layer, tensor, names, found)
    kind = names.kinds.get(names.module(layer.module), "Linear")
    turned = isinstance(found, StoredTensor) and found.format.transposed
    if kind in _BYPASSED and _is_zero(adapter, layer):
        kind = "Linear"  # its model reads the weight and not the layer: nothing was learned
    if kind != ("Conv1D" if turned else "Linear"):
        raise IrqError(
            f"{adapter.folder}: adapts {layer.module}, a module {kind} as a linear layer: only "
            "linear layers and embeddings are merged, and Conv1D ones where they are quantized"
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


def _match_embedding(
    adapter: StoredAdapter,
    layer: StoredLayer,
    tensor: str,
    names: ModelNames,
    found: StoredTensor | TensorInfo,
) -> Adapted:
    module = names.module(layer.module)
    if names.known and module not in names.embeddings:
        kind = names.kinds.get(module, "module that it does not have")
        raise IrqError(
            f"{adapter.folder}: adapts {layer.module} as an embedding, but it is a {kind} of the "
            "model: it belongs to another one"
        )
    shape = _dense_matrix(adapter, tensor, found, "adapts")
    rows, cols = shape
    wanted = ((layer.rank, rows), (cols, layer.rank))
    if (layer.a.shape, layer.b.shape) != wanted:
        raise IrqError(
            f"{layer.a.shard.name}: {layer.module} has A {list(layer.a.shape)} and B "
            f"{list(layer.b.shape)}, but {tensor} is [{rows}, {cols}] and needs {list(wanted[0])} "
            f"and {list(wanted[1])}: it belongs to another model"
        )
    return Adapted(layer, tensor, rows, cols, None)


def match_tokens(
    adapter: StoredAdapter, tokens: StoredTokens, names: ModelNames, files: Mapping[str, Any]
) -> str:
    """The tensor of which `tokens` are rows.

    Raises `IrqError` for one that the artifact lacks or has packed, and for rows that it has not.
    """
    tensor = find_tensor(adapter, f"{tokens.module}.weight", names, files)
    rows, cols = _dense_matrix(adapter, tensor, files[tensor], "has trained rows of")
    width, last = tokens.rows.shape[1], max(tokens.indices, default=-1)
    if width != cols or last >= rows:
        raise IrqError(
            f"{tokens.rows.shard.name}: {tokens.rows.name} {list(tokens.rows.shape)} has token "
            f"{last}, but {tensor} is [{rows}, {cols}]: it belongs to another model"
        )
    if module_name(tensor) + ".bias" in files:
        raise IrqError(
            f"{adapter.folder}: has trained rows of {tensor}, whose bias PEFT leaves out there: "
            "train without it"
        )
    return tensor


def _dense_matrix(
    adapter: StoredAdapter, tensor: str, found: StoredTensor | TensorInfo, what: str
) -> tuple[int, ...]:
    """The shape of a matrix of floating-point numbers that is not packed."""
    if isinstance(found, StoredTensor):
        raise IrqError(f"{adapter.folder}: {what} {tensor}, which is quantized in the artifact")
    if len(found.shape) != 2 or found.dtype not in FLOATS:
        raise IrqError(
            f"{adapter.folder}: {what} {tensor} {found.dtype} {list(found.shape)}, which is no "
            "matrix of floating-point numbers"
        )
    return found.shape


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
