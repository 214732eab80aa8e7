"""Changing the vocabulary of a model whose embeddings or head are packed: refused in one line.

transformers would make new rows of the codes' dtype and fail somewhere inside.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from irq_convert.errors import UsageError
from irq_convert.nn.packed import PackedWeight

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_METHOD = "resize_token_embeddings"


def forbid_resizing(model: PreTrainedModel) -> None:
    """Let `model` and the models in it refuse another size where their rows are packed."""
    for module in _models(model):
        table, head = module.get_input_embeddings(), module.get_output_embeddings()
        packed = next((each for each in (table, head) if isinstance(each, PackedWeight)), None)
        if packed is not None:
            module.__dict__[_METHOD] = partial(_refuse, table, packed)


def allow_resizing(model: PreTrainedModel) -> None:
    """Take `forbid_resizing` back."""
    for module in _models(model):
        module.__dict__.pop(_METHOD, None)


def _models(model: PreTrainedModel) -> list[Any]:
    from transformers import PreTrainedModel

    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                module.get_input_embeddings()
            except (NotImplementedError, AttributeError):
                continue
            found.append(module)
    return found


def _refuse(
    table: nn.Embedding,
    packed: PackedWeight,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Embedding:
    """`resize_token_embeddings` where it changes nothing."""
    rows = packed.matrix_shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted += -wanted % pad_to_multiple_of
    if wanted != rows:
        raise UsageError(
            f"{packed.label} {list(packed.matrix_shape)} is packed and cannot get {wanted} rows: "
            "resize the source and quantize it again, or quantize without --include-embeddings"
        )
    return table
