"""Weights in files of `torch.save`: where each tensor lies, without running what a pickle says.

torch unpickles with its list of harmless names (`weights_only`) and makes no storage: every tensor
then knows the place of its bytes in the zip file, which `TileReader` reads as it does others.
"""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from irq_convert.checkpoint.buffers import dtype_name
from irq_convert.checkpoint.header import ShardHeader, TensorInfo, tensor_nbytes
from irq_convert.checkpoint.lazy import Strided, lazy_info
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, one_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Under these names training programs keep the weights beside other things."""
OFFSETS = ".irq_offsets"
"""In a small copy of a file on the Hub (`remote_pickle`): where each entry's data lies in it."""
_LOCAL = struct.Struct("<4s22xHH")  # of a zip entry: magic, ..., length of name and of extra field
_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


def read_pickle(path: Path, file_size: int | None = None) -> ShardHeader:
    """The tensors in a file of `torch.save`, in the order of their bytes.

    `file_size` is given for a file that holds no data (see `locate`), only the pickle.
    Raises `IrqError`, naming the file, when it cannot be read, is of torch's old format, is cut
    off, compressed or of a big-endian machine, names code in its pickle, or holds no weights.
    """
    _check_kind(path)
    entries, places = _entries(path)
    tensors = _named_tensors(path, _load(path))
    if file_size is None:
        for name, tensor in tensors.items():
            _check_place(path, name, tensor, entries)
    found = [_info(path, name, tensor, places) for name, tensor in tensors.items()]
    return ShardHeader(path, {i.name: i for i in sorted(found, key=lambda i: i.offset)})


def _check_kind(path: Path) -> None:
    with os_errors("read it", path):
        if not stat.S_ISREG(path.stat().st_mode):  # before open(): opening a pipe would block
            raise IrqError(f"{path}: not a regular file; a file of torch.save is needed")
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    if head.startswith(_LFS):
        raise IrqError(f"{path}: a pointer of Git LFS, not the file: run `git lfs pull`")
    if head.startswith(_ZIP):
        return
    if head.startswith(_PICKLE):
        raise IrqError(
            f"{path}: saved in torch's format from before 1.6, which cannot be read in parts: "
            "torch.load it with weights_only=True and torch.save it again"
        )
    raise IrqError(f"{path}: no file of torch.save: download or save it again")


def _entries(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Length of each entry's data by the place where it begins; checks that all can be read.

    The second is where that place is in the true file, for a small copy of one on the Hub.
    """
    damaged = "the file is cut off or damaged: download it again"
    try:
        with os_errors("read it", path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
            found, names = {}, {}
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise IrqError(
                        f"{path}: {entry.filename} is compressed, as torch.save never writes it, "
                        "and cannot be read in parts: torch.load and torch.save it again"
                    )
                head = os.pread(file.fileno(), _LOCAL.size, entry.header_offset)
                start = entry_start(entry, head)
                found[start], names[entry.filename] = entry.file_size, start
            orders = [e for e in archive.namelist() if e.rpartition("/")[2] == "byteorder"]
            if orders and archive.read(orders[0]) != b"little":
                raise IrqError(f"{path}: saved on a big-endian machine: save it again on another")
            kept = [e for e in archive.namelist() if e.rpartition("/")[2] == OFFSETS]
            true = json.loads(archive.read(kept[0])) if kept else {}
    except zipfile.BadZipFile as error:
        raise IrqError(f"{path}: {one_line(error)}: {damaged}") from None
    return found, {names[entry]: place for entry, place in true.items()}


def entry_start(entry: zipfile.ZipInfo, head: bytes) -> int:
    """Where an entry's data begins, given the bytes at its `header_offset`.

    Raises `zipfile.BadZipFile` where no entry is there.
    """
    if len(head) < _LOCAL.size or not head.startswith(_ZIP):
        raise zipfile.BadZipFile(f"{entry.filename} is not where it should be")
    _, name, extra = _LOCAL.unpack(head[: _LOCAL.size])
    return entry.header_offset + _LOCAL.size + int(name) + int(extra)


def _load(path: Path) -> Any:
    """What was saved, its tensors without data; nothing but torch's harmless names is called."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _named_code(str(error)) or "something"
        raise IrqError(
            f"{path}: its pickle asks for {named} that is no weight, which "
            "is not run: take another copy of the model, in safetensors if there is one"
        ) from None
    except Exception as error:  # of a damaged pickle: nearly every kind
        raise IrqError(f"{path}: cannot be read: {one_line(error)}") from None


def _named_code(text: str) -> str | None:
    """The name that torch refused, out of its message."""
    for before, after in (("Unsupported global: GLOBAL ", " was"), ("GLOBAL ", " ")):
        if before in text:
            return text.split(before, 1)[1].split(after, 1)[0].strip("`'\"")
    return None


def _named_tensors(path: Path, found: Any) -> dict[str, torch.Tensor]:
    """The weights by name, out of a state dict or what holds one under a known name."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            break
        tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
        if tensors:
            for name, tensor in tensors.items():
                if tensor.layout != torch.strided or tensor.is_quantized:
                    raise IrqError(f"{path}: {name} is no plain tensor: save the model dense")
            return tensors
        inner = [found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        if not inner:
            break
        found = inner[0]
    raise IrqError(f"{path}: holds no weights by name: give the file of a state dict")


def _info(path: Path, name: str, tensor: torch.Tensor, places: Mapping[int, int]) -> TensorInfo:
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    storage = tensor.untyped_storage()
    begin = _begin(storage)
    begin = places.get(begin, begin)
    first = int(tensor.storage_offset())
    if tensor.is_contiguous():
        at = begin + first * tensor.element_size()
        return TensorInfo(name, dtype, shape, path, at, tensor_nbytes(dtype, shape))
    size = int(storage.nbytes())
    whole = TensorInfo(name, dtype, (size // tensor.element_size(),), path, begin, size)
    return lazy_info(name, dtype, shape, Strided(whole, shape, tuple(tensor.stride()), first))


def _begin(storage: torch.UntypedStorage) -> int:
    """Where torch found the bytes of a storage that it did not read."""
    return int(getattr(storage, "_checkpoint_offset", None) or 0)


def _check_place(path: Path, name: str, tensor: torch.Tensor, entries: Mapping[int, int]) -> None:
    first = int(tensor.storage_offset())
    reach = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    last = first + sum(reach) + 1 if tensor.numel() else first
    if entries.get(_begin(tensor.untyped_storage()), -1) < last * tensor.element_size():
        raise IrqError(
            f"{path}: ends inside {name} {list(tensor.shape)}: the file is cut off or damaged: "
            "download it again"
        )
