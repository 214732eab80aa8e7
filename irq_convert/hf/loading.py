"""`load`: an artifact as a model in one call, strictly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.remote_code import trusted, why_refused

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
    `kwargs` are those of `from_pretrained`, keys of the configuration and `torch_dtype`, the older
    name of `dtype`, among them. Raises `UsageError` when `path` holds no irq artifact, `IrqError`
    when it cannot be read or when the files lack a tensor that the model needs.
    """
    where = str(path)
    kwargs.setdefault("trust_remote_code", trusted())
    older = kwargs.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    config = kwargs.pop("config", None)
    if config is None:
        config, kwargs = _read_config(where, kwargs)
    _check_method(where, getattr(config, "quantization_config", None))
    with_info = kwargs.pop("output_loading_info", False)
    try:
        loaded: Any = model_class(config).from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # a configuration of wrong types fails in any way
        raise _explained(f"{where}: cannot be loaded", error) from error
    model, info = loaded
    _check_complete(where, info, kwargs.get("ignore_mismatched_sizes", False))
    result: Any = loaded if with_info else model
    return result


def _explained(what: str, error: Exception) -> Exception:
    """`error` itself where it says enough, else one line that begins with `what`."""
    import torch

    if isinstance(error, IrqError | MemoryError | torch.OutOfMemoryError):
        return error
    refused = why_refused(error)
    if refused is not None:
        return IrqError(f"{what}: {refused}")
    line = one_line(Exception(" ".join(str(error).split()) or type(error).__name__))
    if isinstance(error, OSError):
        return IrqError(f"{what}: {line}")
    return IrqError(f"{what}: {line} (is its config.json damaged, or an option unknown?)")


def _read_config(where: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, with those of `kwargs` that are keys of it, and the others.

    Raises `IrqError` where config.json is no configuration that transformers can read.
    """
    from transformers import AutoConfig

    hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    own = {key: value for key, value in kwargs.items() if key not in (*hub, *_LOADING_OPTIONS)}
    try:
        config, unused = AutoConfig.from_pretrained(
            where, return_unused_kwargs=True, **copy.deepcopy(hub), **own
        )
    except Exception as error:  # JSON of any kind may be in that file
        raise _explained(f"{where}: cannot be read as a model", error) from error
    taken = own.keys() - unused.keys()
    return config, {key: value for key, value in kwargs.items() if key not in taken}


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

_LOADING_OPTIONS = ("quantization_config", "output_loading_info", "attn_implementation")
"""What `from_pretrained` of a model takes and its configuration must not."""


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


def _check_complete(where: str, info: dict[str, Any], ignore_sizes: bool) -> None:
    """What `from_pretrained` only warns about: parameters that did not come from the files.

    Those of another shape may be new where the caller has said so.
    """
    for kind in ("missing_keys", *(() if ignore_sizes else ("mismatched_keys",))):
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise IrqError(
                f"{where}: {kind.replace('_', ' ')}: {names[0]}{more}: the artifact is damaged or "
                "of another model: convert or download it again"
            )
