"""One run from start to end: load, measure, train, measure, write what came out."""

from __future__ import annotations

import signal as signals
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TrainerState, TrainingArguments, set_seed

from irq_convert.checkpoint.disk import require_space
from irq_convert.checkpoint.locate import locate
from irq_convert.errors import IrqError
from irq_convert.jobs.finetune.arguments import training_arguments
from irq_convert.jobs.finetune.curve import CSV_NAME, PNG_NAME, draw, points, write_csv
from irq_convert.jobs.finetune.encode import Collator, padding_id
from irq_convert.jobs.finetune.folder import BEFORE, RunFolder
from irq_convert.jobs.finetune.keeping import withdraw_unless_lower
from irq_convert.jobs.finetune.loss import Loss
from irq_convert.jobs.finetune.model import attach_adapter, count_trainable, load_base
from irq_convert.jobs.finetune.moves import round_statistics
from irq_convert.jobs.finetune.prepare import Preparation
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.report import (
    DIVERGED,
    FINISHED,
    INTERRUPTED,
    FinetuneReport,
)
from irq_convert.jobs.finetune.start import start_in_first
from irq_convert.jobs.finetune.stop import Stopped, StopRequest, stop_on_signals
from irq_convert.jobs.finetune.teacher_file import TeacherLogits
from irq_convert.jobs.finetune.teacher_trainer import TaughtCollator, TaughtTrainer
from irq_convert.jobs.finetune.trainer import (
    AdapterTrainer,
    Diverged,
    Watch,
    restore_snapshot,
    write_errors,
)


