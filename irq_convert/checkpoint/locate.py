"""Where a model is: an existing local folder, or a Hugging Face Hub id that is downloaded."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from irq_convert.checkpoint import hub
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import UsageError


@dataclass(frozen=True)
class Located:
    """A local folder that holds a model and, when it came from the Hub, its id and commit hash."""

    folder: Path
    repo_id: str | None = None
    revision: str | None = None


def locate(model: str, revision: str | None = None, *, headers_only: bool = False) -> Located:
    """Find the model called `model`: a folder if one exists there, else a Hub id.

    A Hub model is downloaded into the Hub cache, or taken from it, at `revision` (branch, tag or
    commit; by default the main branch): the safetensors files that `open_checkpoint` would read and
    every file that is not a weight file. With `headers_only` the data of the weights is not
    downloaded: the folder then holds each shard cut off after its header, enough for
    `open_checkpoint`, while reading a tensor from it is an `IrqError`.
    A local folder inside a Hub cache reports the id and commit it belongs to.

    Raises `UsageError` for a file, a path that does not exist, a name that cannot be a Hub id, or a
    `revision` for a local folder; `IrqError` when the Hub or its cache does not provide the model.
    """
    if not model:
        raise UsageError("no model given; give a folder or a Hub id")
    path = Path(model).expanduser()
    with os_errors("look at it", path):
        exists, is_folder = path.exists(), path.is_dir()
    if exists:
        if not is_folder:
            raise UsageError(f"{model}: a file, not a folder; give the folder that holds it")
        if revision is not None:
            raise UsageError(f"{model}: a local folder has no revisions; leave out the revision")
        return Located(path, *_cached_origin(path))
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        hint = "; for a Hub model give its id, name or organization/name" if "://" in model else ""
        raise UsageError(f"{model}: no such folder{hint}")
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise UsageError(
            f"{model}: no such folder, and not a Hub id (name or organization/name of letters, "
            "digits, '-', '_' and '.')"
        ) from error
    folder, commit = hub.download(model, revision, headers_only=headers_only)
    return Located(folder, model, commit)


def _cached_origin(folder: Path) -> tuple[str | None, str | None]:
    """Read id and commit off a Hub cache path, `.../models--org--name/snapshots/<commit>`."""
    real = folder.resolve()
    kind, _, name = real.parent.parent.name.partition("--")
    if real.parent.name != "snapshots" or kind != "models" or not name:
        return None, None
    return name.replace("--", "/"), real.name
