"""From what was asked to what will be done: every choice that was left open, made and recorded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any

from irq_convert.artifact.adapter_kinds import Connection, Statistics
from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import option_name
from irq_convert.jobs.finetune.options import (
    FinetuneOptions,
    Init,
    Optimizer,
    Schedule,
    TrainDtype,
)

DEFAULT_STEPS = 10_000
DEFAULT_LENGTH = 512
DEFAULT_HOLDOUT = 0.05
MOST_MICRO_BATCH = 4
STATISTICS_RATE = 4.5e-3
"""Of statistics, in mean distances between two levels of a codebook: what moves a weight by as much
of the error that its bits leave, whatever the bits (tests/bench/adapter_kinds.py)."""
ROUNDED_PART = 4
"""One in so many steps, the last ones, see statistics as they will be stored."""
SMALL = 13.5e9  # "up to 13B": the models of that name have 13.02e9 weights
WITHOUT_EFFECT = ("eval_every", "save_every", "device")
"""Settings in which a resumed run may differ."""


_NOT_OPTIONS = {
    "processes": "the number of processes",
    "accumulation": "the number of passes in a step",
    "teacher_sha256": "the fingerprint of --teacher",
    "init_sha256": "the fingerprint of source and inputs of --init error",
}


@dataclass(frozen=True)
class Base:
    """What the recipe depends on of the base model: numbers of weights and of positions, and the
    mean bits of a code."""

    weights: int
    positions: int | None
    bits: float

    @property
    def statistics_rate(self) -> float:
        """In units of each block's scale, where levels reach from -1 to 1: 3e-3 at 2 bits."""
        return float(f"{STATISTICS_RATE * 2 / (2**self.bits - 1):.2g}")


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run, decided. `processes * micro_batch * accumulation = batch_size`.

    The last `rounded_steps` see statistics as a merge will store them.
    """

    lora: str
    statistics: str | None
    connection: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    target_modules: tuple[str, ...] | None
    steps: int
    batch_size: int
    micro_batch: int
    accumulation: int
    processes: int
    learning_rate: float
    statistics_rate: float | None
    beta_rate: float | None
    schedule: str
    rounded_steps: int
    warmup: int
    weight_decay: float
    max_grad_norm: float
    sequence_length: int
    holdout: float
    eval_every: int
    save_every: int
    seed: int
    dtype: str
    optimizer: str
    device: str
    gradient_checkpointing: bool
    init: str = "default"
    init_sha256: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    teacher_weight: float | None = None

    @property
    def described(self) -> str:
        """The adapter, in words."""
        moved = "" if self.statistics is None else _MOVED[self.statistics]
        if not self.rank:
            return moved
        start = ", started at the error" if self.init_sha256 else ""
        return f"{self.lora}, rank {self.rank}{moved and f', and {moved}'}{start}"

    @property
    def measure(self) -> str:
        """What is measured on held-out data, in words."""
        return "loss" if self.teacher is None else f"KL to {self.teacher}"

    @property
    def trained_on(self) -> str:
        """What a step lowers, in words."""
        return self.measure if self.teacher_weight in (None, 1) else "mixed loss"

    def rate_in_words(self, of_statistics: bool = False) -> str:
        """The option to lower where training breaks or does harm, and what it is."""
        found = []
        if self.rank and not of_statistics:
            found.append(f"--learning-rate ({self.learning_rate:g})")
        if self.statistics_rate is not None:
            found.append(f"--statistics-rate ({self.statistics_rate:g})")
        return " or ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        raw = asdict(self)
        if self.target_modules is not None:
            raw["target_modules"] = list(self.target_modules)
        return raw


_MOVED = {"both": "scale and tau", "scale": "scale", "tau": "tau"}


def sequence_length(options: FinetuneOptions, positions: int | None) -> int:
    """Tokens of an example; `UsageError` when more are asked for than the model has positions."""
    asked = options.sequence_length
    if asked is None:
        return min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    if positions is not None and asked > positions:
        raise UsageError(f"--sequence-length {asked}: more than the model's {positions} positions")
    return asked


def holdout_fraction(options: FinetuneOptions, has_eval_data: bool) -> float:
    """Part of the data that is held out; `UsageError` when a file of its own is given as well."""
    if has_eval_data and options.holdout:
        raise UsageError("--holdout and --eval-data both say what is held out: give one of them")
    if options.holdout is not None:
        return options.holdout
    return 0.0 if has_eval_data else DEFAULT_HOLDOUT


def decide(
    options: FinetuneOptions,
    base: Base,
    *,
    examples: int,
    processes: int,
    device: str,
    bfloat16: bool,
    holdout: float,
    teacher: tuple[str, str] | None = None,
    start: str | None = None,
) -> Recipe:
    """Make every choice that `options` leaves open.

    `examples` are those trained on, `device` the torch device of this process and `bfloat16`
    whether it is good at that type. `teacher` are the name and the hash of one, `start` the hash
    of what adapters start at.

    Raises `UsageError` where the batch does not divide over processes and passes, the sequence is
    longer than the model allows, or the optimizer does not exist here.
    """
    small = base.weights <= SMALL
    micro, accumulation = _split_batch(options, processes)
    steps = _steps(options, examples, micro, accumulation, processes)
    name, sha256 = teacher or (None, None)
    alone = not options.lora.low_rank
    dropout = (0.1 if small else 0.05) if options.dropout is None else options.dropout
    return Recipe(
        lora=str(options.lora),
        statistics=_statistics(options),
        connection=str(options.connection or Connection.BOTH) if options.lora.connected else None,
        rank=0 if alone else options.rank,
        alpha=float(options.alpha),
        rslora=options.rslora,
        dropout=0.0 if alone else dropout,
        target_modules=options.target_modules,
        steps=steps,
        batch_size=options.batch_size,
        micro_batch=micro,
        accumulation=accumulation,
        processes=processes,
        **_rates(options, base, steps),
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        sequence_length=sequence_length(options, base.positions),
        holdout=holdout,
        eval_every=options.eval_every or ceil(steps / 10),
        save_every=options.save_every,
        seed=options.seed,
        dtype=_dtype(options.dtype, bfloat16),
        optimizer=_optimizer(options.optimizer, device),
        device=device,
        gradient_checkpointing=options.gradient_checkpointing,
        init=str(Init.DEFAULT if start is None else Init.ERROR),
        init_sha256=start,
        teacher=name,
        teacher_sha256=sha256,
        teacher_weight=None if teacher is None else float(options.teacher_weight),
    )


def _rates(options: FinetuneOptions, base: Base, steps: int) -> dict[str, Any]:
    """Learning rates and their schedule, and how many steps see statistics rounded."""
    alone = not options.lora.low_rank
    asked = options.statistics_rate or (options.learning_rate if alone else None)
    rate = asked or base.statistics_rate
    matrices = options.learning_rate or (2e-4 if base.weights <= SMALL else 1e-4)
    kept = options.trains_statistics and (alone or options.lora.pooled)
    return {
        "learning_rate": rate if alone else matrices,
        "statistics_rate": rate if options.trains_statistics else None,
        "beta_rate": options.beta_rate,
        "schedule": str(options.schedule or (Schedule.COSINE if alone else Schedule.CONSTANT)),
        "rounded_steps": ceil(steps / ROUNDED_PART) if kept else 0,
    }


def _statistics(options: FinetuneOptions) -> str | None:
    asked = options.statistics or (None if options.lora.low_rank else Statistics.BOTH)
    return None if asked is None else str(asked)


def recipe_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps a run with the settings `new` from continuing one with `old`, in words."""
    found = []
    for name in new:
        if name not in WITHOUT_EFFECT and old.get(name) != new[name]:
            what = _NOT_OPTIONS.get(name) or option_name(name)
            found.append(f"{what} was {old.get(name)!r} and is {new[name]!r} now")
    return found


