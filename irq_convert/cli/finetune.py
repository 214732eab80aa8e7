"""The `finetune` command: parse, call, show."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irq_convert.artifact.adapter_kinds import AdapterKind, Connection, Statistics
from irq_convert.cli.console import quiet_libraries
from irq_convert.cli.shared import RESUMING, AsJson, TrustRemoteCode
from irq_convert.errors import IrqError
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.finetune.options import FinetuneOptions as Options
from irq_convert.jobs.finetune.options import Init, Optimizer, Schedule, TrainDtype

if TYPE_CHECKING:
    from irq_convert.jobs.finetune.report import FinetuneReport


def _in(panel: str) -> Callable[..., Any]:
    """A maker of options that help lists under `panel`."""

    def option(about: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=about, rich_help_panel=panel, **more)

    return option


_adapter, _data, _steps = _in("Adapter"), _in("Data"), _in("Steps")
_optimizer, _run, _teacher = _in("Optimizer"), _in("Run"), _in("Teacher")


def finetune_command(
    model: Annotated[str, typer.Argument(help="Artifact to train on: folder or Hub id.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Text, or .json/.jsonl rows with instruction/input/output, prompt/completion, "
            "messages or text.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Adapter folder to create.", show_default=False)],
    lora: Annotated[
        AdapterKind,
        _adapter(
            "plain LoRA, iec (elastic connections), block (mergeable into the artifact) or "
            "statistics (scale and tau themselves, no matrices)."
        ),
    ] = AdapterKind.IEC,
    statistics: Annotated[
        Statistics | None, _adapter("Scale, tau or both train, beside matrices or alone.")
    ] = None,
    connection: Annotated[
        Connection | None, _adapter("Elastic connections to train.  \\[default: both]")
    ] = None,
    rank: Annotated[int, _adapter("Rank r.")] = 64,
    alpha: Annotated[float, _adapter("The update is scaled by alpha / r.")] = 16,
    rslora: Annotated[bool, _adapter("Scale by alpha / sqrt(r).", "--rslora")] = False,
    dropout: Annotated[
        float | None,
        _adapter("On the adapter's input.  \\[default: 0.1 up to 13 B weights, 0.05 above]"),
    ] = None,
    init: Annotated[
        Init | None,
        _adapter(
            "error starts it at what quantizing has lost of --source.  "
            "\\[default: error with a teacher, else default]"
        ),
    ] = None,
    source: Annotated[
        str | None,
        _adapter("Dense model for --init error.  \\[default: the teacher]"),
    ] = None,
    importance: Annotated[
        Path | None,
        _adapter(
            "What counts for --init error: measure's file, an imatrix.  \\[default: the data]"
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        _adapter("Modules.  \\[default: all linears but the head]", metavar="NAME,NAME"),
    ] = None,
    eval_data: Annotated[
        Path | None, _data("File to hold out instead of a part of --data.")
    ] = None,
    holdout: Annotated[
        float | None,
        _data("Fraction of --data that is measured, not trained on.  \\[default: 0.05]"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        _data("Tokens an example is cut to.  \\[default: 512, at most the model's]"),
    ] = None,
    tokenizer: Annotated[
        str | None, _data("Folder or Hub id of the tokenizer, if not the artifact's.")
    ] = None,
    teacher: Annotated[
        str | None,
        _teacher("Source model (folder or Hub id) to train towards, by KL, instead of labels."),
    ] = None,
    teacher_weight: Annotated[float, _teacher("Of KL; what is left of 1 is that of labels.")] = 1.0,
    teacher_logits: Annotated[
        Path | None,
        _teacher(
            "File to keep its logits in, or to take them from.  \\[default: OUT, for the run]"
        ),
    ] = None,
    steps: Annotated[int | None, _steps("Optimizer steps.  \\[default: 10000]")] = None,
    epochs: Annotated[float | None, _steps("Passes over the data, instead of --steps.")] = None,
    batch_size: Annotated[int, _steps("Sequences in a step, over all processes.")] = 16,
    micro_batch: Annotated[
        int | None,
        _steps("Sequences in one pass; the rest accumulates.  \\[default: up to 4, a divisor]"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _optimizer(
            "\\[default: 2e-4 up to 13 B weights, 1e-4 above; that of --statistics-rate for "
            "statistics alone]"
        ),
    ] = None,
    statistics_rate: Annotated[
        float | None,
        _optimizer(
            "Learning rate of statistics, of each block's scale.  "
            "\\[default: 3e-3 at 2 bits, 1.3e-3 at 3, 6e-4 at 4]"
        ),
    ] = None,
    beta_rate: Annotated[
        float | None,
        _optimizer("Learning rate of IEC's betas.  \\[default: --learning-rate]"),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        _optimizer("Of the rate.  \\[default: constant; cosine for statistics alone]"),
    ] = None,
    warmup: Annotated[int, _optimizer("Steps of linear warm-up.")] = 0,
    weight_decay: Annotated[float, _optimizer("Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, _optimizer("Clip gradients to it; 0 is never.")] = 0.3,
    optimizer: Annotated[
        Optimizer, _optimizer("auto is paged-adamw on CUDA with bitsandbytes, else adamw.")
    ] = Optimizer.AUTO,
    seed: Annotated[int, _optimizer("Of adapter, order and dropout.")] = 0,
    eval_every: Annotated[
        int | None,
        _run("Steps between held-out losses.  \\[default: a tenth of the run]"),
    ] = None,
    save_every: Annotated[int, _run("Steps between saved states of training.")] = 500,
    resume: Annotated[Resume, _run(RESUMING)] = Resume.AUTO,
    overwrite: Annotated[bool, _run("Replace an adapter in OUT.", "--overwrite")] = False,
    gradient_checkpointing: Annotated[
        bool, _run("Less memory, about a third slower.", "--gradient-checkpointing")
    ] = False,
    dtype: Annotated[
        TrainDtype,
        _run("Of activations; auto is bfloat16 on GPUs that are good at it, else float32."),
    ] = TrainDtype.AUTO,
    device: Annotated[str, _run("cpu, cuda, cuda:1 or auto.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[int | None, _run("CPU threads.  \\[default: torch's]", min=1)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count and estimate, write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train adapters, or scale and tau themselves, on a quantized model.

    Defaults are the paper's recipe. Ctrl-C saves; the same command goes on. Scales with torchrun.

    Example: irq-convert finetune ./model-3bit --data alpaca.json --out ./adapter --lora iec
    """
    options = Options(
        lora=lora,
        statistics=statistics,
        connection=connection,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        init=init,
        source=source,
        importance=importance,
        target_modules=_names(target_modules),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        statistics_rate=statistics_rate,
        beta_rate=beta_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        sequence_length=sequence_length,
        holdout=holdout,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        dtype=dtype,
        optimizer=optimizer,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        trust_remote_code=trust_remote_code,
        teacher=teacher,
        teacher_weight=teacher_weight,
        teacher_logits=teacher_logits,
    )
    quiet_libraries(threads)
    files: dict[str, Any] = {"eval_data": eval_data, "tokenizer": tokenizer}
    if dry_run:
        _dry_run(model, data, options, files, as_json)
        return
    try:
        report = _train(model, data, out, options, files, resume, overwrite)
    except IrqError as error:
        if _speaks(error):
            raise
        raise typer.Exit(error.exit_code) from None
    if _first():
        _show(report, as_json)
    if report.signal:
        raise typer.Exit(128 + report.signal)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _first() -> bool:
    """Whether this is the only process, or the first of torchrun's."""
    return Ranks.from_environment().first


