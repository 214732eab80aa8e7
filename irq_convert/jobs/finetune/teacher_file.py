"""The file of a teacher's logits: what it says of each token of the examples, its top k alone.

One safetensors file. A row for each token that has a next one, example by example, those trained on
first: `ids`, the teacher's k most likely next tokens, U16 `[rows, k]` where the vocabulary fits and
else I32, and `log_p`, F16 `[rows, k + 1]`, their log-probabilities and in the last column the log
of all other tokens' mass. The metadata say whose they are and of which tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irq_convert.checkpoint.buffers import tensor_bytes
from irq_convert.checkpoint.header import ShardHeader, read_header
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec, build_header
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.finetune.data import Data, Split
from irq_convert.jobs.finetune.encode import Example
from irq_convert.version import PRODUCER

FORMAT, FORMAT_VERSION = "irq teacher logits", "1"
TOP = 64
"""Tokens that are kept of a distribution, unless the vocabulary has fewer."""
LEAST = -65504.0
"""The lowest log-probability in float16; its mass is 0 in float32."""
_CHECKED_ROWS = 1 << 16
_ROUNDING = 0.01
"""What float16 may make of the sum of a row's probabilities, and more."""
_AGAIN = "name another --teacher-logits, or remove it to have it made again"


@dataclass(frozen=True)
class TaughtExample(Example):
    """An example whose rows in the teacher's file begin with `at`."""

    at: int = 0

    @property
    def rows(self) -> int:
        """Tokens that have a next one."""
        return len(self.ids) - 1


def number_rows(data: Data) -> Data:
    """The same data, each example knowing its rows."""
    train, at = _numbered(data.train, 0)
    held = None if data.heldout is None else _numbered(data.heldout, at)[0]
    return replace(data, train=train, heldout=held)


def _numbered(split: Split, at: int) -> tuple[Split, int]:
    found = []
    for example in split.examples:
        found.append(TaughtExample(example.ids, example.labels, at))
        at += found[-1].rows
    return replace(split, examples=tuple(found)), at


def all_examples(data: Data) -> list[TaughtExample]:
    """Those trained on and those held out, in the order of their rows."""
    every = (*data.train.examples, *(() if data.heldout is None else data.heldout.examples))
    return [example for example in every if isinstance(example, TaughtExample)]


@dataclass(frozen=True)
class Contents:
    """What a file holds, or is to hold: `source` is the teacher, `rows` of a `vocabulary`."""

    source: Mapping[str, Any]
    tokens_sha256: str
    rows: int
    vocabulary: int

    @classmethod
    def of(
        cls, source: Mapping[str, Any], examples: Sequence[TaughtExample], vocabulary: int
    ) -> Contents:
        """Of a teacher's logits on `examples`."""
        digest = hashlib.sha256()
        for example in examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(example.ids.numpy().astype("<i8").tobytes())
        rows = sum(example.rows for example in examples)
        return cls(source, digest.hexdigest(), rows, vocabulary)

    @property
    def k(self) -> int:
        """Tokens kept of each distribution."""
        return min(TOP, self.vocabulary)

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the file."""
        dtype = "U16" if self.vocabulary <= 1 << 16 else "I32"
        return [
            TensorSpec("ids", dtype, (self.rows, self.k)),
            TensorSpec("log_p", "F16", (self.rows, self.k + 1)),
        ]

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says, in its order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "producer": PRODUCER,
            "source": json.dumps(dict(self.source), sort_keys=True),
            "tokens_sha256": self.tokens_sha256,
            "k": str(self.k),
            "vocabulary": str(self.vocabulary),
        }

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        head = len(build_header(self.specs, self.metadata))
        return head + sum(spec.nbytes for spec in self.specs)


class LogitsWriter:
    """Writes the file `path`, whole or not at all; a context manager."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self._contents = contents
        self._file = ShardWriter(path, contents.specs, contents.metadata)

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def write(self, at: int, logits: Tensor) -> None:
        """The rows from `at` on, from the teacher's `logits`, float `[n, vocabulary]`.

        Raises `IrqError` where they are not finite.
        """
        log_p = logits.float().log_softmax(1)
        if not bool(log_p.isfinite().all()):
            raise IrqError(
                f"--teacher {self._contents.source['model']}: gives NaN or infinite logits on this "
                "data: check its weights, or train without it"
            )
        top, ids = log_p.topk(self._contents.k, 1)
        rest = log_p.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        kept = torch.cat([top, rest], 1).clamp_min(LEAST).to(torch.float16)
        stored = torch.uint16 if self._contents.vocabulary <= 1 << 16 else torch.int32
        for name, rows in (("ids", ids.to("cpu", torch.int32).to(stored)), ("log_p", kept.cpu())):
            width = rows.shape[1] * rows.itemsize
            self._file.write(name, tensor_bytes(rows.contiguous()), at * width)


