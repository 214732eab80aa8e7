"""A model that is run one decoder layer at a time, its weights read from the files as they are due.

The class of the model runs itself: everything before and behind its layers, their masks, positions
and other inputs are its own forward's, in which the layers are stood in for by recorders. Nothing
is known of any architecture. What a class has to fulfil is checked as it runs: every layer is
called once, in order, on what the one before returned, and its other inputs do not depend on the
text. A class that does not is refused with `NotLayered`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from irq_convert.checkpoint.fetcher import ReadOrder
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError
from irq_convert.hf.empty_model import NoModel, named_class, quiet_transformers
from irq_convert.hf.layer_calls import Call, Enough, NotLayered, Recorder, hidden_of, same_inputs
from irq_convert.hf.layer_weights import WeightSource
from irq_convert.hf.linears import linears_of

_LAYER = re.compile(r"^((?:[^.]+\.)*?[^.]+)\.(\d+)(?:\.|$)")


@dataclass
class LayeredModel:
    """A causal language model on meta, whose weights come and go; made by `open_layered`.

    `layers` are the names of its decoder layers, in order.
    """

    model: Any
    layers: tuple[str, ...]
    source: WeightSource
    device: str
    read_order: ReadOrder | None = None
    _calls: dict[int, list[Call]] = field(default_factory=dict)

    def module(self, name: str) -> nn.Module:
        """A module by its name in the model."""
        found: nn.Module = self.model.get_submodule(name)
        return found

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Hold the weights of everything but the decoder layers while the block runs."""
        with self.source.loaded(self.model, self._is_outside, self.device, self.read_order):
            yield

    def tables(self) -> dict[str, torch.Tensor]:
        """Tensors that no layer holds, by name, as they are held now; called inside `outside`."""
        return self.source.held(self.model, self._is_outside)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all weights while the block runs."""
        order = self.source.checkpoint.read_order(self.source.tensors(self.model, lambda _: True))
        with self.source.loaded(self.model, lambda _: True, self.device, order):
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Hold the weights of one decoder layer while the block runs; it may change them."""
        wanted = self._is_of(number)
        with self.source.loaded(self.model, wanted, self.device, self.read_order):
            yield self.module(self.layers[number])

    def plan_reading(
        self,
        first: int,
        passes: int,
        *,
        finish: bool = True,
        back: bool = False,
        to_start: bool = False,
    ) -> ReadOrder:
        """The files in the order of a run: outside, the layers from `first` on, outside again.

        Each layer is loaded in so many `passes`; a run that does not `finish` ends with the last,
        and one that goes `back` with the first, after all others in reverse, or `to_start` with
        what is outside once more.
        """
        outside = self.source.tensors(self.model, self._is_outside)
        infos = [*outside]
        for number in range(first, len(self.layers)):
            infos += self.source.tensors(self.model, self._is_of(number)) * passes
        infos += outside if finish else []
        for number in reversed(range(first, len(self.layers)) if back else ()):
            infos += self.source.tensors(self.model, self._is_of(number))
        infos += outside if to_start else []
        return self.source.checkpoint.read_order(infos)

    @property
    def held_bytes(self) -> int:
        """The most bytes of weights that are held at once: outside, or one of the layers."""
        parts = [self._is_outside, *map(self._is_of, range(len(self.layers)))]
        held = (self.source.tensors(self.model, part) for part in parts)
        return max(4 * sum(info.numel for info in infos) for infos in held)

    def _is_outside(self, key: str) -> bool:
        return not key.startswith(tuple(f"{name}." for name in self.layers))

    def _is_of(self, number: int) -> Callable[[str], bool]:
        prefix = f"{self.layers[number]}."
        return lambda key: key.startswith(prefix)

    def call(self, number: int, windows: int) -> Call:
        """How layer `number` is called for so many windows at once, which `begin` has seen."""
        return self._calls[windows][number]

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer for `ids`, int64 `[windows, tokens]`.

        Called inside `outside`. Raises `NotLayered`.
        """
        recorder = Recorder(len(self.layers))
        with self._standing_in(recorder.stub):
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except Enough:
                pass
            except (NotLayered, IrqError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a class may want anything
                reason = (str(error) or type(error).__name__).splitlines()[0][:120]
                raise NotLayered(
                    f"{type(self.model).__name__} fails on text alone: {reason}"
                ) from (error)
        calls, states = recorder.finish()
        known = self._calls.setdefault(len(ids), calls)
        for number, (one, other) in enumerate(zip(known, calls, strict=True)):
            if not same_inputs((one.args, dict(one.kwargs)), (other.args, dict(other.kwargs))):
                raise NotLayered(
                    f"what {self.layers[number]} is given besides hidden states depends on the text"
                )
        return states

    def finish(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Logits `[windows, tokens, vocabulary]` from the hidden states behind the last layer.

        Called inside `outside`.
        """
        last = len(self.layers) - 1

        def stub(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return states if number == last else hidden_of(args, kwargs)[0]

        with self._standing_in(stub):
            found = self.model(input_ids=ids.to(self.device), use_cache=False)
        logits: torch.Tensor = found.logits
        return logits

    @contextmanager
    def _standing_in(self, stub: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator:
        """Let `stub` stand in for the forward of every layer."""
        modules = [self.module(name) for name in self.layers]

        def standing(number: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stub(number, args, kwargs)

        try:
            for number, module in enumerate(modules):
                module.__dict__["forward"] = standing(number)
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)


def open_layered(checkpoint: Checkpoint, device: str = "cpu") -> LayeredModel:
    """The model of `checkpoint`, to be run layer by layer in float32 on `device`.

    Nothing is read yet. Raises `NotLayered` when its class is not known, predicts no next token, or
    has no decoder layers.
    """
    try:
        architecture, settings = named_class(checkpoint.config)
    except NoModel as error:
        raise NotLayered(str(error)) from error
    if not architecture.can_generate() or getattr(settings, "is_encoder_decoder", False):
        raise NotLayered(f"{architecture.__name__} is no causal language model")
    with quiet_transformers(), torch.device("meta"):
        model = architecture(settings)
    model.eval().requires_grad_(False)
    _fill_buffers(model, device)
    source = WeightSource.of(model, checkpoint)
    _untie(model, source)
    layers = _decoder_layers(model, checkpoint, source)
    return LayeredModel(model, layers, source, device)


def _untie(model: Any, source: WeightSource) -> None:
    """Hold apart what a class ties and the files have twice: so does transformers' loader."""
    seen: set[int] = set()
    for key, parameter in list(model.named_parameters(remove_duplicate=False)):
        if key not in source.plain:
            continue
        if id(parameter) in seen:
            name, _, last = key.rpartition(".")
            own = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            model.get_submodule(name)._parameters[last] = own
        seen.add(id(parameter))


def _fill_buffers(model: Any, device: str) -> None:
    """Compute what the files do not hold: the class fills such buffers as it initializes."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for key, buffer in list(model.named_non_persistent_buffers()):
        name, _, last = key.rpartition(".")
        module = model.get_submodule(name)
        module._buffers[last] = torch.empty_like(buffer, device=device)
    with torch.no_grad(), quiet_transformers():
        model.initialize_weights()


def _decoder_layers(model: Any, checkpoint: Checkpoint, source: WeightSource) -> tuple[str, ...]:
    """Names of the numbered modules that hold most of the linear weights of the language model."""
    counts: dict[str, int] = {}
    for tensor in linears_of(model, checkpoint.tensors).tensors:
        found = _LAYER.match(source.module_of.get(tensor, ""))
        if found:
            counts[found[1]] = counts.get(found[1], 0) + checkpoint.tensors[tensor].numel
    if not counts:
        raise NotLayered(f"{type(model).__name__} has no numbered layers with linear weights")
    most = max(counts, key=lambda name: counts[name])
    modules = model.get_submodule(most)
    return tuple(f"{most}.{number}" for number, _ in enumerate(modules.children()))
