"""Load what is evaluated: a causal language model, dense or quantized, and its tokenizer, with
every way this fails turned into one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from irq_convert.checkpoint.locate import locate
from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.hf.loading import load

_AS_IT_LIES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_config(source: str | Path) -> Any:
    """Read the transformers configuration of a model folder or Hub id.

    Raises `UsageError` where there is no such folder; `IrqError` where the Hub does not provide it,
    or its config.json does not describe a model.
    """
    folder = locate(str(source), headers_only=True).folder
    with _one_line_errors(f"{source}: cannot be loaded as a model"):
        return AutoConfig.from_pretrained(folder, **_AS_IT_LIES)


def load_causal_lm(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model for evaluation from a folder or a Hub id.

    An artifact of this project (`quant_method: "irq"`) goes through `irq_convert.load`,
    everything else through transformers, from safetensors only. `device` is a torch device, or
    `auto` to spread the model over what there is.

    Raises `UsageError` where `device` is unknown or absent, or there is no such folder; `IrqError`
    where the model is missing, damaged, incomplete or not a causal language model.
    """
    check_device(device)
    folder = locate(str(source)).folder
    loader = _load_quantized if _quant_method(load_config(folder)) == "irq" else _load_dense
    try:
        return loader(folder, dtype, device).eval()
    except torch.OutOfMemoryError as error:
        raise IrqError(f"{source}: does not fit in the memory of {device}") from error


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a model folder or Hub id.

    Raises `IrqError` where there is none, or it cannot be read.
    """
    folder = locate(str(source), headers_only=True).folder
    with _one_line_errors(f"{source}: has no usable tokenizer, name one with --tokenizer PATH"):
        return AutoTokenizer.from_pretrained(folder, **_AS_IT_LIES)


def check_device(device: str) -> None:
    """Raise UsageError unless `device` is `auto` or a torch device that can compute here."""
    if device == "auto":
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {one_line(error)}") from None


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Run a loader of transformers; whatever it raises becomes one line that starts with `what`.

    Damaged folders make it raise nearly every kind: OSError, ValueError, KeyError, RuntimeError,
    SafetensorError, ImportError for a missing optional package and more.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise IrqError(f"{what}: {one_line(error)}") from error


def _load_dense(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    with _one_line_errors(f"{folder}: cannot be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            output_loading_info=True,
            **_AS_IT_LIES,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills these with random numbers
        raise IrqError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first is {missing[0]}: complete it"
        )
    return model


def _load_quantized(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load(folder, dtype=dtype, device_map=device)


def _quant_method(config: Any) -> str | None:
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return quantization.get("quant_method")
