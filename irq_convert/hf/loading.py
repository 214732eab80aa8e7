"""`load`: an artifact as a model in one call, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from irq_convert.errors import IrqError, UsageError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of the artifact at `path`, a folder or a Hub id.

    The class is the one that config.json names, or `AutoModelForCausalLM`. `dtype` is that of the
    dense parameters and of activations, by default what config.json says; `device_map` and
    `kwargs` are those of `from_pretrained`. Raises `UsageError` when `path` holds no irq artifact,
    `IrqError` when it cannot be read or when the files lack a tensor that the model needs.
    """
    from transformers import AutoConfig

    where = str(path)
    hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(where, **hub)
    except (OSError, ValueError) as error:
        raise IrqError(f"{where}: cannot be read as a model: {one_line(error)}") from error
    _check_method(where, getattr(config, "quantization_config", None))
    with_info = kwargs.pop("output_loading_info", False)
    loaded: Any
    try:
        loaded = model_class(config).from_pretrained(
            where,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
            output_loading_info=True,
            **kwargs,
        )
    except OSError as error:
        raise IrqError(f"{where}: cannot be loaded: {one_line(error)}") from error
    model, info = loaded
    _check_complete(where, info)
    result: Any = loaded if with_info else model
    return result


_HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
    "trust_remote_code",
    "code_revision",
)


def model_class(config: Any) -> Any:
    """The class that `config` names and transformers has, else `AutoModelForCausalLM`."""
    import transformers

    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        for name in config.architectures or ():
            found = getattr(transformers, name, None)
            if found is not None:
                return found
    return transformers.AutoModelForCausalLM


def _check_method(where: str, quantization: Any) -> None:
    raw = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    method = raw.get("quant_method") or getattr(quantization, "quant_method", None)
    if method != "irq":
        found = f"quantized with {method}" if method else "not quantized"
        raise UsageError(
            f"{where}: not an irq artifact ({found}): make one with irq-convert quantize"
        )


def _check_complete(where: str, info: dict[str, Any]) -> None:
    """What `from_pretrained` only warns about: parameters that did not come from the files."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise IrqError(
                f"{where}: {kind.replace('_', ' ')}: {names[0]}{more}: the artifact is damaged or "
                "of another model: convert or download it again"
            )
