"""Sources that are released in FP8 or MXFP4: read as the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.arranged import Arranged
from irq_convert.checkpoint.float_dtypes import SAFETENSORS_NAMES
from irq_convert.checkpoint.fp8 import KINDS, ScaledFp8
from irq_convert.checkpoint.fp8_sources import decode_fp8_source, fp8_reading
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.mxfp4 import decode_mxfp4
from irq_convert.checkpoint.packed import find_packed, is_narrow_float
from irq_convert.errors import IrqError

_SETTING = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
"""Where modelopt writes the setting, also of models whose config.json has none."""
_SILENT = "BF16"


def decode_source(arranged: Arranged, folder: Path, beside: Collection[str]) -> Arranged:
    """`arranged` with packed weights as lazy dense ones, their scales and the setting gone.

    `beside` are the files of `folder` that hold no weights. What is neither plain FP8 nor MXFP4, by
    its setting and the headers, is returned as it is, with the setting in its config.
    Raises `IrqError`, which begins with `folder` or a file, where a scale is missing or of another
    shape than its weight asks for.
    """
    config = arranged.config
    if config is not None and not _settings(config) and MODELOPT_FILE in beside:
        config = _with_modelopts(config, arranged.tensors, folder)
        arranged = replace(arranged, config=config)
    settings = _settings(config)
    if config is None or not settings:
        return arranged
    if any(setting != settings[0] for setting in settings):
        return arranged
    setting, dtype = settings[0], dense_dtype(config)
    method, dropped = setting.get("quant_method"), arranged.dropped
    if method == "mxfp4":
        tensors = decode_mxfp4(arranged.tensors, dtype)
        if tensors == arranged.tensors:
            return arranged
        encoding = "mxfp4"
    else:
        reading = fp8_reading(setting)
        found = decode_fp8_source(arranged.tensors, reading, dtype) if reading else None
        if found is None:
            return arranged
        tensors, left_out = found
        dropped += left_out
        encoding = _kind_of_fp8(tensors)
    if not tensors:
        raise IrqError(f"{folder}: holds nothing but scales; get all files of the release")
    gone = (*arranged.gone, MODELOPT_FILE) if method == "modelopt" else arranged.gone
    return replace(
        arranged,
        tensors=tensors,
        config=_without_setting(config),
        gone=gone,
        dropped=dropped,
        encoding=encoding,
    )


def _kind_of_fp8(tensors: Mapping[str, TensorInfo]) -> str:
    """With the finest kind of scale that a weight has: a small matrix may be a single block."""
    kinds = {info.lazy.kind for info in tensors.values() if isinstance(info.lazy, ScaledFp8)}
    return f"fp8-{min(kinds, key=KINDS.index)}"


def _with_modelopts(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo], folder: Path
) -> dict[str, Any]:
    """`config` with the setting that modelopt wrote beside it, where weights are packed."""
    packed = any(is_narrow_float(info.dtype) for info in tensors.values())
    if not packed and find_packed(tensors) is None:
        return config  # made dense since
    setting = read_json_object(folder / MODELOPT_FILE).get("quantization")
    if not isinstance(setting, dict):
        return config
    return {**config, _SETTING: {"quant_method": "modelopt", **setting}}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration and those of its towers."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _settings(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    found = [part.get(_SETTING) for part in _parts(config or {})]
    return [setting for setting in found if isinstance(setting, dict)]


def _without_setting(config: Mapping[str, Any]) -> dict[str, Any]:
    def cleaned(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != _SETTING}

    return {
        key: cleaned(value) if isinstance(value, dict) else value
        for key, value in cleaned(config).items()
    }


def dense_dtype(config: Mapping[str, Any]) -> str:
    """The safetensors name of the dtype that config.json gives the model; BF16 where it is silent.

    That of the whole model comes before that of its text model.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            word = part.get(key)
            if isinstance(word, str) and word.removeprefix("torch.") in SAFETENSORS_NAMES:
                return SAFETENSORS_NAMES[word.removeprefix("torch.")]
    return _SILENT
