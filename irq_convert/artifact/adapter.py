"""An adapter folder as it lies on the disk: read and checked without PEFT and without a model.

`adapter_config.json` says what the adapter computes, `adapter_model.safetensors` holds its
matrices; formats/irq-adapter-v1.md is the authority. Only headers are read here, and everything
that this program would not merge is refused by name: an adapter is used whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from irq_convert.artifact.adapter_beside import Beside, is_embedding
from irq_convert.artifact.adapter_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredConfig,
    read_config,
)
from irq_convert.artifact.adapter_kinds import IEC_LORA, LORA
from irq_convert.artifact.adapter_statistics import (
    StoredStatistics,
    moved_weight,
    stored_statistics,
)
from irq_convert.artifact.adapter_tokens import ROWS, StoredTokens, require_tokens, stored_tokens
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.system import os_errors, require_utf8
from irq_convert.errors import IrqError, UsageError

if TYPE_CHECKING:
    import torch

    from irq_convert.checkpoint.reader import TileReader

PREFIX = "base_model.model."
BETA = "lora_iec_beta"
"""What the betas of a layer are called in an adapter's file."""
_A, _B, _BETA = ".lora_A.weight", ".lora_B.weight", f".{BETA}"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_DAMAGED = "the adapter is damaged: save or download it again"
_PACKED = (
    "of the model's own packed embedding or head, which PEFT saved besides: save the adapter with "
    "save_embedding_layers=False, as it is"
)
_KINDS = {
    "lora_magnitude_vector": "DoRA, which changes the weight's direction and length",
    "lora_embedding_": "a LoRA of an embedding in an adapter of another type than LORA",
    "lora_A.bias": "a bias of LoRA",
    "lora_B.bias": "a bias of LoRA",
    "lora_irq_": "a move of statistics in an adapter that has none",
    "token_adapter": "trainable tokens of a module that is no embedding or head",
    ".weight_scale": _PACKED,
    ".weight_tau": _PACKED,
}


