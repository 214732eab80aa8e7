"""One model that writes: transformers' `generate` in a thread that computes only when asked.

Two models take turns so, and each is measured while it alone computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.jobs.generate.models import Writer
from irq_convert.jobs.generate.options import GenerateOptions
from irq_convert.jobs.generate.pieces import Pieces
from irq_convert.jobs.generate.report import Ended, Generated


class TextStream(Iterator[str]):
    """The text that `writer` makes of a prompt, `ids` `[1, tokens]`, in pieces as they come.

    `next` lets it compute until there is a piece. Every stream has its own random numbers, from the
    seed, whatever else is computed in between. `close` stops it; `result` says what came of it.

    Raises `UsageError` where the prompt leaves no room in the model's positions; `next` raises
    `IrqError` where the model gives NaN logits or the device is out of memory.
    """

    def __init__(self, writer: Writer, ids: Tensor, options: GenerateOptions) -> None:
        self._writer, self._prompt = writer, ids.shape[1]
        room = self._room(options.max_tokens)
        self._config, self._limit = _settings(options, room), room
        self._asked = options.max_tokens
        self._random = _Random(options.seed, writer.model.device)
        self._course = _Course(writer, ids)
        self._thread = Thread(target=self._write, args=(ids,), daemon=True)
        self._begun = False

    @property
    def name(self) -> str:
        """Of the model."""
        return self._writer.name

    def __next__(self) -> str:
        course = self._course
        if course.over:
            raise StopIteration
        if not self._begun:
            self._begun = True
            self._thread.start()
        with self._random.own():
            course.turn.release()
            course.answer.acquire()
        if course.error is not None:
            raise self._explained(course.error) from course.error
        if course.over:
            raise StopIteration
        return course.piece

    def close(self) -> None:
        """Let it write no further; returns when the token that it is at is done."""
        if self._begun and not self._course.over:
            self._course.stopped = True
            self._course.turn.release()
            self._thread.join()

    def result(self) -> Generated:
        """What there is, of a stream that has ended or was closed."""
        course = self._course
        ended = course.ended
        if ended is None:
            full = course.tokens == self._limit
            ended = Ended.STOPPED if course.stopped or not full else Ended.LENGTH
            if full and self._limit < self._asked:
                ended = Ended.POSITIONS
        return Generated(
            model=self._writer.name,
            text="".join(course.text),
            prompt_tokens=self._prompt,
            tokens=course.tokens,
            ended=ended,
            seconds=course.seconds,
            first_seconds=course.first_seconds,
        )

    def _room(self, asked: int) -> int:
        most = self._writer.positions
        if most is None:
            return asked
        if self._prompt >= most:
            raise UsageError(
                f"{self._writer.name}: the prompt has {self._prompt} tokens, and the model takes "
                f"{most} with what follows: give a shorter one"
            )
        return min(asked, most - self._prompt)

    def _write(self, ids: Tensor) -> None:
        """What the thread does; whatever goes wrong there is raised where `next` was called."""
        course, model = self._course, self._writer.model
        try:
            course.wait()
            ids = ids.to(model.device)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config,
                logits_processor=LogitsProcessorList([_Numbers(self._writer.name)]),
                streamer=course,
            )
        except _Stopped:
            pass
        except BaseException as error:
            course.error = error
        course.over = True
        course.answer.release()

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, torch.OutOfMemoryError):
            return IrqError(
                f"{self._writer.name}: out of memory: give a shorter prompt, or lower --max-tokens"
            )
        if isinstance(error, IrqError | MemoryError):
            return error
        return IrqError(f"{self._writer.name}: cannot generate: {one_line(error)}")


class _Stopped(Exception):
    """Ends `generate` from within, between two tokens."""


class _Course(BaseStreamer):
    """What `generate` tells of its course, and whose turn it is."""

    def __init__(self, writer: Writer, ids: Tensor) -> None:
        self.turn, self.answer = Semaphore(0), Semaphore(0)
        self.piece = ""
        self.text: list[str] = []
        self.tokens = 0
        self.seconds = 0.0
        self.first_seconds: float | None = None
        self.ended: Ended | None = None
        self.error: BaseException | None = None
        self.over = self.stopped = False
        self._ends = writer.ends
        self._pieces = Pieces(writer.tokenizer, ids[0].tolist())
        self._prompt_seen = False
        self._since = 0.0

    def wait(self) -> None:
        """Until it is this stream's turn. Raises `_Stopped` where it shall write no further."""
        self.turn.acquire()
        self._since = time.perf_counter()
        if self.stopped:
            raise _Stopped

    def put(self, value: Tensor) -> None:
        """`generate` gives the prompt first, then token by token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.stopped:
            raise _Stopped
        token = int(value.reshape(-1)[0])
        self.tokens += 1
        self._clock()
        if self.first_seconds is None:
            self.first_seconds = self.seconds
        if token in self._ends:
            self.ended = Ended.END
        else:
            self._give(self._pieces.add(token))

    def end(self) -> None:
        """No more tokens come."""
        self._give(self._pieces.rest())

    def _clock(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _give(self, piece: str) -> None:
        """Hand a piece over, and the turn with it."""
        if piece:
            self.piece = piece
            self.text.append(piece)
            self.answer.release()
            self.wait()


class _Numbers(LogitsProcessor):
    """Refuses NaN: the likeliest of such logits would be a token all the same."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise IrqError(
                f"{self._name}: gives NaN logits: try --dtype float32, or check its weights"
            )
        return scores


class _Random:
    """Random numbers of a device that nobody else draws from."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        before = self._get()
        torch.manual_seed(seed)
        self._mine = self._get()
        self._set(before)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block torch draws from these."""
        before = self._get()
        self._set(self._mine)
        try:
            yield
        finally:
            self._mine = self._get()
            self._set(before)

    def _get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(s.get_rng_state() for s in self._others())]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for source, state in zip(self._others(), states[1:], strict=True):
            source.set_rng_state(state)

    def _others(self) -> list[Any]:
        return [] if self._device.type == "cpu" else [torch.get_device_module(self._device)]


def _settings(options: GenerateOptions, tokens: int) -> GenerationConfig:
    """What `generate` is told beside the tokens that end a text."""
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False)
    at = options.sampled_at
    if at is not None:
        top = 1.0 if options.top_p is None else options.top_p
        config.update(do_sample=True, temperature=at, top_p=top, top_k=0)
    return config
