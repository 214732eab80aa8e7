"""Options that commands have in common: those that write folders of weights, those that run models.

The parameters of a command keep their names and defaults; what an option is called and how it
explains itself stands here once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from irq_convert.errors import UsageError
from irq_convert.jobs.common.resume import Resume

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Delete each file of a Hub model when it was read: little disk needed."
    ),
]
LlamaVersion = Annotated[
    str | None,
    typer.Option(help="Of Meta's own files, where they do not tell: 1, 2, 3, 3.1, 3.2, code."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  \\[default: all]")]
MaxShardSize = Annotated[float, typer.Option(help="Largest shard, in GB (10^9 bytes).")]
RESUMING = "Continue a stopped run: where there is one, else fail, or start anew."
Resuming = Annotated[Resume, typer.Option(help=RESUMING)]
PushToHub = Annotated[
    str | None, typer.Option(metavar="ORG/NAME", help="Push the result to the Hub (see `push`).")
]
Private = Annotated[
    bool, typer.Option("--private", help="With --push-to-hub: make a private repository.")
]
PushRevision = Annotated[
    str | None, typer.Option(help="With --push-to-hub: branch to push to.  \\[default: main]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT once the new one is whole.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]

AnyModel = Annotated[str, typer.Argument(help="Model folder or Hub id, dense or quantized.")]
PutOn = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Adapter to put on MODEL, of any kind.")
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take an adapter that was trained on another model.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not the model's.")
]
TorchThreads = Annotated[int | None, typer.Option(min=1, help="CPU threads.  \\[default: torch's]")]


def shard_bytes(gigabytes: float) -> int:
    """What --max-shard-size asks for, in bytes; `UsageError` for a number that makes no sense."""
    if not 1e-9 <= gigabytes < 1e9:
        raise UsageError(f"--max-shard-size {gigabytes}: a positive number of GB is needed")
    return int(gigabytes * 1e9)
