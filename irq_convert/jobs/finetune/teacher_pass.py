"""One pass of a teacher over examples of many lengths, one of its decoder layers in memory at once.

Examples are padded on the right to one of a few common lengths. As attention looks back alone, what
comes behind an example changes nothing in it, and the head is asked of its real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.finetune.teacher_file import TaughtExample
from irq_convert.progress import Progress

LENGTHS = 16
"""Common lengths, at most: a layer is called with other masks and positions for each."""
HEAD_ELEMENTS = 1 << 24
"""Logits that are made at once: 64 MiB in float32."""

Sink = Callable[[int, Tensor], None]
"""Takes the number of a first row, and logits `[rows, vocabulary]`."""


@dataclass
class Bucket:
    """Examples that are run at one `length`; `model` remembers how its layers are then called."""

    length: int
    examples: list[TaughtExample]
    model: LayeredModel
    states: StateFile | None = field(default=None, init=False)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """As many at once as a layer is run on."""
        return chunks(0, len(self.examples), self.length)

    def ids(self, start: int, stop: int) -> Tensor:
        """Int64 `[stop - start, length]`, padded with 0."""
        found = torch.zeros(stop - start, self.length, dtype=torch.int64)
        for row, example in zip(found, self.examples[start:stop], strict=True):
            row[: len(example.ids)] = example.ids
        return found


def common_length(length: int, longest: int) -> int:
    """What an example of `length` tokens is padded to, where the longest has `longest`."""
    step = -(-longest // LENGTHS)
    return min(longest, -(-length // step) * step)


def buckets(model: LayeredModel, examples: Sequence[TaughtExample]) -> list[Bucket]:
    """The examples by common length, the longest first: what does not fit in memory fails soon."""
    longest = max(len(example.ids) for example in examples)
    found: dict[int, list[TaughtExample]] = {}
    for example in examples:
        found.setdefault(common_length(len(example.ids), longest), []).append(example)
    return [
        Bucket(length, found[length], replace(model, _calls={}))
        for length in sorted(found, reverse=True)
    ]


def states_bytes(lengths: Sequence[int], width: int) -> int:
    """What hidden states of `width` take on the disk for examples of these lengths."""
    longest = max(lengths)
    return 4 * width * sum(common_length(length, longest) for length in lengths)


@dataclass
class TeacherPass:
    """Runs `model` over `examples`; hidden states wait in `folder`, in files without a name."""

    model: LayeredModel
    examples: Sequence[TaughtExample]
    folder: Path
    progress: Progress

    def run(self, sink: Sink) -> None:
        """Give `sink` the logits of every token that has a next one.

        Raises `NotLayered`, and `IrqError` when the disk refuses.
        """
        parts = buckets(self.model, self.examples)
        count = sum(len(list(part.chunks())) for part in parts)
        layers = len(self.model.layers)
        self.progress.phase("running the teacher", layers, (layers + 1) * count)
        self.model.read_order = self.model.plan_reading(0, passes=1)
        with torch.no_grad(), self._begin(parts):
            for number in range(layers):
                with self.model.layer(number) as layer:
                    for part in parts:
                        self._through(part, number, layer)
            with self.model.outside():
                for part in parts:
                    self._finish(part, sink)

    @contextmanager
    def _begin(self, parts: list[Bucket]) -> Iterator[None]:
        """The states before the first layer, in files that are gone with the process."""
        with ExitStack() as files:
            with self.model.outside():
                for part in parts:
                    for start, stop in part.chunks():
                        states = part.model.begin(part.ids(start, stop))
                        if part.states is None:
                            part.states = self._file(part, states.shape[-1], files)
                        part.states.write(start, states)
            yield

    def _file(self, part: Bucket, width: int, files: ExitStack) -> StateFile:
        path = self.folder / f"teacher-states-{part.length}"
        files.callback(path.unlink, missing_ok=True)
        made = state_file(path, len(part.examples), part.length, width, new=True)
        opened = files.enter_context(made)
        path.unlink()
        return opened

    def _through(self, part: Bucket, number: int, layer: torch.nn.Module) -> None:
        assert part.states is not None
        for start, stop in part.chunks():
            given = part.states.read(start, stop).to(self.model.device)
            part.states.write(start, part.model.call(number, stop - start).run(layer, given))
            self.progress.advance(1, finished=0)

    def _finish(self, part: Bucket, sink: Sink) -> None:
        """Norm and head, a few tokens at a time; both look at each token alone."""
        assert part.states is not None
        rows = self.model.model.get_input_embeddings().weight.shape[0]
        step = max(1, HEAD_ELEMENTS // rows)
        for start, stop in part.chunks():
            for number in range(start, stop):
                example = part.examples[number]
                states = part.states.read(number, number + 1).to(self.model.device)
                for at in range(0, example.rows, step):
                    piece = slice(at, min(example.rows, at + step))
                    ids = example.ids[None, piece]
                    sink(example.at + at, self.model.finish(ids, states[:, piece])[0])
            self.progress.advance(1, finished=0)
