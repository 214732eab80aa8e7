"""What a finetuning run is asked to do; None leaves the choice to the recipe.

Nothing heavy is imported here, so that the command line can name the choices without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from pathlib import Path

from irq_convert.artifact.adapter_kinds import AdapterKind, Connection, Statistics
from irq_convert.checkpoint.system import expand_home
from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import fix_choices, option_name

MATRICES = ("rank", "alpha", "rslora", "dropout")
"""Options of low-rank adapters alone."""
RATES = ("learning_rate", "statistics_rate", "beta_rate")
MOST_LEARNING_RATE = 1e35  # Adam's first steps scale it by up to 10


class TrainDtype(StrEnum):
    """Type that activations are computed in; adapters are always trained in float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Init(StrEnum):
    """Where an adapter starts: at no change, or at what quantizing has lost."""

    DEFAULT = "default"
    ERROR = "error"


class Schedule(StrEnum):
    """How the learning rate goes after warm-up: as it is, or down to 0 along a cosine."""

    CONSTANT = "constant"
    COSINE = "cosine"


class Optimizer(StrEnum):
    """AdamW of torch, or bitsandbytes' whose state can be paged out of GPU memory."""

    AUTO = "auto"
    ADAMW = "adamw"
    PAGED_ADAMW = "paged-adamw"


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of one run; the defaults are the paper's recipe.

    Attributes:
        lora: `plain` (stock LoRA), `iec` (with elastic connections), `block` (IEC on block sums
            of the input, mergeable into the artifact) or `statistics` (no matrices: scale and tau
            of the packed layers themselves, mergeable likewise).
        statistics: which statistics train beside the matrices, or alone, where None is both.
        connection: elastic connections to train, None for both; only for `iec` and `block`.
        rank, alpha, rslora: rank r; the update is scaled by alpha / r, or alpha / sqrt(r).
        dropout: on the adapter's input; None for 0.1 up to 13 B weights, 0.05 above.
        init: `error` starts A and B at the best low-rank part of what quantizing has lost of
            `source`, as the training data see it, or `importance`, a file of `measure`. None for
            `error` where matrices train towards a teacher, which is the dense model, else
            `default`.
        source: folder or Hub id of the dense model for `init`; None for the teacher.
        target_modules: last parts of module names; None for all linears but the head.
        steps, epochs: length of the run, one of the two; None and None for 10,000 steps.
        batch_size: sequences in one step, over all processes and accumulated passes.
        micro_batch: sequences in one forward pass of one process; None for the largest of at most
            4 that fits the batch.
        learning_rate: None for 2e-4 up to 13 B weights, 1e-4 above; of statistics alone theirs.
        statistics_rate: learning rate of statistics, in units of each block's scale; None
            for 3e-3 at 2 bits, 1.3e-3 at 3, 6e-4 at 4.
        beta_rate: learning rate of IEC's betas, two numbers a layer; None for that of the matrices.
        schedule: None for constant, and for cosine where statistics train alone.
        warmup: steps over which the learning rate rises from 0.
        weight_decay, max_grad_norm: of AdamW; gradients are clipped to this norm, 0 for never.
        sequence_length: tokens an example is cut to; None for 512 or the model's positions.
        holdout: fraction of the data that is measured and not trained on; None for 0.05, or 0 when
            there is a file of held-out data.
        eval_every: steps between held-out losses; None for a tenth of the run.
        save_every: steps between saved states, the most that a killed run loses.
        seed: of adapter, order and dropout. The held-out part does not depend on it.
        dtype, optimizer: see the enums.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one.
        gradient_checkpointing: compute activations twice to keep fewer of them.
        trust_remote_code: run code that comes with the model, which is refused else.
        teacher: folder or Hub id of a dense model of the same vocabulary and tokenizer; training
            and the held-out number are KL to it instead of the loss on labels.
        teacher_weight: w of w * KL + (1 - w) * loss on labels, which is trained on.
        teacher_logits: file that the teacher's logits are kept in, made where it is not there;
            None for the state of the run, which ends with it.

    Raises `UsageError` where a value is out of its range, or two of them contradict each other.
    """

    lora: AdapterKind = AdapterKind.IEC
    statistics: Statistics | None = None
    connection: Connection | None = None
    rank: int = 64
    alpha: float = 16.0
    rslora: bool = False
    dropout: float | None = None
    init: Init | None = None
    source: str | None = None
    importance: Path | None = None
    target_modules: tuple[str, ...] | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    learning_rate: float | None = None
    statistics_rate: float | None = None
    beta_rate: float | None = None
    schedule: Schedule | None = None
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    sequence_length: int | None = None
    holdout: float | None = None
    eval_every: int | None = None
    save_every: int = 500
    seed: int = 0
    dtype: TrainDtype = TrainDtype.AUTO
    optimizer: Optimizer = Optimizer.AUTO
    device: str = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    teacher: str | None = None
    teacher_weight: float = 1.0
    teacher_logits: Path | None = None

    def __post_init__(self) -> None:
        fix_choices(
            self,
            lora=AdapterKind,
            statistics=Statistics,
            connection=Connection,
            init=Init,
            schedule=Schedule,
            dtype=TrainDtype,
            optimizer=Optimizer,
        )
        for name in ("rank", "batch_size", "micro_batch", "steps", "eval_every", "save_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("sequence_length", self.sequence_length, 2)
        _at_least("warmup", self.warmup, 0)
        _at_least("seed", self.seed, 0)
        for name in ("alpha", *RATES, "epochs"):
            _positive(name, getattr(self, name))
        for name in RATES:
            rate = getattr(self, name)
            if rate is not None and rate > MOST_LEARNING_RATE:
                raise UsageError(
                    f"{option_name(name)} {rate:g}: beyond what a step in float32 can hold"
                )
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{option_name(name)} {getattr(self, name)}: 0 or more is needed")
        for name in ("dropout", "holdout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{option_name(name)} {value}: a number in [0, 1) is needed")
        self._check_together()
        self._check_teacher()
        self._check_start()

    def _check_together(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs both say how long to train: give one of them")
        if not self.lora.connected and self.connection is not None:
            raise UsageError(
                f"--connection: --lora {self.lora} has no elastic connections; leave it out"
            )
        for name in MATRICES if not self.lora.low_rank else ():
            if getattr(self, name) != getattr(FinetuneOptions, name):
                raise UsageError(
                    f"{option_name(name)}: --lora {self.lora} has no matrices; leave it out"
                )
        if self.statistics_rate is not None and not self.trains_statistics:
            raise UsageError("--statistics-rate: no statistics are trained; add --statistics both")
        if not self.lora.low_rank and self.statistics_rate and self.learning_rate:
            raise UsageError(
                f"--lora {self.lora} has one rate: give --learning-rate or --statistics-rate"
            )
        if self.beta_rate is not None and self.connection == Connection.NONE:
            raise UsageError("--beta-rate: --connection none has no betas; leave one of them out")
        if self.beta_rate is not None and not self.lora.connected:
            raise UsageError(f"--beta-rate: --lora {self.lora} has no betas; leave it out")
        if self.target_modules is not None and not all(self.target_modules):
            raise UsageError("--target-modules: an empty name; write q_proj,v_proj")

    def _check_start(self) -> None:
        if not self.from_error:
            for name in ("source", "importance"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name}: of no use without --init error")
            return
        if not self.lora.low_rank:
            raise UsageError(
                "--init error: --lora statistics has no matrices to start: leave it out"
            )
        if self.source is None and self.teacher is None:
            raise UsageError("--init error: needs the dense model: add --source (or --teacher)")
        if self.source is not None:
            object.__setattr__(self, "source", str(self.source))
        if self.importance is not None:
            object.__setattr__(self, "importance", expand_home(self.importance))

    @property
    def from_error(self) -> bool:
        """Whether the adapter starts at what quantizing has lost."""
        return self.start == Init.ERROR

    @property
    def start(self) -> Init:
        """Where the adapter starts, also where `init` leaves it open."""
        taught = self.teacher is not None and self.teacher_weight > 0 and self.lora.low_rank
        return self.init or (Init.ERROR if taught else Init.DEFAULT)

    @property
    def trains_statistics(self) -> bool:
        """Whether scale or tau of packed layers train, alone or beside matrices."""
        return self.statistics is not None or not self.lora.low_rank

    def _check_teacher(self) -> None:
        if not 0 <= self.teacher_weight <= 1:
            raise UsageError(f"--teacher-weight {self.teacher_weight}: from 0 to 1")
        if self.teacher is None:
            for name, given in (
                ("weight", self.teacher_weight != 1),
                ("logits", self.teacher_logits),
            ):
                if given:
                    raise UsageError(f"--teacher-{name}: of no use without --teacher: name one")
            return
        object.__setattr__(self, "teacher", str(self.teacher))  # a notebook says Path(...)
        if self.teacher_logits is not None:
            object.__setattr__(self, "teacher_logits", expand_home(self.teacher_logits))


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{option_name(name)} {value}: at least {least} is needed")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and isfinite(value)):
        raise UsageError(f"{option_name(name)} {value}: a positive number is needed")