class Run:
    """One run, in one process; `base` says which artifact, `begun` when the job began, and
    `logits` are those of a teacher."""

    def __init__(
        self,
        plan: Preparation,
        base: dict[str, Any],
        out: Path,
        progress: TrainingProgress,
        begun: float,
        logits: TeacherLogits | None = None,
    ) -> None:
        self.plan, self.base, self.out = plan, base, out
        self.progress, self.begun, self.logits = progress, begun, logits
        self.before: Loss | None = None
        self.start: Loss | None = None
        self.resumed_from = 0

    def work(self, folder: RunFolder | None) -> FinetuneReport:
        """Load, measure, train, measure, write."""
        plan, recipe = self.plan, self.plan.recipe
        self.progress.stage("loading the model")
        held = plan.data.heldout
        writing = str(self.out.resolve() / ".training" / "writing")
        arguments = training_arguments(recipe, writing, measured=held is not None)
        model = self._model(folder)
        if folder is not None:
            size = 4 * count_trainable(model)
            require_space(folder.path, 8 * size, "keep the adapter and two states of training")
        with stop_on_signals(alone=plan.processes.count == 1) as stop:
            watch = Watch(folder, plan.processes, self.progress, stop)
            trainer = self._trainer(model, arguments, watch)
            with _finite_or_explained(self.plan.model):
                self._measure_before(trainer, folder)
            end, after, broken = self._train(trainer, folder)
            return self._close(trainer, folder, end, after, broken)

    def _trainer(self, model: Any, arguments: TrainingArguments, watch: Watch) -> AdapterTrainer:
        plan, logits = self.plan, self.logits
        held = plan.data.heldout
        pad = padding_id(plan.tokenizer, model.get_input_embeddings().weight.shape[0])
        kind = AdapterTrainer if logits is None else TaughtTrainer
        return kind(
            model,
            arguments,
            plan.recipe,
            list(plan.data.train.examples),
            None if held is None else list(held.examples),
            Collator(pad) if logits is None else TaughtCollator(pad, logits),
            watch,
        )

    def _model(self, folder: RunFolder | None) -> Any:
        recipe = self.plan.recipe
        model = load_base(self.plan.folder, getattr(torch, recipe.dtype), recipe.device)
        set_seed(recipe.seed)
        model = attach_adapter(model, recipe)
        checkpoint = None if folder is None else folder.checkpoint()
        if self.plan.start is not None and self.plan.processes.same(checkpoint) is None:
            start_in_first(
                self.plan.start,
                model,
                self.plan.artifact,
                self.plan.processes,
                device=recipe.device,
                scratch=None if folder is None else folder.state,
                progress=self.progress,
            )
        found = locate(self.plan.model, headers_only=True)
        model.peft_config["default"].base_model_name_or_path = found.repo_id or self.plan.model
        return model

    def _measure_before(self, trainer: AdapterTrainer, folder: RunFolder | None) -> None:
        """The held-out loss of the base, and of an adapter with a start of its own there; taken
        from the state when a run is continued."""
        processes = self.plan.processes
        found = folder.read(BEFORE) if folder is not None else None
        found = processes.same(found)
        if found is not None:
            self.before, self.start = (
                None if each is None else Loss(tuple(each["sums"]), tuple(each["counts"]))
                for each in (found, found.get("start") or None)
            )
        elif self.plan.data.heldout is not None:
            self.progress.stage("measuring the base")
            model: Any = trainer.model
            with model.disable_adapter():
                self.before = self._measure_untrained(trainer)
            if self.plan.start is not None:
                self.progress.stage("measuring the start")
                self.start = self._measure_untrained(trainer)
            if folder is not None:
                folder.write(BEFORE, _kept(self.before) | {"start": _kept(self.start)})
        first = self.start or self.before
        if first is not None and processes.first:
            self.progress.heldout(0, first.mean)

    def _measure_untrained(self, trainer: AdapterTrainer) -> Loss:
        assert self.plan.data.heldout is not None
        try:
            loss = trainer.measure(list(self.plan.data.heldout.examples))
        except Stopped:
            _leave(trainer.watch.stop)
        if not loss.finite:
            raise Diverged(0)
        return loss

    def _train(
        self, trainer: AdapterTrainer, folder: RunFolder | None
    ) -> tuple[str, Loss | None, Diverged | None]:
        """Train to an end of some kind: which, the held-out loss there, and what broke."""
        checkpoint = folder.checkpoint() if folder is not None else None
        checkpoint = self.plan.processes.same(checkpoint)
        if self.plan.processes.rank:  # dropout of its own; the order of data has its own seed
            torch.manual_seed(self.plan.recipe.seed + self.plan.processes.rank)
        if checkpoint is not None:
            self.resumed_from = int(checkpoint.name.rpartition("-")[2])
        try:
            if self.resumed_from >= self.plan.recipe.steps:
                self._load_finished(trainer, checkpoint)
            else:
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            if trainer.state.global_step < self.plan.recipe.steps:
                return INTERRUPTED, None, None
            return *self._measure_after(trainer), None
        except Diverged as error:
            return DIVERGED, None, error

    def _load_finished(self, trainer: AdapterTrainer, checkpoint: Path) -> None:
        model: Any = trainer.model
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.plan.recipe.rounded_steps:
            round_statistics(model)

    def _measure_after(self, trainer: AdapterTrainer) -> tuple[str, Loss | None]:
        """The loss of what came out: held out, or of some training examples for a sign of life."""
        self.progress.stage("measuring the result")
        step, newest = trainer.state.global_step, trainer.watch.newest
        try:
            if self.plan.data.heldout is None:
                few = list(self.plan.data.train.examples[: self.plan.recipe.micro_batch])
                if not trainer.measure(few).finite:
                    raise Diverged(step)
                return FINISHED, None
            if newest is not None and newest[0] == step:
                return FINISHED, newest[1]
            after = trainer.measure_heldout()
        except Stopped:
            after = None
        if after is None:
            trainer.watch.stopped_by = trainer.watch.stop.number
            return INTERRUPTED, None
        return FINISHED, after

    def _close(
        self,
        trainer: AdapterTrainer,
        folder: RunFolder | None,
        end: str,
        after: Loss | None,
        broken: Diverged | None,
    ) -> FinetuneReport:
        """Write the adapter and what is said about it; keep the state of an interrupted run."""
        watch, step = trainer.watch, trainer.state.global_step
        if end == DIVERGED:
            step = watch.snapshot_step
        first = self.start or self.before
        log = [
            entry
            for entry in trainer.state.log_history
            if entry["step"] <= max(step, broken.step - 1 if broken else 0)
        ]
        report = FinetuneReport(
            out=str(self.out),
            end=end,
            signal=watch.stopped_by if end == INTERRUPTED else 0,
            step=step,
            resumed_from=self.resumed_from,
            recipe=self.plan.recipe,
            data=self.plan.data,
            base=self.base,
            trainable=count_trainable(trainer.model),  # type: ignore[arg-type]
            before=self.before,
            start=self.start,
            after=after,
            curve=tuple(points(log, None if first is None else first.mean)),
            seconds=time.perf_counter() - self.begun,
        )
        withdraw_unless_lower(report, folder, self.progress)
        stays = folder is not None and folder.older and end == DIVERGED and not step
        if folder is not None and stays:
            folder.finish()
        elif folder is not None:
            self._write(trainer, folder, report)
        self.plan.processes.wait()
        if broken is not None:
            held = f"{self.out} holds the adapter of step {step}, the last good one"
            if not step:
                held = f"{self.out} holds an untrained adapter"
            if stays:
                held = f"{self.out} still holds the older adapter"
            raise IrqError(
                f"{broken.why} at step {broken.step} of {self.plan.recipe.steps}: lower "
                f"{self.plan.recipe.rate_in_words(broken.of_statistics)}; {held}"
            )
        return report

    def _write(self, trainer: AdapterTrainer, folder: RunFolder, report: FinetuneReport) -> None:
        if report.end == DIVERGED:
            restore_snapshot(trainer.model, trainer.watch)
        made = folder.state / "adapter"
        model: Any = trainer.model
        with write_errors(folder.state):
            model.save_pretrained(str(made), save_embedding_layers=False)
        folder.publish(made, report.note())
        recipe = report.recipe
        write_csv(folder.path / CSV_NAME, report.curve, recipe.measure, recipe.trained_on)
        title = f"{self.base['model']}: {recipe.described}"
        if not draw(folder.path / PNG_NAME, report.curve, title, recipe.measure):
            (folder.path / PNG_NAME).unlink(missing_ok=True)
            self.progress.note(
                f"no {PNG_NAME}: drawing needs matplotlib: pip install 'irq-convert[plot]'"
            )
        if report.end != INTERRUPTED:
            folder.finish()


def _kept(loss: Loss | None) -> dict[str, Any]:
    """`loss` for the state of the run."""
    return {} if loss is None else {"sums": list(loss.sums), "counts": list(loss.counts)}


@contextmanager
def _finite_or_explained(model: str) -> Iterator[None]:
    """Before the first step no learning rate can be at fault."""
    try:
        yield
    except Diverged:
        raise IrqError(
            f"{model}: gives NaN or infinite losses on the held-out data before any training: try "
            "--dtype float32, or check it with irq-convert verify"
        ) from None


def _leave(stop: StopRequest) -> NoReturn:
    """End as the signal would have ended the process: nothing is trained yet."""
    if stop.number == signals.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + stop.number)