@dataclass(frozen=True)
class StoredLayer:
    """One adapted module: A `[rank, inputs or blocks]`, B `[out, rank]`, beta `[2]` or None.

    `scaling` is alpha / rank, or alpha / sqrt(rank) for rsLoRA. Of an `embedding` A is
    `[rank, tokens]` and B `[width, rank]`: what they add is the transpose of their product.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    beta: TensorInfo | None
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class StoredAdapter:
    """An opened adapter.

    `layers` by module name, and what PEFT saves beside them: `saved` are whole tensors, of
    `modules_to_save` or of embeddings, by their name in the model; `again` second copies of those;
    `bases` the tensors under adapted embeddings and heads. `tokens` are rows that were trained
    alone, by module, `statistics` what moves scale and tau of packed weights, by key. `sha256` is
    its identity (`adapter_identity`).
    """

    folder: Path
    config: StoredConfig
    layers: Mapping[str, StoredLayer]
    saved: Mapping[str, TensorInfo]
    sha256: str
    again: Mapping[str, TensorInfo] = field(default_factory=dict)
    bases: Mapping[str, TensorInfo] = field(default_factory=dict)
    tokens: Mapping[str, StoredTokens] = field(default_factory=dict)
    statistics: Mapping[str, StoredStatistics] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        parts = [part for each in self.layers.values() for part in (each.a, each.b, each.beta)]
        parts += [part for each in self.statistics.values() for part in each.parts]
        return sum(info.nbytes for info in (*parts, *self.whole) if info is not None)

    @property
    def whole(self) -> list[TensorInfo]:
        """Tensors that are no A, B or beta, each once."""
        rows = [each.rows for each in self.tokens.values()]
        return [*self.saved.values(), *self.bases.values(), *rows]


def open_adapter(folder: Path | str) -> StoredAdapter:
    """Open the adapter in `folder` and check everything that its header and settings can tell.

    Raises `UsageError` when it is no LoRA or IEC-LoRA adapter or asks for something that cannot be
    merged, and `IrqError`, naming the key, when the file is damaged, lacks half of a pair, has a
    tensor of the wrong shape, or holds one that no rule accounts for.
    """
    folder = Path(folder)
    with os_errors("look at it", folder):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give the folder of an adapter")
        found = {path.name for path in folder.iterdir()}
    require_utf8(folder, folder.resolve().name)
    if CONFIG_FILE not in found:
        raise UsageError(f"{folder}: not an adapter: it has no {CONFIG_FILE}")
    config = read_config(folder)
    if WEIGHTS_FILE not in found:
        pickled = "adapter_model.bin" in found
        why = "only pickled weights, which are not opened" if pickled else f"no {WEIGHTS_FILE}"
        raise IrqError(f"{folder}: {why}; save the adapter again as safetensors")
    tensors = read_header(folder / WEIGHTS_FILE).tensors
    layers, statistics, beside, tokens = _sort(config, tensors)
    if not (layers or statistics or beside.saved or tokens):
        raise IrqError(f"{folder / WEIGHTS_FILE}: holds no tensor: {_DAMAGED}")
    return StoredAdapter(
        folder,
        config,
        layers,
        beside.saved,
        adapter_identity(folder),
        beside.again,
        beside.bases,
        tokens,
        statistics,
    )


def adapter_identity(folder: Path) -> str:
    """SHA-256 over the checksums of the two files that make an adapter, in hexadecimal.

    The lines `<file>\\t<sha256 of the file>\\n` of `adapter_config.json` and
    `adapter_model.safetensors`, in this order (formats/irq-adapter-v1.md). Raises `IrqError` when
    one cannot be read.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(f"{name}\t{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def _sort(
    config: StoredConfig, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, StoredLayer], dict[str, StoredStatistics], Beside, dict[str, StoredTokens]]:
    """Every tensor of the file to its layer, its statistics, what is saved beside, or tokens."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    moves: dict[str, dict[str, TensorInfo]] = {}
    tokens: dict[str, StoredTokens] = {}
    beside = Beside()
    ends: tuple[str, ...] = (_A, _B, _BETA)
    if config.peft_type == LORA:
        ends += (_EMBEDDING_A, _EMBEDDING_B)
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        suffix = next((end for end in ends if name.endswith(end)), None)
        if name == key:
            raise IrqError(f"{_where(info)}: does not begin with {PREFIX}: not a tensor of PEFT's")
        moved = moved_weight(name)
        if moved is not None and config.statistics is not None:
            moves.setdefault(moved[0], {})[moved[1]] = info
        elif suffix is not None:
            modules.setdefault(name.removesuffix(suffix), {})[suffix] = info
        elif name.endswith(ROWS) and is_embedding(f"{name.removesuffix(ROWS)}.weight"):
            module = name.removesuffix(ROWS)
            tokens[module] = stored_tokens(config.raw, module, info)
        elif not beside.add(config, name, info):
            raise IrqError(f"{_where(info)}: {_unknown(key)}: it cannot be merged")
    layers = {module: _layer(config, module, parts) for module, parts in sorted(modules.items())}
    statistics = {
        weight: stored_statistics(config.statistics, weight, parts)
        for weight, parts in sorted(moves.items())
    }
    beside.check(config, {*layers, *tokens})
    require_tokens(config.raw, tokens)
    return layers, statistics, beside, tokens


def _where(info: TensorInfo) -> str:
    return f"{info.shard.name}: {info.name} {info.dtype} {list(info.shape)}"


def _unknown(key: str) -> str:
    for part, words in _KINDS.items():
        if part in key:
            return words
    return "neither A, B or beta of a LoRA layer nor a tensor of modules_to_save"


def _layer(config: StoredConfig, module: str, parts: Mapping[str, TensorInfo]) -> StoredLayer:
    connected = config.peft_type == IEC_LORA and config.connection != "none"
    embedding = _EMBEDDING_A in parts or _EMBEDDING_B in parts
    first, second = (_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)
    wanted = {first, second, _BETA} if connected else {first, second}
    for suffix in sorted(wanted - set(parts)):
        rest = min(parts.values(), key=lambda info: info.name)
        raise IrqError(
            f"{WEIGHTS_FILE}: {PREFIX}{module}{suffix} is missing, {rest.name} is there: {_DAMAGED}"
        )
    for suffix in sorted(set(parts) - wanted):
        kind = f"{config.peft_type} with connection {config.connection!r}"
        raise IrqError(f"{_where(parts[suffix])}: an adapter of type {kind} has none: {_DAMAGED}")
    a, b, beta = parts[first], parts[second], parts.get(_BETA)
    rank = config.rank_of(module)
    for info, length, axis, of in ((a, 2, 0, "rank"), (b, 2, 1, "rank"), (beta, 1, 0, "betas")):
        if info is None:
            continue
        size = rank if of == "rank" else 2
        if len(info.shape) != length or info.shape[axis] != size or 0 in info.shape:
            raise IrqError(
                f"{_where(info)}: the settings give {size} {of} in dimension {axis} of {length}: "
                f"{_DAMAGED}"
            )
        if info.dtype not in FLOATS:
            raise IrqError(f"{_where(info)}: must be one of {', '.join(FLOATS)}: {_DAMAGED}")
    return StoredLayer(module, a, b, beta, config.scaling_of(module), embedding)


@dataclass(frozen=True)
class LayerValues:
    """The numbers of a layer in float64: `a`, `b`, and the two betas that count.

    `a` and `b` are as stored; of an embedding they are the transposes of B and A, so that `b @ a`
    is in any case the change of a weight without its scaling.
    """

    a: torch.Tensor
    b: torch.Tensor
    beta: tuple[float, float]


def read_layer(reader: TileReader, config: StoredConfig, layer: StoredLayer) -> LayerValues:
    """Read one layer; betas of a connection that is switched off come as 0.

    Raises `IrqError` naming the tensor when a number is NaN or infinite or the file ends early.
    """
    a, b = (read_finite(reader, info) for info in (layer.a, layer.b))
    if layer.embedding:
        a, b = b.T.contiguous(), a.T.contiguous()
    first = second = 0.0
    if layer.beta is not None:
        first, second = read_finite(reader, layer.beta).tolist()
    return LayerValues(
        a,
        b,
        (
            first if config.connection in ("both", "input") else 0.0,
            second if config.connection in ("both", "output") else 0.0,
        ),
    )


def read_finite(reader: TileReader, info: TensorInfo) -> torch.Tensor:
    """A tensor of an adapter in float64; `IrqError` where a number is NaN or infinite."""
    values = reader.read_tensor(info).double()
    if not bool(values.isfinite().all()):
        raise IrqError(
            f"{_where(info)}: holds NaN or infinite numbers: training has failed; take an earlier "
            "checkpoint of the adapter"
        )
    return values