def _split_batch(options: FinetuneOptions, processes: int) -> tuple[int, int]:
    """Sequences in a pass, and passes in a step, of one process."""
    share, rest = divmod(options.batch_size, processes)
    if rest:
        raise UsageError(
            f"--batch-size {options.batch_size}: {processes} processes cannot share it equally"
        )
    micro = options.micro_batch
    if micro is None:
        micro = max(n for n in range(1, MOST_MICRO_BATCH + 1) if share % n == 0)
    if share % micro:
        raise UsageError(
            f"--micro-batch {micro}: does not divide the {share} sequences that "
            f"--batch-size {options.batch_size} gives each of {processes} processes"
        )
    return micro, share // micro


def _steps(
    options: FinetuneOptions, examples: int, micro: int, accumulation: int, processes: int
) -> int:
    if options.epochs is None:
        return options.steps or DEFAULT_STEPS
    passes = ceil(ceil(examples / micro) / processes)  # of each process, in one epoch
    return ceil(options.epochs * ceil(passes / accumulation))


def _dtype(asked: TrainDtype, bfloat16: bool) -> str:
    if asked == TrainDtype.AUTO:
        return str(TrainDtype.BFLOAT16 if bfloat16 else TrainDtype.FLOAT32)
    return str(asked)


def _optimizer(asked: Optimizer, device: str) -> str:
    paged = device.startswith("cuda") and find_spec("bitsandbytes") is not None
    if asked == Optimizer.AUTO:
        return str(Optimizer.PAGED_ADAMW if paged else Optimizer.ADAMW)
    if asked == Optimizer.PAGED_ADAMW and not paged:
        raise UsageError(
            "--optimizer paged-adamw: needs a CUDA device and the package bitsandbytes; use adamw"
        )
    return str(asked)
