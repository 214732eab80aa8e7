"""The formats that a source's weights may come in: one row each, the first that fits is read.

A format tells from names alone which files it would read (so that one rule serves a local folder
and a file list of the Hub), and reads the header of such a file. A further format is a row of
`FORMATS`; what `TileReader` is to read of it, a `TensorInfo` has to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from irq_convert.checkpoint.header import ShardHeader, read_header
from irq_convert.checkpoint.layout import Selection, select_safetensors, why_nothing
from irq_convert.errors import IrqError


@dataclass(frozen=True)
class SourceFormat:
    """`select` chooses among relative posix paths, None where nothing is of the format.

    `read_header` is given a file and, where it was cut off behind its header, its true size.
    """

    name: str
    select: Callable[[Collection[str]], Selection | None]
    read_header: Callable[[Path, int | None], ShardHeader]


FORMATS = (SourceFormat("safetensors", select_safetensors, read_header),)


def find_format(paths: Collection[str], where: str) -> tuple[SourceFormat, Selection]:
    """The format of a checkpoint called `where`, by its file names, and the files to read.

    Raises `IrqError` when there is nothing to read, saying how to convert what there is.
    """
    for source_format in FORMATS:
        selection = source_format.select(paths)
        if selection is not None:
            return source_format, selection
    raise IrqError(f"{where}: {why_nothing(paths)}")
