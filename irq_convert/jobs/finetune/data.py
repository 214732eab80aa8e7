"""A data file as examples: read, held-out part split off, tokenized, cut, checked and counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.files import sha256_file
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.rows import DataRow, holds_rows, read_rows
from irq_convert.jobs.common.text import encode_stream, read_text, split_text
from irq_convert.jobs.finetune.encode import Example, encode_script
from irq_convert.jobs.finetune.prompts import script

SPLIT_SEED = 0
_HELD_OUT = "; give --holdout 0, or a file with --eval-data"


@dataclass(frozen=True)
class Split:
    """Examples with what was lost on the way.

    `truncated` were cut to the sequence length; `dropped` had nothing left to learn, as their
    prompts alone fill it or their answers are empty. `unused` are fields of rows that went nowhere.
    """

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    unused: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def learned(self) -> int:
        """Tokens that are predicted."""
        return sum(example.learned for example in self.examples)

    def to_dict(self) -> dict[str, int]:
        """Counts, for JSON."""
        return {
            "examples": len(self.examples),
            "tokens": self.tokens,
            "learned_tokens": self.learned,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class FileFacts:
    """A data file, named without its folder."""

    name: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """What is trained on and what is held out (None where nothing is), and where it came from."""

    kind: str
    train: Split
    heldout: Split | None
    file: FileFacts
    eval_file: FileFacts | None

    @property
    def tokens_sha256(self) -> str:
        """Of all that is read and learned, in its order."""
        digest = hashlib.sha256()
        for split in (self.train, self.heldout):
            for example in split.examples if split is not None else ():
                digest.update(len(example.ids).to_bytes(8, "little"))
                for part in (example.ids, example.labels):
                    digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields of rows that went into no example, each once."""
        held = () if self.heldout is None else self.heldout.unused
        return tuple(sorted({*self.train.unused, *held}))

    def to_dict(self) -> dict[str, Any]:
        """Facts for the record of the run."""
        return {
            "kind": self.kind,
            "file": self.file.to_dict(),
            "eval_file": None if self.eval_file is None else self.eval_file.to_dict(),
            "train": self.train.to_dict(),
            "heldout": None if self.heldout is None else self.heldout.to_dict(),
        }


def load_data(
    path: Path,
    eval_path: Path | None,
    tokenizer: Any,
    *,
    length: int,
    holdout: float,
    vocabulary: int | None,
) -> Data:
    """Read `path`, and hold out the fraction `holdout` of it or else the file `eval_path`.

    Of a text the last part is held out, of rows a random choice that is the same for every seed
    and tokenizer.

    Raises `UsageError` where a file does not exist, there is too little to hold out from, or a
    token id is not below `vocabulary`; `IrqError` where a file cannot be read, is empty, not UTF-8,
    not JSON, lacks the fields, or nothing in it can be learned.
    """
    if holds_rows(path):
        rows = read_rows(path)
        kept, held = _split_rows(path, rows, holdout)
        train = _encode_rows(path, kept, tokenizer, length)
        heldout = _encode_rows(path, held, tokenizer, length, _HELD_OUT) if held else None
    else:
        text, rest = split_text(read_text(path), 1 - holdout) if holdout else (read_text(path), "")
        train = _encode_text(path, text, tokenizer, length)
        heldout = _encode_text(path, rest, tokenizer, length) if holdout else None
    if eval_path is not None:
        heldout = _whole_file(eval_path, tokenizer, length)
    for part in (train, heldout):
        if part is not None and vocabulary is not None:
            _check_ids(part, vocabulary)
    eval_file = None if eval_path is None else _facts(eval_path)
    return Data("rows" if holds_rows(path) else "text", train, heldout, _facts(path), eval_file)


def _whole_file(path: Path, tokenizer: Any, length: int) -> Split:
    if holds_rows(path):
        return _encode_rows(path, read_rows(path), tokenizer, length)
    return _encode_text(path, read_text(path), tokenizer, length)


def _split_rows(
    path: Path, rows: list[DataRow], holdout: float
) -> tuple[list[DataRow], list[DataRow]]:
    """Rows to train on and rows held out, both in the order of the file."""
    if not holdout:
        return rows, []
    if len(rows) < 2:
        raise UsageError(
            f"{path}: one row cannot be split; give --holdout 0 or a file with --eval-data"
        )
    count = min(len(rows) - 1, max(1, round(holdout * len(rows))))
    held = set(random.Random(SPLIT_SEED).sample(range(len(rows)), count))
    return (
        [row for at, row in enumerate(rows) if at not in held],
        [row for at, row in enumerate(rows) if at in held],
    )


def _encode_rows(
    path: Path, rows: Sequence[DataRow], tokenizer: Any, length: int, way_out: str = ""
) -> Split:
    examples, truncated, dropped = [], 0, 0
    unused: set[str] = set()
    for row in rows:
        parts = script(row, tokenizer)
        unused |= parts.unused
        whole = encode_script(parts, tokenizer)
        example = Example(whole.ids[:length], whole.labels[:length])
        answered = any(piece.learned and piece.text.strip() for piece in parts.pieces)
        if not (answered and example.learned):
            dropped += 1
            continue
        truncated += len(whole.ids) > length
        examples.append(example)
    if not examples:
        which = f"the {len(rows)} rows held out" if way_out else f"{len(rows)} rows"
        raise IrqError(
            f"{path}: nothing to learn in {which}: answers are empty, or prompts alone fill "
            f"--sequence-length {length}{way_out}"
        )
    return Split(tuple(examples), truncated, dropped, tuple(sorted(unused)))


def _encode_text(path: Path, text: str, tokenizer: Any, length: int) -> Split:
    """One packed stream cut into windows of `length`; a last, shorter one of 2 tokens is kept."""
    ids = encode_stream(tokenizer, text)
    windows = [window.clone() for window in ids.split(length) if len(window) >= 2]
    if not windows:
        raise IrqError(
            f"{path}: gives {len(ids)} tokens to train on or to hold out, at least 2 are needed; "
            "give more text, or --holdout 0"
        )
    return Split(tuple(Example(window, window) for window in windows), 0, 0)


def _check_ids(part: Split, vocabulary: int) -> None:
    largest = max(int(example.ids.max()) for example in part.examples)
    if largest >= vocabulary:
        raise UsageError(
            f"the tokenizer gives id {largest} but the model's vocabulary has {vocabulary}: use "
            "the model's own tokenizer"
        )


def _facts(path: Path) -> FileFacts:
    return FileFacts(path.name, sha256_file(path))
