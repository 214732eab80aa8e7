"""The formats that a source's weights may come in: one row each, the first that fits is read.

A format tells from names alone which files it would read (so that one rule serves a local folder
and a file list of the Hub), reads the header of such a file, and puts together what the headers
list. A further format is a row of `FORMATS`; what `TileReader` is to read of it, a `TensorInfo` has
to say, a lazy one where no file holds the tensor as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.arranged import Arranged, SourceHints, merged
from irq_convert.checkpoint.header import ShardHeader, read_header
from irq_convert.checkpoint.layout import (
    Selection,
    select_meta,
    select_pickles,
    select_safetensors,
    why_nothing,
)
from irq_convert.checkpoint.meta_layout import arrange_meta
from irq_convert.checkpoint.pickled import read_pickle
from irq_convert.checkpoint.remote_header import fetch_header
from irq_convert.checkpoint.remote_pickle import FetchRange, fetch_pickle
from irq_convert.checkpoint.state_dict import arrange_pickles
from irq_convert.errors import IrqError


def _as_they_are(
    headers: Sequence[ShardHeader], folder: Path, config: dict[str, Any] | None, hints: SourceHints
) -> Arranged:
    return Arranged(merged(headers), config)


@dataclass(frozen=True)
class SourceFormat:
    """`select` chooses among relative posix paths, None where nothing is of the format.

    `read_header` is given a file and, where it holds no data, its true size; `fetch_header` makes
    such a file of one on the Hub, from a way to fetch ranges of it, its name and size;
    `arrange` all headers, the folder, config.json where there is one, and what else is known.
    """

    name: str
    select: Callable[[Collection[str]], Selection | None]
    read_header: Callable[[Path, int | None], ShardHeader]
    fetch_header: Callable[[FetchRange, Path, int], bytes]
    arrange: Callable[[Sequence[ShardHeader], Path, dict[str, Any] | None, SourceHints], Arranged]


FORMATS = (
    SourceFormat("safetensors", select_safetensors, read_header, fetch_header, _as_they_are),
    SourceFormat("pickle", select_pickles, read_pickle, fetch_pickle, arrange_pickles),
    SourceFormat("meta", select_meta, read_pickle, fetch_pickle, arrange_meta),
)


def find_format(paths: Collection[str], where: str) -> tuple[SourceFormat, Selection]:
    """The format of a checkpoint called `where`, by its file names, and the files to read.

    Raises `IrqError` when there is nothing to read, saying how to convert what there is.
    """
    for source_format in FORMATS:
        selection = source_format.select(paths)
        if selection is not None:
            return source_format, selection
    raise IrqError(f"{where}: {why_nothing(paths)}")
