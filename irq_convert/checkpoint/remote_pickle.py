"""The pickle of a file of `torch.save` on the Hub, without the tensors in it.

A zip file has its list of entries at the end and torch puts the pickle first, so a few requests get
both. What is kept is a small zip file of the same entries, all but the pickle empty, with one more
that says where the data of each lies in the true file.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from irq_convert.checkpoint.pickled import OFFSETS, entry_start
from irq_convert.errors import IrqError, one_line

FetchRange = Callable[[int, int], bytes]
"""Bytes `start` to `stop` of a file."""

_BLOCK = 1 << 18
_SMALL = ("data.pkl", "byteorder", "version", ".storage_alignment")
_LAYOUT = ".format_version"
"""Tells torch to compute places of storages by their sizes, which is wrong in the small file."""
_DESCRIPTORS = (0, 16, 24)  # behind the data of an entry, without and with 64-bit sizes
_ALIGNED = 64


def fetch_pickle(fetch: FetchRange, path: Path, size: int) -> bytes:
    """The small file for the one of `size` bytes at `path`.

    Raises `IrqError` where the file is no zip file of torch.
    """
    try:
        with zipfile.ZipFile(_Ranges(fetch, size)) as archive:
            return _small_copy(archive, fetch, size)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise IrqError(
            f"{path}: {one_line(error)}: not a zip file as torch.save has written them since 1.6: "
            "take another copy of the model"
        ) from None


def _small_copy(archive: zipfile.ZipFile, fetch: FetchRange, size: int) -> bytes:
    entries = archive.infolist()
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir or size]
    starts = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as copy:
        for entry, end in zip(entries, ends, strict=True):
            if entry.filename.rpartition("/")[2] == _LAYOUT:
                continue
            starts[entry.filename] = _start(entry, end, fetch)
            small = entry.filename.rpartition("/")[2] in _SMALL
            kept = zipfile.ZipInfo(entry.filename)
            # One that is compressed is refused when the small file is read.
            kept.compress_type = entry.compress_type
            copy.writestr(kept, archive.read(entry) if small else b"")
        prefix = entries[0].filename.partition("/")[0]
        copy.writestr(f"{prefix}/{OFFSETS}", json.dumps(starts))
    return buffer.getvalue()


def _start(entry: zipfile.ZipInfo, end: int, fetch: FetchRange) -> int:
    """Where the data of an entry begins: by its end, as torch aligns it, else by asking."""
    first = entry.header_offset + 30 + len(entry.filename.encode())
    found = [end - entry.file_size - behind for behind in _DESCRIPTORS]
    aligned = [at for at in found if at >= first and at % _ALIGNED == 0]
    if len(aligned) == 1:
        return aligned[0]
    return entry_start(entry, fetch(entry.header_offset, entry.header_offset + 30))


class _Ranges(io.RawIOBase):
    """A file that is read by blocks as they are asked for."""

    def __init__(self, fetch: FetchRange, size: int) -> None:
        self._fetch, self._size, self._at = fetch, size, 0
        self._blocks: dict[int, bytes] = {}

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._at + size)
        found = bytearray()
        while self._at < stop:
            number, skip = divmod(self._at, _BLOCK)
            piece = self._block(number)[skip : skip + stop - self._at]
            if not piece:
                raise EOFError("the file ends early")
            found += piece
            self._at += len(piece)
        return bytes(found)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * _BLOCK
            self._blocks[number] = self._fetch(start, min(self._size, start + _BLOCK))
        return self._blocks[number]
