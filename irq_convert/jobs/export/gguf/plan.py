"""The plan of a GGUF file, from headers and small files: every tensor's name, type and place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from gguf import GGMLQuantizationType as GgmlType

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.dense import dense_config, dense_tensors
from irq_convert.artifact.dense_dtype import Dtype
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.core.codebook import get_codebook
from irq_convert.errors import UsageError
from irq_convert.jobs.export.biases import check_biases
from irq_convert.jobs.export.gguf.encode import BLOCK, fits_q4_1, row_nbytes
from irq_convert.jobs.export.gguf.family import Model, read_model
from irq_convert.jobs.export.gguf.metadata import (
    ALIGNMENT,
    TensorHead,
    build_gguf_header,
    rope_divisors,
)
from irq_convert.jobs.export.gguf.names import GgufPlace, find_places
from irq_convert.jobs.export.gguf.vocabulary import read_vocabulary
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import ExportPlan, PlannedTensor
from irq_convert.progress import Progress

DTYPES = {
    "float32": GgmlType.F32,
    "float16": GgmlType.F16,
    "bfloat16": GgmlType.BF16,
    "q8_0": GgmlType.Q8_0,
}
"""Of --dtype; "auto" is the checkpoint's own."""
FALLBACKS = {
    "f32": GgmlType.F32,
    "f16": GgmlType.F16,
    "bf16": GgmlType.BF16,
    "q8_0": GgmlType.Q8_0,
}
"""Of --fallback; "auto" is the source's dtype."""
OF_DTYPE = {"F64": GgmlType.F32, "F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
ROPE_NAME = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. `source` is None for one that is made here (`data`); `offset` counts
    from the file's beginning; `dtype` is the checkpoint's."""

    source: StoredTensor | TensorInfo | None
    place: GgufPlace
    kind: GgmlType
    dtype: str
    offset: int = 0
    data: torch.Tensor | None = None
    why: str | None = None

    @property
    def nbytes(self) -> int:
        shape = self.place.shape
        return prod(shape[:-1]) * row_nbytes(self.kind, shape[-1])

    @property
    def head(self) -> TensorHead:
        return TensorHead(self.place.name, self.kind, self.place.shape, self.nbytes)


@dataclass(frozen=True)
class GgufFile:
    """The file: its name, its first bytes, and tensors in the order of their data."""

    name: str
    header: bytes
    tensors: tuple[GgufTensor, ...]

    @property
    def nbytes(self) -> int:
        last = self.tensors[-1]
        return last.offset + _padded(last.nbytes)


def plan_gguf(artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
    """Decide everything; `UsageError` for a model or tokenizer that has no place in the file."""
    model = read_model(dense_config(artifact, Dtype.AUTO))
    tensors = _tensors(artifact, model, options)
    progress.stage("reading the tokenizer")
    vocabulary = read_vocabulary(artifact.folder, model.vocab)
    main = _main_kind(tensors)
    name = _model_name(artifact)
    header = build_gguf_header(model, vocabulary, name, main, [tensor.head for tensor in tensors])
    ends = accumulate((_padded(tensor.nbytes) for tensor in tensors), initial=len(header))
    placed = tuple(replace(t, offset=at) for t, at in zip(tensors, ends, strict=False))
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    file = GgufFile(f"{slug}-{main.name}.gguf", header, placed)
    return ExportPlan(
        artifact,
        options,
        {file.name: file.nbytes},
        tuple(
            PlannedTensor(t.source.name, t.kind.name, t.kind != GgmlType.Q8_0, t.why)
            for t in placed
            if isinstance(t.source, StoredTensor)
        ),
        (*model.notes, *vocabulary.notes, *_dense_notes(placed, options)),
        file,
    )


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def _model_name(artifact: Artifact) -> str:
    """As the source was called, without its owner; else the folder's name."""
    source = (artifact.manifest or {}).get("source", {}).get("model")
    named = source if isinstance(source, str) and source.strip("/") else artifact.folder.resolve()
    return str(named).rstrip("/").rpartition("/")[2]


def _tensors(artifact: Artifact, model: Model, options: ExportOptions) -> list[GgufTensor]:
    tensors = dense_tensors(artifact)
    places = find_places(model, {t.base.name: t.shape for t in tensors})
    check_biases(model.config.to_dict(), places, "llama.cpp")
    found = []
    divisors = rope_divisors(model)
    if divisors is not None:
        place = GgufPlace(ROPE_NAME, tuple(divisors.shape))
        found.append(GgufTensor(None, place, GgmlType.F32, "F32", data=divisors))
    for tensor in tensors:
        base, dtype = tensor.base, tensor.dtype
        if base.name not in places:
            continue
        place = places[base.name]
        if isinstance(base, StoredTensor):
            kind, why = _quantized_kind(base, dtype, options.fallback or "auto")
        else:
            kind, why = _dense_kind(base, place, options.dtype)
        found.append(GgufTensor(base, place, kind, dtype, why=why))
    return found


def _quantized_kind(tensor: StoredTensor, dtype: str, fallback: str) -> tuple[GgmlType, str | None]:
    """Q4_1 where it holds the codes, else what `fallback` says, and why."""
    fmt, cols = tensor.format, tensor.shape.cols
    if fits_q4_1(fmt.codebook, fmt.block_size, cols):
        spare = f"{fmt.codebook} takes the 4 bits of a code that Q4_1 has"
        return GgmlType.Q4_1, spare if fmt.bits < 4 else None
    if not get_codebook(fmt.codebook).uniform:
        why = f"no GGUF type has the levels of {fmt.codebook}"
    elif fmt.block_size % BLOCK:
        why = f"blocks of {fmt.block_size} are smaller than the {BLOCK} of Q4_1"
    else:
        why = f"rows are not made of whole blocks of {BLOCK}"
    own = OF_DTYPE[dtype]
    kind = FALLBACKS.get(fallback, own)
    if kind == GgmlType.Q8_0 and cols % BLOCK:
        return own, f"{why}, and Q8_0 needs them too"
    return kind, why


def _dense_kind(info: TensorInfo, place: GgufPlace, dtype: str) -> tuple[GgmlType, str | None]:
    """Vectors in F32, as llama.cpp wants them; matrices as asked for."""
    if info.dtype not in OF_DTYPE:
        raise UsageError(
            f"{info.name} in {info.shard.name} is {info.dtype}, and GGUF files of this kind hold "
            "F32, F16 and BF16 only: use --to dense"
        )
    if len(place.shape) < 2:
        return GgmlType.F32, None
    own = OF_DTYPE[info.dtype]
    kind = DTYPES.get(dtype, own)
    if kind == GgmlType.Q8_0 and place.shape[-1] % BLOCK:
        return own, f"rows are not made of the whole blocks of {BLOCK} that Q8_0 needs"
    return kind, None


def _dense_notes(tensors: tuple[GgufTensor, ...], options: ExportOptions) -> list[str]:
    """Matrices that could not be stored as --dtype says."""
    return [
        f"{t.source.name} is stored as {t.kind.name}, not {options.dtype}: {t.why}"
        for t in tensors
        if isinstance(t.source, TensorInfo) and t.why is not None
    ]


def _main_kind(tensors: list[GgufTensor]) -> GgmlType:
    """The type of most quantized weights."""
    weights: dict[GgmlType, int] = {}
    for tensor in tensors:
        if isinstance(tensor.source, StoredTensor):
            weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.source.weights
    if not weights:
        raise UsageError("no quantized tensor goes into the file: the artifact is damaged")
    return max(weights, key=lambda kind: weights[kind])
