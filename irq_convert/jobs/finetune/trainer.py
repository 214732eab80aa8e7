"""transformers' Trainer for an adapter: our held-out loss, a guard on what is finite, whole
checkpoints, an orderly stop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from irq_convert.artifact.adapter import BETA
from irq_convert.artifact.adapter_statistics import SCALE, TAU
from irq_convert.checkpoint.system import explain_os_error
from irq_convert.errors import IrqError, one_line
from irq_convert.jobs.finetune.encode import Collator, Example
from irq_convert.jobs.finetune.folder import RunFolder
from irq_convert.jobs.finetune.loss import LABELS, Loss, Measure, measure_loss
from irq_convert.jobs.finetune.model import trainable
from irq_convert.jobs.finetune.moves import lowest_scale, moves_of, round_statistics
from irq_convert.jobs.finetune.processes import Processes
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.recipe import Recipe
from irq_convert.jobs.finetune.stop import Stopped, StopRequest

SNAPSHOT_STEPS_ON_GPU = 10  # a copy to the host each step would cost percents there


NOT_FINITE = "the loss or a gradient became NaN or infinite"


class Diverged(Exception):
    """Training broke at `step`, and `why`; perhaps by the rate `of_statistics`."""

    def __init__(self, step: int, why: str = NOT_FINITE, of_statistics: bool = False) -> None:
        super().__init__(step)
        self.step, self.why, self.of_statistics = step, why, of_statistics


@dataclass
class Watch:
    """What a run shares with its trainer, and what the trainer finds out on the way.

    `snapshot` are the newest parameters whose loss and gradients were finite, after
    `snapshot_step` steps; in the first process only.
    """

    folder: RunFolder | None
    processes: Processes
    progress: TrainingProgress
    stop: StopRequest
    snapshot: dict[str, Tensor] = field(default_factory=dict)
    snapshot_step: int = 0
    stopped_by: int = 0
    newest: tuple[int, Loss] | None = None


class AdapterTrainer(Trainer):
    """Trainer that measures with `loss.measure_loss` and watches every loss and gradient."""

    measured_by: Measure = LABELS

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        recipe: Recipe,
        train: list[Example],
        heldout: list[Example] | None,
        collator: Collator,
        watch: Watch,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,  # a list is a map-style dataset
            eval_dataset=heldout,
            data_collator=collator,
        )
        self.watch = watch
        self.recipe = recipe
        self.loss_seen = 0.0 * torch.zeros((), device=arguments.device)
        self.norm_seen: Any = 0.0
        self.remove_callback(PrinterCallback)
        self.add_callback(_Guard(self))
        if recipe.rounded_steps:
            self.add_callback(_Rounding(recipe.steps - recipe.rounded_steps))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; statistics, and betas with a rate, are groups of their own."""
        made: Any = super().create_optimizer(*args, **kwargs)
        recipe = self.recipe
        for names, rate in (
            ((SCALE, TAU), recipe.statistics_rate if recipe.rank else None),
            ((BETA,), recipe.beta_rate),
        ):
            if rate is not None:
                _set_apart(made, list(moves_of(self.model, *names)), rate)
        return made

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; remembers the loss for the guard."""
        loss = super().training_step(*args, **kwargs)
        self.loss_seen = self.loss_seen + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.norm_seen = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.norm_seen

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.watch.folder
        if folder is None:
            super()._save_checkpoint(model, trial)
            return
        try:
            with write_errors(folder.state):
                super()._save_checkpoint(model, trial)
        except IrqError:
            shutil.rmtree(folder.writing, ignore_errors=True)
            raise

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss by `measure_loss`, into the log; nothing when the run is to stop."""
        self.measure_heldout()
        if self.watch.stop.number and self.watch.processes.count == 1:
            self.control.should_save = self.control.should_training_stop = True
            self.watch.stopped_by = self.watch.stop.number
        return {}

    def measure_heldout(self) -> Loss | None:
        """The loss of the held-out examples as the model is; None when the run is to stop."""
        step = self.state.global_step
        try:
            loss = self.measure(list(self.eval_dataset))  # type: ignore[arg-type]
        except Stopped:
            return None
        if not loss.finite:
            raise Diverged(step)
        self.watch.newest = (step, loss)
        self.log({"eval_loss": loss.mean})
        return loss

    def measure(self, examples: list[Example]) -> Loss:
        """The loss of `examples`; `Stopped` when a signal comes (in a process of its own)."""
        watch = self.watch

        def tick(done: int, total: int) -> None:
            if watch.processes.first:
                watch.progress.measuring(done, total)
            if watch.processes.count == 1:
                watch.stop.tick(done, total)

        return measure_loss(
            self.model,
            examples,
            self.data_collator,  # type: ignore[arg-type]
            self.recipe.micro_batch,
            compute=autocast(self.recipe),
            rank=watch.processes.rank,
            processes=watch.processes.count,
            tick=tick,
            measure=self.measured_by,
        )


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the writers of torch and safetensors raise into an `IrqError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise IrqError(explain_os_error(error, "write it", path)) from error
    except (RuntimeError, SafetensorError) as error:
        raise IrqError(f"{path}: cannot be written: {one_line(error)}") from error


def autocast(recipe: Recipe) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a forward pass in the recipe's dtype."""
    kind = torch.device(recipe.device).type
    return partial(torch.autocast, kind, torch.bfloat16, enabled=recipe.dtype == "bfloat16")


class _Guard(TrainerCallback):
    """Stands before each optimizer step: what is not finite never reaches the parameters."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer = trainer
        self._every = 1 if trainer.args.device.type == "cpu" else SNAPSHOT_STEPS_ON_GPU

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch = self._trainer.watch
        # A state that was saved brings its own, and what was asked for now counts.
        state.eval_steps, state.save_steps = args.eval_steps, args.save_steps
        if state.is_world_process_zero:
            watch.progress.start(state.global_step, state.max_steps)
        if watch.processes.first:  # also of a run that goes on from a checkpoint
            take_snapshot(self._trainer.model, watch, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, watch = self._trainer, self._trainer.watch
        finite = math.isfinite(float(trainer.loss_seen)) and math.isfinite(float(trainer.norm_seen))
        trainer.loss_seen = torch.zeros_like(trainer.loss_seen)
        broken, number = watch.processes.largest(
            [int(not finite), int(watch.stop.number)], args.device
        )
        if broken:
            raise Diverged(state.global_step + 1)
        watch.stopped_by = number
        if watch.processes.first and state.global_step % self._every == 0:
            take_snapshot(trainer.model, watch, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if lowest_scale(self._trainer.model) < 0:  # before anything of it is measured or saved
            why = "training has driven a scale below 0"
            raise Diverged(state.global_step, why, of_statistics=True)
        if self._trainer.watch.stopped_by:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, progress = kwargs.get("logs") or {}, self._trainer.watch.progress
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            progress.step(state.global_step, logs["loss"])
        if "eval_loss" in logs:
            progress.heldout(state.global_step, logs["eval_loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has written a checkpoint; it counts once every process has written its part."""
        watch = self._trainer.watch
        watch.processes.wait()
        if watch.folder is not None:
            watch.folder.accept_checkpoint(state.global_step)


class _Rounding(TrainerCallback):
    """From step `start` on statistics are seen as a merge will store them."""

    def __init__(self, start: int) -> None:
        self._start = start

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self._start:
            round_statistics(kwargs["model"])


def _set_apart(optimizer: Any, parameters: list[Any], rate: float) -> None:
    """Make `parameters` of `optimizer` a group of their own, which learns at `rate`."""
    apart = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) not in apart]
    optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})


def take_snapshot(model: Any, watch: Watch, step: int) -> None:
    """Copy the trained parameters to the host."""
    for name, parameter in trainable(model).items():
        if name not in watch.snapshot:
            watch.snapshot[name] = torch.empty_like(parameter, device="cpu", requires_grad=False)
        watch.snapshot[name].copy_(parameter.detach())
    watch.snapshot_step = step


def restore_snapshot(model: Any, watch: Watch) -> None:
    """Put the copied parameters back."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if name in watch.snapshot:
                parameter.copy_(watch.snapshot[name])
