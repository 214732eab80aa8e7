"""The teacher of a run: which model it is, and whether it can teach this artifact on this data.

Only its headers are read here; its weights come layer by layer (`teacher_pass`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.config import QUANT_METHOD
from irq_convert.artifact.source_identity import source_identity
from irq_convert.checkpoint.locate import Fetch, find_folder, open_source
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import LayeredModel, open_layered
from irq_convert.hf.limits import longest_context
from irq_convert.hf.usable import refuse_unusable
from irq_convert.jobs.calibration.source import checkpoint_tokenizer
from irq_convert.jobs.finetune.data import Data
from irq_convert.jobs.finetune.teacher_file import Contents, all_examples, open_logits
from irq_convert.progress import Progress

_INSTEAD = "leave out --teacher to train on labels"


@dataclass(frozen=True)
class Teacher:
    """A model that can teach: as it was asked for, and what its logits will be.

    `file` is where these are kept, None for the state of the run. `layers` and `width` (of hidden
    states) say what running it takes.
    """

    model: str
    contents: Contents
    file: Path | None
    layers: int
    width: int

    @property
    def name(self) -> str:
        """Its Hub id, or the name of its folder without the path."""
        return str(self.contents.source["model"])

    @property
    def revision(self) -> str | None:
        """The commit that was looked at; None of a local folder."""
        return None if find_folder(self.model) else self.contents.source["revision"]

    @property
    def sha256(self) -> str:
        """A hash of all that tells it from another."""
        told = json.dumps(dict(self.contents.source), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def there(self) -> bool:
        """Whether a file was named that holds its logits already."""
        return self.file is not None and self.file.is_file()


def find_teacher(
    model: str, file: Path | None, *, data: Data, tokenizer: Any, config: Any, progress: Progress
) -> Teacher:
    """The teacher `model` of the artifact of `config`, whose examples and tokenizer are given.

    Raises `UsageError` where it cannot teach this artifact or be run layer by layer, or `file` is
    of another run or in no place to be written; `IrqError` for a damaged model or file.
    """
    progress.stage("looking at the teacher")
    checkpoint = open_source(model, None, Fetch.HEADERS)
    try:
        layered = open_teacher(model, checkpoint)
        own = layered.model.config.get_text_config()
        vocabulary = _same_vocabulary(model, own, config)
        examples = all_examples(data)
        longest = max(len(example.ids) for example in examples)
        positions = longest_context(own)
        if positions is not None and positions < longest:
            raise UsageError(
                f"--teacher {model}: has {positions} positions, and an example {longest} tokens: "
                f"lower --sequence-length to {positions}"
            )
        _same_tokenizer(model, checkpoint, tokenizer, progress)
        contents = Contents.of(source_identity(checkpoint, model), examples, vocabulary)
    finally:
        checkpoint.fetcher.close(done=False)
    if file is not None:
        _check_place(file, model)
        if file.is_file():
            open_logits(file, contents, checked=False).close()
    return Teacher(model, contents, file, len(layered.layers), own.hidden_size)


def open_teacher(model: str, checkpoint: Checkpoint, device: str = "cpu") -> LayeredModel:
    """The teacher to be run layer by layer; raises as `find_teacher`."""
    if checkpoint.unknown is not None:
        raise UsageError(
            f"--teacher {model}: its files do not tell which LLaMA it is, and so how it computes; "
            "give the same model with config.json"
        )
    setting = (checkpoint.config or {}).get("quantization_config")
    if isinstance(setting, Mapping) and setting.get("quant_method") == QUANT_METHOD:
        raise UsageError(
            f"--teacher {model}: an artifact, whose weights are packed: give the dense model that "
            "it was made from"
        )
    refuse_unusable(checkpoint)
    try:
        return open_layered(checkpoint, device)
    except NotLayered as error:
        raise not_layered(model, checkpoint, error) from error


def not_layered(model: str, checkpoint: Checkpoint, error: NotLayered) -> UsageError:
    """The one line for a teacher that cannot be run layer by layer."""
    names = (checkpoint.config or {}).get("architectures") or ["a model of unknown class"]
    return UsageError(
        f"--teacher {model}: {names[0]} cannot be run layer by layer: {error}; {_INSTEAD}"
    )


def _same_vocabulary(model: str, own: Any, config: Any) -> int:
    wanted, found = config.get_text_config().vocab_size, own.vocab_size
    if wanted != found:
        raise UsageError(
            f"--teacher {model}: has a vocabulary of {found}, and the artifact one of {wanted}: "
            "give the model that the artifact was made from, or another of its vocabulary"
        )
    return int(found)


def _same_tokenizer(model: str, checkpoint: Checkpoint, tokenizer: Any, progress: Progress) -> None:
    """Refuse a teacher to which an id means another token than to the artifact."""
    try:
        theirs = checkpoint_tokenizer(checkpoint).get_vocab()
    except IrqError:
        progress.note(
            f"--teacher {model}: brings no tokenizer: that it has the artifact's is taken on trust"
        )
        return
    own = {number: token for token, number in tokenizer.get_vocab().items()}
    for token, number in sorted(theirs.items(), key=lambda item: item[1]):
        if own.get(number, token) != token:
            raise UsageError(
                f"--teacher {model}: has another tokenizer: id {number} is {token!r} there and "
                f"{own[number]!r} here: give the model that the artifact was made from, or another "
                "of its tokenizer"
            )


def _check_place(file: Path, model: str) -> None:
    """Refuse a file that could not be written after hours of work."""
    with os_errors("look at it", file):
        real = file.resolve()
        if real.is_dir():
            raise UsageError(
                f"--teacher-logits {file}: a folder; name a file in it, as logits.safetensors"
            )
        if not real.parent.is_dir():
            raise UsageError(
                f"--teacher-logits {file}: {real.parent} is no folder; create it or choose another"
            )
        source = find_folder(model)
        if source is not None and real.is_relative_to(source.resolve()):
            raise UsageError(f"--teacher-logits {file}: inside the teacher; choose another folder")
