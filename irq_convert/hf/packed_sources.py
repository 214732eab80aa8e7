"""Sources that transformers does not read as they lie, loaded as the dense models they stand for.

Those in Meta's layout, in files of torch, and in FP8 or MXFP4, which it decodes for some devices
and dtypes only, or takes for plain numbers where the setting lies in a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.config import QUANT_METHOD
from irq_convert.checkpoint.decoded import MODELOPT_FILE
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import ORIGINAL
from irq_convert.checkpoint.locate import Located
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import CONFIG_NAME, PLAIN, Checkpoint, open_checkpoint
from irq_convert.checkpoint.source_formats import FORMATS
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.empty_model import NoModel, named_class


def open_packed(found: Located) -> Checkpoint | None:
    """The source that `found` is; None for what is transformers' to load or to refuse.

    That is dense models in safetensors, artifacts, and folders without weights. Raises `IrqError`
    for a source whose files are damaged.
    """
    folder = found.folder
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*")]
    names += [path.relative_to(folder).as_posix() for path in folder.glob(f"{ORIGINAL}*")]
    kinds = [each.name for each in FORMATS if each.select(names) is not None]
    if not kinds or (kinds[0] == PLAIN and not _says_packed(folder)):
        return None
    opened = open_checkpoint(folder, found.repo_id, found.revision)
    return None if (opened.source_format, opened.encoding) == (PLAIN, None) else opened


def _says_packed(folder: Path) -> bool:
    """Whether a file beside safetensors has a setting of another quantization than our own."""
    if (folder / MODELOPT_FILE).is_file():
        return True
    try:
        config = read_json_object(folder / CONFIG_NAME)
    except IrqError:
        return False  # loading says what is wrong
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    settings = [part.get("quantization_config") for part in parts]
    methods = [each.get("quant_method") for each in settings if isinstance(each, dict)]
    return any(method != QUANT_METHOD for method in methods)


def dense_config(source: Checkpoint, read: Any) -> Any:
    """The configuration of transformers, which `read` makes of a folder with config.json.

    Raises `UsageError` where the files do not tell how to compute.
    """
    if (source.folder / CONFIG_NAME).is_file():
        config = read(source.folder)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        return config
    found = source.config or {}
    if source.unknown is not None and found.get("rope_theta") != 10000.0:
        raise UsageError(
            f"{source.folder}: its files do not tell which LLaMA it is, and so how it computes; "
            "give the same model with config.json"
        )
    try:
        return named_class(found)[1]
    except NoModel as error:
        raise UsageError(f"{source.folder}: {error}") from None


def dense_tensors(source: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a source in memory, those of floats in `dtype`; `IrqError` by the disk."""
    found = {}
    with TileReader() as reader:
        for name, info in source.tensors.items():
            tensor = reader.read_tensor(info)
            found[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def tokenizer_folder(source: Checkpoint, into: Path) -> Path:
    """Where transformers finds the tokenizer: of Meta's layout, made in the folder `into`."""
    from irq_convert.hf.meta_tokenizer import find_tokenizer, tokenizer_files

    path = find_tokenizer(source) if source.source_format == "meta" else None
    if path is None or source.config is None:
        return source.folder
    for name, content in tokenizer_files(path, source.config).items():
        (into / name).write_bytes(content)
    return into
