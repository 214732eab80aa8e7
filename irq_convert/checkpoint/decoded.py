"""Sources that are released in FP8 or MXFP4: read as the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from irq_convert.checkpoint.arranged import Arranged
from irq_convert.checkpoint.float_dtypes import SAFETENSORS_NAMES
from irq_convert.checkpoint.fp8_sources import decode_fp8_source, fp8_reading
from irq_convert.checkpoint.mxfp4 import decode_mxfp4
from irq_convert.errors import IrqError

_SETTING = "quantization_config"
_MODELOPT_FILE = "hf_quant_config.json"
_SILENT = "BF16"


def decode_source(arranged: Arranged, where: str) -> Arranged:
    """`arranged` with packed weights as lazy dense ones, their scales and the setting gone.

    What is neither plain FP8 nor MXFP4, by its config.json and the headers, is returned as it is.
    Raises `IrqError`, which begins with `where` or a file, where a scale is missing or of another
    shape than its weight asks for.
    """
    config = arranged.config
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
    else:
        reading = fp8_reading(setting)
        found = decode_fp8_source(arranged.tensors, reading, dtype) if reading else None
        if found is None:
            return arranged
        tensors, left_out = found
        dropped += left_out
    if not tensors:
        raise IrqError(f"{where}: holds nothing but scales; get all files of the release")
    gone = (*arranged.gone, _MODELOPT_FILE) if method == "modelopt" else arranged.gone
    return replace(
        arranged, tensors=tensors, config=_without_setting(config), gone=gone, dropped=dropped
    )


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
