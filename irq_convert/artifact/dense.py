"""The dense checkpoint that an artifact stands for: the dtype of every tensor, and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.dense_dtype import Dtype
from irq_convert.artifact.head import head_differs
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.float_dtypes import SAFETENSORS_NAMES, WORDS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import IrqError


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the source, quantized or copied in the artifact, and its dtype when dense."""

    base: StoredTensor | TensorInfo
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the source has it."""
        return self.base.source_shape if isinstance(self.base, StoredTensor) else self.base.shape


def dense_tensors(artifact: Artifact, dtype: Dtype = Dtype.AUTO) -> list[DenseTensor]:
    """Every tensor of the source, in the order of the files."""
    bases = artifact.in_file_order()
    return [DenseTensor(base, dense_dtype(artifact, base, dtype)) for base in bases]


def dense_dtype(artifact: Artifact, base: StoredTensor | TensorInfo, dtype: Dtype) -> str:
    """Asked for, else that of the source by the manifest, else by config.json."""
    if isinstance(base, TensorInfo):
        floating = base.dtype in SAFETENSORS_NAMES.values()
        return SAFETENSORS_NAMES[dtype.value] if floating and dtype != Dtype.AUTO else base.dtype
    if dtype != Dtype.AUTO:
        return SAFETENSORS_NAMES[dtype.value]
    listed = (artifact.manifest or {"tensors": {}})["tensors"].get(base.name)
    if listed is None:
        return _default_dtype(artifact)
    found = listed.get("dtype")
    if found not in SAFETENSORS_NAMES.values():
        raise IrqError(
            f"{MANIFEST_NAME}: tensors[{base.name}] says dtype {found!r}, which is none that a "
            "weight can have: the artifact is damaged, or choose one with --dtype"
        )
    return str(found)


def dense_config(artifact: Artifact, dtype: Dtype) -> dict[str, Any]:
    """config.json of the dense checkpoint; it never calls two different tensors tied."""
    config = dict(artifact.checkpoint.config or {})
    config.pop("quantization_config", None)
    if config.get("tie_word_embeddings") is not False and head_differs(artifact):
        config["tie_word_embeddings"] = False
    if dtype != Dtype.AUTO:
        return _with_dtype(config, dtype.value)
    if not {"dtype", "torch_dtype"} & set(config):
        config["dtype"] = WORDS[_default_dtype(artifact)]
    return config


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` saying `dtype`, in every nested configuration that says one."""
    found = {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & set(value)
        else value
        for key, value in config.items()
    }
    for key in ("dtype", "torch_dtype"):
        if key in found:
            found[key] = dtype
    return found if {"dtype", "torch_dtype"} & set(found) else found | {"dtype": dtype}


def _default_dtype(artifact: Artifact) -> str:
    """By config.json, float32 (which is exact) where it says nothing."""
    config: Mapping[str, Any] = artifact.checkpoint.config or {}
    nested = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *nested):
        found = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        if found in SAFETENSORS_NAMES:
            return SAFETENSORS_NAMES[found]
    return "F32"
