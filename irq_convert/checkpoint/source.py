"""A checkpoint folder opened for reading: its tensors, its configuration and the files beside them.

Everything is learnt from headers and small JSON files; no tensor data is read. What cannot be read
completely is refused here, before any work is done.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.decoded import decode_source
from irq_convert.checkpoint.fetcher import Fetcher, ReadOrder
from irq_convert.checkpoint.header import ShardHeader, TensorInfo
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import (
    HEADERS_ONLY_NAME,
    Selection,
    is_hidden,
    is_left_out,
    shards_of_index,
)
from irq_convert.checkpoint.source_formats import SourceFormat, find_format
from irq_convert.checkpoint.system import os_errors, require_utf8
from irq_convert.errors import IrqError, UsageError

CONFIG_NAME = "config.json"
PLAIN = "safetensors"
"""The format that needs no mention."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `shards` are the weight files read, sorted by name; `tensors` lists every tensor in them in file
    order (shard, then offset). `config` is `config.json`, None when there is none.
    `other_files` are relative posix paths of every file to carry over unchanged. `left_out` are
    files that are neither read nor carried over: weights in other formats, second copies and
    subfolders, and all of `original/` where the weights are not from there.
    `headers_only` marks a folder whose tensors have no data (see `locate`). `fetcher` brings the
    shards to `folder` as they are needed; for a local folder it has nothing to do. `source_format`
    names the kind of the files and `encoding` how packed weights in them are stored, None where
    all are dense; `file_bytes` is what the shards take on the disk. `dropped` are tensors that are
    left out and why, `unknown` what only its user can say of the model before one can be made.
    """

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None
    index_metadata: dict[str, Any]
    other_files: tuple[str, ...]
    repo_id: str | None = None
    revision: str | None = None
    left_out: tuple[str, ...] = ()
    shard_metadata: dict[Path, dict[str, str]] = field(default_factory=dict)
    headers_only: bool = False
    fetcher: Fetcher = field(default_factory=Fetcher, compare=False)
    source_format: str = PLAIN
    dropped: tuple[tuple[str, str], ...] = ()
    unknown: str | None = None
    encoding: str | None = None
    file_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together, as they are read: of packed ones, dense bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def files_of(self, info: TensorInfo) -> list[str]:
        """The files that a tensor is read from, relative to `folder`: their names for `fetcher`."""
        return [path.relative_to(self.folder).as_posix() for path in info.files]

    def read_order(self, infos: Iterable[TensorInfo]) -> ReadOrder:
        """What a `TileReader` that reads `infos`, in this order, asks for each file."""
        return ReadOrder(self.fetcher, self.folder, map(self.files_of, infos))


def open_checkpoint(
    folder: Path,
    repo_id: str | None = None,
    revision: str | None = None,
    hints: SourceHints | None = None,
) -> Checkpoint:
    """Open the checkpoint in `folder`; `repo_id` and `revision` are noted in the result.

    `hints` tell what the files do not, of formats that need it.

    Which weight files are read is decided by `source_formats.find_format`. A tensor that lies in an
    indexed shard but is missing from the index is read like any other: transformers would ignore
    it, but dropping data without a word is worse than keeping it.

    Raises `UsageError` when `folder` is not a readable folder, and `IrqError` when it holds no
    weights of a format that is read, an index names a missing shard or a tensor that its shard
    lacks, two shards hold the same tensor, a file lies outside the folder (`..`, an absolute path,
    a symbolic link; links inside a Hub cache are fine), a header is damaged, a name is not UTF-8,
    or `config.json` is not a JSON object.
    """
    folder = Path(folder)
    files = _list_folder(folder)
    fence = _Fence(folder)
    sizes = _headers_only_sizes(folder)
    source_format, selection = find_format(files, str(folder))
    weight_map, index_metadata = _read_index(folder, fence, selection)
    names = shards_of_index(selection, weight_map) if weight_map else selection.shards
    if not set(names) <= set(weight_map.values()):  # the index is not the one of these files
        selection, weight_map, index_metadata = Selection(names), {}, {}
    headers = [_open_shard(source_format, fence, name, selection.index, sizes) for name in names]
    _check_index(weight_map, dict(zip(names, headers, strict=True)), selection)
    away = [name for name in files if is_left_out(name, names)]
    beside = [fence.check(name) for name in files if name not in away]
    raw = read_json_object(folder / CONFIG_NAME) if CONFIG_NAME in beside else None
    hints = replace(
        hints or SourceHints(), called=repo_id or folder.resolve().name, headers_only=bool(sizes)
    )
    arranged = decode_source(source_format.arrange(headers, folder, raw, hints), folder, beside)
    return Checkpoint(
        folder=folder,
        shards=tuple(header.path for header in headers),
        tensors=arranged.tensors,
        config=arranged.config,
        index_metadata=index_metadata,
        other_files=tuple(name for name in beside if name not in arranged.gone),
        repo_id=repo_id,
        revision=revision,
        left_out=tuple(name for name in away if name not in (*names, selection.index)),
        shard_metadata={header.path: header.metadata for header in headers},
        headers_only=sizes is not None,
        source_format=source_format.name,
        dropped=arranged.dropped,
        unknown=arranged.unknown,
        encoding=arranged.encoding,
        file_bytes=_file_bytes(folder, names, sizes or {}),
    )


class _Fence:
    """Keeps reading inside the checkpoint folder, or inside the Hub cache entry it belongs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        real = folder.resolve()
        self.allowed = [real]
        if real.parent.name == "snapshots":  # Hub cache: snapshots/<rev>/x -> ../../blobs/<hash>
            self.allowed.append(real.parent.parent / "blobs")

    def check(self, name: str) -> str:
        """Return the relative `name` if the file it leads to is inside; `IrqError` otherwise."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise IrqError(f"{self.folder}: {name!r} leads outside the folder; refused")
        path = self.folder / name
        with os_errors("follow it", path):
            real = path.resolve()
        if not any(real.is_relative_to(root) for root in self.allowed):
            raise IrqError(
                f"{path}: a symbolic link to {real}, outside the folder; replace it by a copy"
            )
        return name


def _list_folder(folder: Path) -> list[str]:
    """The files of a checkpoint; `UsageError` where `folder` is none that can be listed."""
    with os_errors("look at it", folder):
        exists, is_folder = folder.exists(), folder.is_dir()
    if not exists:
        raise UsageError(f"{folder}: no such folder")
    if not is_folder:
        raise UsageError(f"{folder}: a file, not a folder; give the folder that holds it")
    require_utf8(folder, folder.resolve().name)
    with os_errors("list it", folder):
        return _list_files(folder)


def _list_files(folder: Path) -> list[str]:
    """Return the sorted relative paths of all regular files; links to folders are not entered."""
    found: list[str] = []

    def fail(error: OSError) -> None:
        with os_errors("list it", Path(error.filename or folder)):
            raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        base = Path(root).relative_to(folder)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path, relative = Path(root) / name, (base / name).as_posix()
            if is_hidden(relative):
                continue
            require_utf8(path, relative)
            if path.is_symlink() and not path.exists():
                raise IrqError(f"{path}: a symbolic link to nothing; get the file or remove it")
            if path.is_file():
                found.append(relative)
    return sorted(found)


def _headers_only_sizes(folder: Path) -> dict[str, int] | None:
    path = folder / HEADERS_ONLY_NAME
    return read_json_object(path) if path.is_file() else None


def _file_bytes(folder: Path, names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """What the files take, those that are cut off by their true `sizes`."""
    with os_errors("look at its files", folder):
        return sum(sizes.get(name) or (folder / name).stat().st_size for name in names)


def parse_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read an index file: (tensor name to shard name, metadata); `IrqError` when malformed."""
    index = read_json_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IrqError(f"{path}: has no weight_map of tensor names to files; download it again")
    suffix = "." + path.name.split(".")[-3]  # model.safetensors.index.json
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(suffix):
            raise IrqError(f"{path}: tensor {tensor!r} is in {name!r}, not a *{suffix} file")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _read_index(
    folder: Path, fence: _Fence, selection: Selection
) -> tuple[dict[str, str], dict[str, Any]]:
    if selection.index is None:
        return {}, {}
    return parse_index(folder / fence.check(selection.index))


def _open_shard(
    source_format: SourceFormat,
    fence: _Fence,
    name: str,
    index: str | None,
    sizes: Mapping[str, int] | None,
) -> ShardHeader:
    path = fence.folder / fence.check(name)
    if not path.exists():
        raise IrqError(f"{path}: named by {index} but missing; download or copy it again")
    return source_format.read_header(path, None if sizes is None else sizes.get(name))


def _check_index(
    weight_map: Mapping[str, str], headers: Mapping[str, ShardHeader], selection: Selection
) -> None:
    for tensor, name in weight_map.items():
        if name in headers and tensor not in headers[name].tensors:
            raise IrqError(
                f"{headers[name].path}: lacks tensor {tensor!r}, which {selection.index} places "
                "there; index and shards are from different saves: download both again"
            )
