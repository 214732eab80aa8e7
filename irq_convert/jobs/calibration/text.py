"""From a text to windows of tokens to calibrate with: read, tokenize, cut, choose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from irq_convert.checkpoint.system import expand_home
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.rows import DataRow, holds_rows, read_rows
from irq_convert.jobs.common.text import CHARACTERS_A_TOKEN, encode_stream, read_text

UNKNOWN = 0.5
"""A text of which more tokens are unknown than this part is not in the model's language."""


class TextChoice(Protocol):
    """What a job's options say of its text: a file or a dataset, and how much of it is taken."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Windows:
    """`ids` int64 `[windows, tokens]`, those to calibrate with first; `held_out` come last.

    `name` says where they are from, without a path, and `sha256` is of the ids.
    """

    ids: torch.Tensor
    held_out: int
    name: str

    @property
    def calibrating(self) -> int:
        """How many are not held out."""
        return len(self.ids) - self.held_out

    @property
    def sha256(self) -> str:
        """A hash of the ids and their order."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "text": self.name,
            "tokens_sha256": self.sha256,
            "windows": len(self.ids),
            "held_out": self.held_out,
            "window": self.ids.shape[1],
        }


def choose_windows(ids: torch.Tensor, options: CalibrationOptions, name: str) -> Windows:
    """Cut `ids`, int64 `[tokens]`, into windows, and take as many as are asked for, by the seed.

    Raises `UsageError` when there are not two.
    """
    width = options.width
    there = len(ids) // width
    if there < 2:
        raise UsageError(
            f"{name}: {len(ids)} tokens, which are not two windows of {width}, one to calibrate "
            "and one to judge: give more text or a smaller --calibration-window"
        )
    wanted = min(there, options.tokens // width)
    taken = _taken(there, wanted, options.seed)
    held = [n for n in range(wanted) if n % options.held_out == options.held_out - 1]
    held = held or [wanted - 1]
    order = [n for n in range(wanted) if n not in set(held)] + held
    cut = ids[: there * width].view(there, width)
    return Windows(cut[[taken[n] for n in order]].contiguous(), len(held), name)


def take_windows(ids: torch.Tensor, choice: TextChoice, name: str) -> Windows:
    """`choose_windows` where nothing is judged: none is held out.

    Raises `UsageError` when there is not one.
    """
    width = choice.width
    there = len(ids) // width
    if not there:
        raise UsageError(
            f"{name}: {len(ids)} tokens, which are not one window of {width}: give more text or a "
            "smaller --window"
        )
    taken = _taken(there, max(1, min(there, choice.tokens // width)), choice.seed)
    return Windows(ids[: there * width].view(there, width)[taken].contiguous(), 0, name)


def _taken(there: int, wanted: int, seed: int) -> list[int]:
    """Which of the windows that are there are taken, in the order of the text."""
    return sorted(_draw(there, seed)[:wanted]) if wanted < there else list(range(there))


def _draw(count: int, seed: int) -> list[int]:
    """A permutation that depends on the seed alone, on every machine and version."""
    keys = [hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def tokenize_source(options: TextChoice, tokenizer: Any) -> tuple[torch.Tensor, str]:
    """The tokens of the text that `options` name, as one stream, and a name for it.

    Raises `UsageError` or `IrqError` for a text that cannot be read, is empty, or is mostly
    unknown to the tokenizer.
    """
    path = expand_home(options.text)
    most = options.tokens * CHARACTERS_A_TOKEN
    if path.exists() or not _is_dataset(options.text):
        if holds_rows(path):
            ids = _tokens_of_rows(read_rows(path), tokenizer, options.tokens * 4)
        else:
            ids = encode_stream(tokenizer, read_text(path)[:most])
        name = path.name
    else:
        ids = _tokens_of_rows(_dataset_rows(options.text), tokenizer, options.tokens * 4)
        name = options.text
    _check_known(ids, tokenizer, name)
    return ids, name


def _check_known(ids: torch.Tensor, tokenizer: Any, name: str) -> None:
    unknown = tokenizer.unk_token_id
    if unknown is None or not len(ids):
        return
    part = float((ids == unknown).double().mean())
    if part > UNKNOWN:
        raise IrqError(
            f"{name}: the tokenizer does not know {part:.0%} of its tokens: give a text in a "
            "language and script of the model"
        )


def _tokens_of_rows(rows: Iterable[DataRow], tokenizer: Any, most: int) -> torch.Tensor:
    """Rows with a field `text` or `messages`, each tokenized for itself, up to `most` tokens."""
    found: list[int] = []
    for row in rows:
        found += _tokens_of_row(row, tokenizer)
        if len(found) >= most:
            break
    return torch.tensor(found, dtype=torch.int64)


def _tokens_of_row(row: DataRow, tokenizer: Any) -> list[int]:
    fields = row.fields
    if isinstance(fields.get("text"), str):
        return list(tokenizer(fields["text"], verbose=False)["input_ids"])
    if isinstance(fields.get("messages"), list):
        try:
            text = tokenizer.apply_chat_template(fields["messages"], tokenize=False)
        except Exception as error:  # a template is a program
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise IrqError(f"{row.where}: the chat template fails: {reason}") from error
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])
    known = ", ".join(sorted(fields)) or "none"
    raise IrqError(f'{row.where}: no field "text" or "messages" (fields: {known})')


def _is_dataset(name: str) -> bool:
    """Whether `name`, which is no file, may be that of a Hub dataset, `owner/name[:split]`."""
    owner, _, rest = name.partition("/")
    return bool(owner) and bool(rest) and "/" not in rest and not Path(name).suffix


def _dataset_rows(name: str) -> Iterable[DataRow]:
    repo, _, split = name.partition(":")
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(
            f"{name}: no such text file; for a dataset of the Hub `pip install datasets`, or give "
            "a file"
        ) from None
    try:
        rows = datasets.load_dataset(repo, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield DataRow(f"{name}: row {number}", dict(row))
    except IrqError:
        raise
    except Exception as error:  # the library raises nearly every kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise IrqError(f"{name}: cannot be loaded as a dataset: {reason}") from error