def _speaks(error: IrqError) -> bool:
    """Whether this process says what went wrong: one a host, and all once they work together, but
    none where the first has said it."""
    from torch import distributed

    from irq_convert.jobs.common.torchrun import FailedElsewhere

    if isinstance(error, FailedElsewhere):
        return False
    together = distributed.is_available() and distributed.is_initialized()
    return os.environ.get("LOCAL_RANK", "0") == "0" or (together and not _first())


def _dry_run(
    model: str,
    data: Path,
    options: Options,
    files: dict[str, Any],
    as_json: bool,
) -> None:
    from irq_convert.cli.finetune_show import print_estimate
    from irq_convert.jobs.finetune.estimate import estimate_finetune

    found = estimate_finetune(model, data, options, **files)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_estimate(found)


def _train(
    model: str,
    data: Path,
    out: Path,
    options: Options,
    files: dict[str, Any],
    resume: Resume,
    overwrite: bool,
) -> "FinetuneReport":
    from irq_convert.cli.finetune_show import TrainingBar
    from irq_convert.jobs.finetune.finetune import finetune

    more = {**files, "resume": resume, "overwrite": overwrite}
    if not _first():
        return finetune(model, data, out, options, **more)
    with TrainingBar() as bar:
        return finetune(model, data, out, options, **more, progress=bar)


def _show(report: "FinetuneReport", as_json: bool) -> None:
    from irq_convert.cli.finetune_show import print_report

    if report.signal:
        typer.echo(
            f"irq-convert: stopped at step {report.step} of {report.recipe.steps}; {report.out} "
            "holds the adapter so far: the same command continues there",
            err=True,
        )
        return
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report)
    if report.before and report.after and report.after.mean > report.before.mean:
        typer.echo(
            "irq-convert: the held-out loss has risen: lower --learning-rate, train for fewer "
            "--steps, or give more data",
            err=True,
        )
