"""The `push` command: parse, call, show."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import StageLines, is_main_process
from irq_convert.cli.shared import AsJson

if TYPE_CHECKING:
    from irq_convert.jobs.push.push import PushOptions, PushReport


def push_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What quantize, finetune, merge or export wrote.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Model repository to fill.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made, make it private.")
    ] = False,
    revision: Annotated[
        str, typer.Option(help="Branch to push to; made where it is missing.")
    ] = "main",
    message: Annotated[str | None, typer.Option(help="Summary of the commit.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Base model on the Hub, where DIR does not name it."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the folder before it is pushed.")
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the weights of a repository of another kind."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent and the card, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Push a result to the Hugging Face Hub, with a model card.

    One commit, sent again only where something changed; a card that is there keeps its own text.

    Example: irq-convert push ./model-irq-nf4 my-org/model-irq-nf4 --private
    """
    from irq_convert.jobs.push.push import PushOptions, push

    options = PushOptions(
        revision=revision,
        private=private,
        message=message,
        verify=verify,
        overwrite=overwrite,
        base_model=base_model,
        dry_run=dry_run,
    )
    report = push(folder, repo_id, options, progress=StageLines())
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print_push(report)


def push_target(
    repo_id: str | None, kind: str, *, private: bool, revision: str | None
) -> tuple[str, PushOptions] | None:
    """What --push-to-hub asks for, refused before the work begins if it cannot be done.

    `kind` is what will be pushed, a `FolderKind`.
    """
    from irq_convert.errors import UsageError

    if repo_id is None:
        if private or revision is not None:
            option = "--private" if private else "--push-revision"
            raise UsageError(f"{option} is for --push-to-hub ORG/NAME, which is missing")
        return None
    from irq_convert.jobs.push.push import PushOptions, check_push
    from irq_convert.jobs.push.pushed_folder import FolderKind

    options = PushOptions(revision=revision or "main", private=private, verify=False)
    if is_main_process():
        check_push(repo_id, FolderKind(kind), options)
    return repo_id, options


def push_and_show(
    report: dict[str, object], folder: Path, target: tuple[str, PushOptions] | None, as_json: bool
) -> None:
    """Push to `target`, where there is one, and show that; as JSON together with `report`.

    The report of what is done is printed also where the push fails.
    """
    more = {}
    try:
        if target:
            pushed = _push_result(folder, target)
            more = {"push": pushed.to_dict()}
    finally:
        if as_json:
            typer.echo(json.dumps(report | more, indent=2))
    if target and not as_json:
        print_push(pushed)


def _push_result(folder: Path, target: tuple[str, PushOptions]) -> PushReport:
    """Push what a command has just written; a failure says how to push it later."""
    from irq_convert.errors import IrqError
    from irq_convert.jobs.push.push import push

    repo_id, options = target
    try:
        return push(folder, repo_id, options, progress=StageLines())
    except IrqError as error:
        words = ["irq-convert", "push", str(folder), repo_id]
        words += ["--private"] if options.private else []
        words += ["--revision", options.revision] if options.revision != "main" else []
        later = shlex.join(words)
        raise type(error)(f"{error} ({folder} is whole; push it with: {later})") from error


def print_push(report: PushReport) -> None:
    """The report as aligned lines; for a dry run with the card."""
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts

    relation = f"{report.relation} of {report.base_model}" if report.base_model else ""
    rows = [("repository", f"{report.url} ({report.revision})"), ("holds", report.kind)]
    rows.append(("base model", relation or "not known: give it with --base-model ORG/NAME"))
    if not report.uploaded and not report.deleted:
        facts([*rows, ("uploaded", "nothing: the repository is up to date")])
    else:
        would = "would upload" if report.dry_run else "uploaded"
        rows.append((would, f"{len(report.uploaded)} files, {short_bytes(report.bytes)}"))
        rows += [("", name) for name in report.uploaded]
        rows.append(("unchanged", f"{len(report.unchanged)} files"))
        rows += [("deleted", name) for name in report.deleted]
        facts([*rows, *([("commit", report.commit)] if report.commit else [])])
    if report.dry_run:
        typer.echo(f"\nREADME.md\n\n{report.card}", nl=False)
