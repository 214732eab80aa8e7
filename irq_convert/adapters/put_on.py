"""An adapter on a model that is run: does it belong there, and put it on, whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter import PREFIX, open_adapter
from irq_convert.artifact.adapter_beside import copied_embedding
from irq_convert.artifact.adapter_config import WEIGHTS_FILE
from irq_convert.artifact.adapter_tokens import ROWS
from irq_convert.artifact.identity import artifact_identity
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.locate import locate
from irq_convert.errors import IrqError, UsageError, one_line

SHORT = 12


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter folder that may be put on a model.

    Attributes:
        folder: where it lies.
        kind: `plain`, `iec`, `block` or `statistics`.
        base_sha256: the identity of the artifact it was trained on, None if it does not say.
        base_matches: whether that is the model; None if it is not known.
    """

    folder: str
    kind: str
    base_sha256: str | None
    base_matches: bool | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @property
    def doubt(self) -> str | None:
        """One line where it is not certain that adapter and model belong together."""
        if self.base_matches is None:
            return f"{self.folder}: does not record which artifact it was trained on: not checked"
        return None


def check_adapter(folder: str | Path, model: str | Path, any_base: bool = False) -> CheckedAdapter:
    """Open the adapter in `folder` and compare the base it records with `model`; loads nothing.

    Raises `UsageError` where it is no adapter, or was trained on another artifact and not
    `any_base`; `IrqError` where it is damaged.
    """
    stored = open_adapter(Path(folder))
    recorded = stored.config.base_sha256
    where = str(folder)
    if recorded is None:
        return CheckedAdapter(where, stored.config.kind, None, None)
    identity = artifact_identity(locate(os.fspath(model)).folder)
    if identity != recorded and not any_base:
        raise UsageError(
            f"{where}: was trained on the artifact {recorded[:SHORT]}, {model} is "
            f"{identity[:SHORT]}; give the one it was trained on (--any-base measures all the same)"
        )
    return CheckedAdapter(where, stored.config.kind, recorded, identity == recorded)


def put_on(model: Any, adapter: CheckedAdapter) -> Any:
    """`model` with the adapter active, in evaluation mode; every tensor of the file is used.

    A model whose vocabulary was larger in training gets as many rows. Raises `IrqError` where a
    tensor has no place in the model, has another shape, or is missing.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    from irq_convert.adapters.register import register

    register()
    found = read_header(Path(adapter.folder) / WEIGHTS_FILE).tensors
    _resize(model, adapter, found)
    try:
        adapted = PeftModel.from_pretrained(model, adapter.folder)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise IrqError(f"{adapter.folder}: does not fit the model: {one_line(error)}") from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Besides, PEFT saves embeddings that were adapted or resized, which it loads into the model,
    # and the rows of a tied head a second time.
    more_than = {name: name.replace(ROWS, ".weight") for name in {*found} - wanted}
    unknown = {name for name, weight in more_than.items() if copied_embedding(weight) is None}
    for what, names in (("lacks", wanted - {*found}), ("has the unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise IrqError(
                f"{adapter.folder}: {what} {min(names)}{more}: it is damaged or of another model"
            )
    return adapted.eval()


def _resize(model: Any, adapter: CheckedAdapter, tensors: Mapping[str, TensorInfo]) -> None:
    """Give `model` the rows of the vocabulary that the adapter brings, all of which it must bring.

    Raises `IrqError` where embedding or head would have rows that were never trained.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None:
        return
    brought = {
        name: info.shape[0]
        for key, info in tensors.items()
        if (name := copied_embedding(key)) and info.shape
    }
    rows = {size for size in brought.values() if size != embedding.weight.shape[0]}
    if len(rows) != 1:
        return  # none, or PEFT will say which does not fit
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embedding.weight
    for module in (embedding,) if tied else (embedding, head):
        name = names.get(module)
        if (
            name is not None
            and not tied
            and not any(f".{key}".endswith(f".{name}.weight") for key in brought)
        ):
            raise IrqError(
                f"{adapter.folder}: has {rows.pop()} rows of {min(brought).removeprefix(PREFIX)}, "
                f"but none of {name}: the new rows are lost; name it in modules_to_save and "
                "train again"
            )
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)