@dataclass
class TeacherLogits:
    """An opened file; rows are read as they are asked for."""

    path: Path
    header: ShardHeader
    reader: TileReader = field(default_factory=TileReader)

    def rows(self, at: int, count: int) -> tuple[Tensor, Tensor]:
        """`ids` int32 `[count, k]` and `log_p` float16 `[count, k + 1]` of the rows from `at`."""
        tensors = self.header.tensors
        ids = self.reader.read_rows(tensors["ids"], at, at + count)
        return ids.to(torch.int32), self.reader.read_rows(tensors["log_p"], at, at + count)

    @property
    def k(self) -> int:
        """Tokens kept of each distribution."""
        return self.header.tensors["ids"].shape[1]

    def close(self) -> None:
        """Rows are not read any more."""
        self.reader.close()


def open_logits(path: Path, wanted: Contents, *, checked: bool = True) -> TeacherLogits:
    """Open the file `path`, which has to hold what is `wanted`; `checked` reads all of it.

    Raises `UsageError` for a file of another teacher, of other data or of another kind, `IrqError`
    for one that is damaged.
    """
    try:
        header = read_header(path)
    except IrqError as error:
        raise IrqError(f"{path}: cut off, damaged, or not safetensors: {_AGAIN}") from error
    _check_metadata(path, header.metadata, wanted)
    for spec in wanted.specs:
        found = header.tensors.get(spec.name)
        if found is None or (found.dtype, found.shape) != (spec.dtype, spec.shape):
            raise IrqError(f"{path}: has no {spec.name} {spec.dtype} {list(spec.shape)}: {_AGAIN}")
    logits = TeacherLogits(path, header)
    if checked:
        try:
            _check_values(logits, wanted)
        except BaseException:
            logits.close()
            raise
    return logits


def _check_metadata(path: Path, found: Mapping[str, str], wanted: Contents) -> None:
    if found.get("format") != FORMAT:
        raise UsageError(f"{path}: no file of a teacher's logits; name another --teacher-logits")
    expected = wanted.metadata
    what = {
        "format_version": "of another version of its format",
        "source": f"made by another teacher than {wanted.source['model']}{_named(found)}",
        "tokens_sha256": "made of other data, lengths or held-out part",
        "vocabulary": "of another vocabulary",
        "k": f"of {found.get('k')} tokens a position, and {wanted.k} are kept now",
    }
    for key, says in what.items():
        if found.get(key) != expected[key]:
            raise UsageError(f"{path}: {says}: {_AGAIN}")


def _named(metadata: Mapping[str, str]) -> str:
    """The model that a file is of, in brackets, where it tells one of another name."""
    try:
        return f" ({json.loads(metadata['source'])['model']})"
    except (KeyError, TypeError, ValueError):
        return ""


def _check_values(logits: TeacherLogits, wanted: Contents) -> None:
    for at in range(0, wanted.rows, _CHECKED_ROWS):
        ids, log_p = logits.rows(at, min(_CHECKED_ROWS, wanted.rows - at))
        if not bool(log_p.isfinite().all()):
            raise IrqError(f"{logits.path}: has NaN or infinite log-probabilities: {_AGAIN}")
        if not bool(((log_p.float().exp().sum(1) - 1).abs() < _ROUNDING).all()):
            raise IrqError(f"{logits.path}: has probabilities that are not 1 together: {_AGAIN}")
        if int(ids.min()) < 0 or int(ids.max()) >= wanted.vocabulary:
            raise IrqError(f"{logits.path}: has ids beyond the vocabulary: {_AGAIN}")
