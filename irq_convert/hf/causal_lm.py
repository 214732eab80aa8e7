"""Load what is evaluated: a causal language model, dense or quantized, and its tokenizer, with
every way this fails turned into one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from irq_convert.checkpoint.locate import Located, locate
from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.hf.loading import load, model_class
from irq_convert.hf.packed_sources import (
    dense_config,
    dense_tensors,
    open_packed,
    tokenizer_folder,
)
from irq_convert.remote_code import trusted, why_refused


def _as_it_lies() -> dict[str, Any]:
    """How transformers reads a folder: from the disk alone, with the code that is trusted."""
    return {"local_files_only": True, "trust_remote_code": trusted()}


def load_config(source: str | Path) -> Any:
    """Read the transformers configuration of a model folder or Hub id; a source's as dense.

    Raises `UsageError` where there is no such folder; `IrqError` where the Hub does not provide it,
    or its config.json does not describe a model.
    """
    return _config(locate(str(source), headers_only=True), source)


def _config(found: Located, source: str | Path) -> Any:
    packed = open_packed(found)
    with _one_line_errors(f"{source}: cannot be loaded as a model"):

        def read(folder: Path) -> Any:
            return AutoConfig.from_pretrained(folder, **_as_it_lies())

        return read(found.folder) if packed is None else dense_config(packed, read)


def require_causal_lm(source: str | Path, config: Any) -> None:
    """Refuse a model that predicts no next token, before any weight of it is loaded.

    `config` is what `load_config` returns for `source`. Raises `UsageError` naming the class, for
    an artifact, and for a dense model that transformers cannot load with a head either.
    """
    cls = model_class(config)
    if cls is AutoModelForCausalLM or cls.config_class is not type(config):
        return  # loading says what is wrong
    if _predicts(cls, config):
        return
    if _quant_method(config) != "irq" and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    raise UsageError(
        f"{source}: {cls.__name__} is no causal language model, and only one that predicts the "
        "next token has a perplexity and can be finetuned here; give a model whose config.json "
        "names such a class, as a ...ForCausalLM"
    )


def load_causal_lm(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model for evaluation from a folder or a Hub id.

    An artifact of this project (`quant_method: "irq"`) goes through `irq_convert.load`, a dense
    model through transformers, from safetensors; other formats that `quantize` reads are decoded
    into memory first. `device` is a torch device, or `auto` to spread the model over what there is.

    Raises `UsageError` where `device` is unknown or absent, there is no such folder, or the class
    is no causal language model; `IrqError` where the model is missing, damaged or incomplete.
    """
    check_device(device)
    found = locate(str(source))
    config = _config(found, source)
    require_causal_lm(source, config)
    try:
        if _quant_method(config) == "irq":
            return load(found.folder, dtype=dtype, device_map=device).eval()
        return _load_dense(found, config, dtype, device).eval()
    except torch.OutOfMemoryError as error:
        raise IrqError(f"{source}: does not fit in the memory of {device}") from error


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a model folder or Hub id.

    Raises `IrqError` where there is none, or it cannot be read.
    """
    found = locate(str(source), headers_only=True)
    packed = open_packed(found)
    with (
        _one_line_errors(f"{source}: has no usable tokenizer, name one with --tokenizer PATH"),
        tempfile.TemporaryDirectory() as made,
    ):
        folder = found.folder if packed is None else tokenizer_folder(packed, Path(made))
        return AutoTokenizer.from_pretrained(folder, **_as_it_lies())


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
    except (torch.OutOfMemoryError, IrqError):
        raise
    except Exception as error:
        raise IrqError(f"{what}: {why_refused(error) or one_line(error)}") from error


def _predicts(cls: Any, config: Any) -> bool:
    """Whether `cls` gives logits of the next token from tokens alone."""
    return cls.can_generate() and not getattr(config, "is_encoder_decoder", False)


def _dense_class(config: Any) -> Any:
    """The class that config.json names where it predicts tokens: one that sees pictures may too."""
    cls = model_class(config)
    named = cls is not AutoModelForCausalLM and cls.config_class is type(config)
    return cls if named and _predicts(cls, config) else AutoModelForCausalLM


def _load_dense(found: Located, config: Any, dtype: torch.dtype, device: str) -> PreTrainedModel:
    folder, cls, packed = found.folder, _dense_class(config), open_packed(found)
    how: dict[str, Any] = {"use_safetensors": True, **_as_it_lies()}
    if packed is not None:
        how = {"config": config, "state_dict": dense_tensors(packed, dtype)}
    with _one_line_errors(f"{folder}: cannot be loaded as a causal language model"):
        loaded: Any = cls.from_pretrained(
            folder if packed is None else None,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            **how,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills these with random numbers
        raise IrqError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first is {missing[0]}: complete it"
        )
    return model


def _quant_method(config: Any) -> str | None:
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return quantization.get("quant_method")
