"""The start of a run's adapter where the damage is: what was asked, and doing it.

Which inputs count is told by the training examples themselves, or by a file of importance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.source_identity import source_identity
from irq_convert.checkpoint.locate import Fetch, open_source
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration.importance_file import ImportanceFile, read_importance_file
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.finetune.encode import Example
from irq_convert.jobs.finetune.model import trainable
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.processes import Processes
from irq_convert.jobs.finetune.start_error import StartReport, start_from_error
from irq_convert.jobs.finetune.start_layers import other_shape
from irq_convert.progress import Progress

START_TOKENS = 65_536
WINDOW = 512
_STARTED = "start"


@dataclass(frozen=True)
class Start:
    """Where adapters start: the `source` whose lost weights they take, and what `inputs` count.

    `sha256` tells it from another start.
    """

    source: str
    revision: str | None
    inputs: ImportanceFile | Windows
    sha256: str

    def run(
        self,
        model: Any,
        artifact: Artifact,
        *,
        device: str,
        scratch: Path,
        progress: Progress,
    ) -> StartReport:
        """Set A and B of the adapter on `model`; raises as `start_from_error`."""
        checkpoint = open_source(self.source, self.revision, Fetch.AS_READ)
        with checkpoint.fetcher:
            return start_from_error(
                model,
                artifact,
                checkpoint,
                inputs=self.inputs,
                device=device,
                scratch=scratch,
                progress=progress,
            )


def start_in_first(
    start: Start,
    model: Any,
    artifact: Artifact,
    processes: Processes,
    *,
    device: str,
    scratch: Path | None,
    progress: Progress,
) -> None:
    """`start.run` in the first process, which has a `scratch`; the others wait, and are given it.

    Raises as `start_from_error`, in all of them.
    """
    with RunProcesses() as run:
        if scratch is not None:
            start.run(model, artifact, device=device, scratch=scratch, progress=progress)
            run.put(_STARTED, b"")
        else:
            run.take(_STARTED)
    processes.share(trainable(model).values())


def find_start(
    options: FinetuneOptions,
    artifact: Artifact,
    examples: Sequence[Example],
    name: str,
    progress: Progress,
) -> Start | None:
    """The start that `options` ask for; `name` is that of the data.

    A teacher that is another model than `artifact` was made from gives none, where nobody asked for
    one. Raises `UsageError` for any other such source, and as opening a source or a file of
    importance does.
    """
    source = options.source or options.teacher
    if not options.from_error or source is None:
        return None
    checkpoint = open_source(source, None, Fetch.HEADERS)
    try:
        other = _other_model(checkpoint, artifact)
        if other is None:
            identity = source_identity(checkpoint, source)
    finally:
        checkpoint.fetcher.close(done=False)
    if other is not None:
        if options.init is not None or options.source is not None:
            raise UsageError(f"{other}: give the source that the artifact was made from")
        progress.note(f"adapters start at no change, as the artifact is of another model: {other}")
        return None
    inputs: ImportanceFile | Windows
    if options.importance is not None:
        inputs = read_importance_file(options.importance)
        told = inputs.sha256
    else:
        inputs = example_windows(examples, name)
        told = inputs.sha256
    digest = hashlib.sha256(json.dumps([identity, told], sort_keys=True).encode()).hexdigest()
    return Start(source, checkpoint.revision, inputs, digest)


def _other_model(checkpoint: Checkpoint, artifact: Artifact) -> str | None:
    """The first tensor of `artifact` that `checkpoint` lacks or has of another shape."""
    for tensor in artifact.quantized:
        other = other_shape(checkpoint, tensor)
        if other is not None:
            return other
    return None


def example_windows(examples: Sequence[Example], name: str) -> Windows:
    """The tokens of `examples`, one after the other, in windows as long as the longest of them.

    At most `WINDOW` tokens a window and `START_TOKENS` in all.
    """
    length = min(WINDOW, max(len(example.ids) for example in examples))
    ids = torch.cat([example.ids for example in examples])[:START_TOKENS]
    count = len(ids) // length
    return Windows(ids[: count * length].view(count, length), 0, name)
