"""Which files of a checkpoint are weights, which of them to read, and which files to carry over.

Decided from names alone, so that one set of rules serves a local folder and a file list of the Hub.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from irq_convert.checkpoint.shards import INDEX_NAME

SINGLE_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PARAMS_NAME = "params.json"
"""Of Meta's layout: the sizes of the model."""
ORIGINAL = "original/"
"""Where a repository has the files that the model was first released in."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_SUFFIXES = (
    ".safetensors",
    *PICKLE_SUFFIXES,
    *(".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel"),
    ".npz",
)
LOCK_NAME = ".output.lock"
"""In an output folder that is being written: the lock file of the run that writes it."""
SCORES_NAME = "irq_scores.json"
"""Beside a model or an adapter: what `eval --tasks` has measured. Of these weights alone, so it is
no part of a checkpoint: neither carried over, nor listed, nor verified."""
HEADERS_ONLY_NAME = ".headers-only.json"
"""In a folder made by `locate(headers_only=True)`: file name to true size of each cut shard."""

_WEIGHT_INDEX = re.compile(r"\.(safetensors|bin|pth|h5|msgpack)\.index(\.[\w-]+)?\.json$")
_HIDDEN_PARTS = {".git", ".cache", ".gitattributes", ".gitignore", ".gitmodules", ".DS_Store"}
_HIDDEN_PARTS |= {"__pycache__", ".ipynb_checkpoints", HEADERS_ONLY_NAME, LOCK_NAME, SCORES_NAME}
_TEMPORARY = re.compile(r"^\..*\.tmp-\d+-\d+$")


@dataclass(frozen=True)
class Selection:
    """The weight files to read: `shards` as they are, or, when `index` is set, those it names."""

    shards: tuple[str, ...] = ()
    index: str | None = None


def is_hidden(path: str) -> bool:
    """Tell version-control, cache and temporary files and scores, no part of a checkpoint."""
    parts = PurePosixPath(path).parts
    return any(part in _HIDDEN_PARTS for part in parts) or bool(_TEMPORARY.match(parts[-1]))


def is_weight_index(path: str) -> bool:
    """Tell `model.safetensors.index.json` and its relatives of other formats and variants."""
    return bool(_WEIGHT_INDEX.search(path))


def is_weight_file(path: str) -> bool:
    """Tell files that hold weights in any format, and the indexes of such files."""
    return path.lower().endswith(WEIGHT_SUFFIXES) or is_weight_index(path)


def is_left_out(path: str, shards: Iterable[str]) -> bool:
    """Tell what is not carried over beside `shards`, the weights that are read.

    That is weights, and all of `original/`: the model once more, unless its weights are from there.
    """
    copied = path.startswith(ORIGINAL) and not any(name.startswith(ORIGINAL) for name in shards)
    return copied or is_weight_file(path)


def select_safetensors(paths: Collection[str]) -> Selection | None:
    """Choose the safetensors files among the relative posix `paths` of a checkpoint; None for none.

    At the top level only, in this order: `model.safetensors.index.json` (see `shards_of_index` for
    the case that `model.safetensors` lies beside it), `model.safetensors`, the only index of
    another name, else every `*.safetensors` that is not an adapter. Copies of the weights under
    other names (`consolidated*.safetensors`, `original/`) are not read when one of the first
    three exists.
    """
    top = sorted(path for path in paths if "/" not in path)
    indexes = [name for name in top if name.endswith(".safetensors.index.json")]
    single = (SINGLE_NAME,) if SINGLE_NAME in top else ()
    if INDEX_NAME in indexes:
        return Selection(single, INDEX_NAME)
    if single:
        return Selection(single)
    if len(indexes) == 1:
        return Selection((), indexes[0])
    shards = [name for name in top if name.endswith(".safetensors")]
    base = tuple(name for name in shards if not name.startswith("adapter_"))
    return Selection(base) if base else None


_NO_MODEL = re.compile(
    r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_|consolidated)"
)
_PART = re.compile(r"(?:original/)?consolidated\.\d\d\.pth")


def select_pickles(paths: Collection[str]) -> Selection | None:
    """Choose files of `torch.save` at the top level; None for none.

    In this order: `pytorch_model.bin.index.json`, `pytorch_model.bin`, the only index of another
    name, else every `*.bin`, `*.pth` and `*.pt` that is no adapter, training state or part of
    Meta's layout.
    """
    top = sorted(path for path in paths if "/" not in path)
    indexes = [name for name in top if name.endswith((".bin.index.json", ".pth.index.json"))]
    if PICKLE_INDEX in indexes:
        return Selection((), PICKLE_INDEX)
    if PICKLE_NAME in top:
        return Selection((PICKLE_NAME,))
    if len(indexes) == 1:
        return Selection((), indexes[0])
    files = [name for name in top if name.endswith((".bin", ".pth", ".pt"))]
    base = tuple(name for name in files if not _NO_MODEL.match(name))
    return Selection(base) if base else None


def select_meta(paths: Collection[str]) -> Selection | None:
    """Choose Meta's `consolidated.NN.pth` beside `params.json`, also in `original/`."""
    for prefix in ("", ORIGINAL):
        parts = tuple(
            sorted(path for path in paths if _PART.fullmatch(path) and path.startswith(prefix))
        )
        parts = tuple(path for path in parts if path.count("/") == prefix.count("/"))
        if parts and f"{prefix}{PARAMS_NAME}" in paths:
            return Selection(parts)
    return None


def why_nothing(paths: Collection[str]) -> str:
    """In words, why there is nothing to read among `paths`, and the way out."""
    if any("/" not in path and path.endswith(".safetensors") for path in paths):
        return "holds an adapter but no model; merge the adapter into its base model first"
    names = sorted(paths)
    parts = [path for path in names if _PART.fullmatch(path)]
    if parts:
        return (
            f"has {parts[0]} without {PARAMS_NAME}, which says what they are parts of: get it, too"
        )
    pickles = [path for path in names if path.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"no weights of a model at the top level, only {pickles[0]}; give the folder with "
            "them, or a state dict as *.bin, *.pth or *.pt"
        )
    gguf = [path for path in names if path.lower().endswith((".gguf", ".ggml"))]
    if gguf:
        return (
            f"no safetensors, only {gguf[0]}; take the original checkpoint, or load the file with "
            "transformers (gguf_file=...), set model.hf_quantizer = None, del "
            "model.config.quantization_config, and save with save_pretrained(folder)"
        )
    nested = [path for path in names if path.endswith(".safetensors")]
    if nested:
        return f"no safetensors at the top level; give the folder that holds them ({nested[0]})"
    return "no *.safetensors files; this is not a Hugging Face checkpoint"


def shards_of_index(selection: Selection, weight_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the sorted shard files to read, given the `weight_map` of the selection's index.

    `model.safetensors` beside an index that does not name it wins, as it does in transformers.
    """
    named = sorted(set(weight_map.values()))
    if selection.shards and SINGLE_NAME not in named:
        return selection.shards
    return tuple(named)
