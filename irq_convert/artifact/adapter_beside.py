"""Tensors that PEFT saves beside A and B: whole modules, embeddings, and copies of either.

A module of `modules_to_save` is in the file once, by its own name. Where the vocabulary was resized
or an embedding is adapted, PEFT saves the embeddings besides, with every part that its wrappers
have: the trained one again, the one from before training, and the base under an adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from irq_convert.artifact.adapter_config import StoredConfig
from irq_convert.artifact.head import EMBEDDINGS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.state_dict import HEADS
from irq_convert.errors import IrqError

_AGAIN, _BEFORE = ".modules_to_save.", ".original_module."
_BASES = (".token_adapter.base_layer.", ".base_layer.")
_DAMAGED = "the adapter is damaged: save or download it again"
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT itself puts into `modules_to_save` for a task; a model has one of them."""


@dataclass(frozen=True)
class Beside:
    """By the names that tensors have in the model: those that take a tensor's place (`saved`).

    `again` are second copies of those. `bases` are tensors under an adapter, which are the
    artifact's unless the vocabulary was resized.
    """

    saved: dict[str, TensorInfo] = field(default_factory=dict)
    again: dict[str, TensorInfo] = field(default_factory=dict)
    before: dict[str, TensorInfo] = field(default_factory=dict)
    bases: dict[str, TensorInfo] = field(default_factory=dict)

    def add(self, config: StoredConfig, name: str, info: TensorInfo) -> bool:
        """Take in tensor `name`; False where no rule accounts for it."""
        for part, found in ((_AGAIN, self.again), (_BEFORE, self.before)):
            plain = name.replace(part, ".")
            # A head that PEFT keeps tied to a trained embedding is wrapped, and listed nowhere.
            follows = is_embedding(plain) and bool(config.raw.get("ensure_weight_tying"))
            if part in name and (config.is_saved(plain) or follows):
                found[plain] = info
                return True
        for part in _BASES:
            if part in name and is_embedding(name.replace(part, ".")):
                self.bases[name.replace(part, ".")] = info
                return True
        if config.is_saved(name) or is_embedding(name):
            self.saved[name] = info
            return True
        return False

    def check(self, config: StoredConfig, layers: Collection[str]) -> None:
        """Raise `IrqError`, naming the tensor, for a copy of nothing, or of another shape."""
        for copies in (self.again, self.before):
            for name, info in copies.items():
                trained = self.saved.get(name)
                if trained is None or trained.shape != info.shape:
                    found = "nothing" if trained is None else f"{list(trained.shape)}"
                    raise IrqError(
                        f"{info.shard.name}: {info.name} {list(info.shape)} stands beside {found} "
                        f"as {name}: {_DAMAGED}"
                    )
        for name, info in self.bases.items():
            if name.rpartition(".")[0] not in layers:
                raise IrqError(
                    f"{info.shard.name}: {info.name} {list(info.shape)} is the base of a layer "
                    f"of which nothing else is in the file: {_DAMAGED}"
                )
        listed = _TASK_HEADS.get(str(config.raw.get("task_type")), ())
        for wanted in config.modules_to_save:
            if wanted not in listed and not any(config.is_saved(n, wanted) for n in self.saved):
                raise IrqError(
                    f"modules_to_save names {wanted}, but no tensor of it is in the file: "
                    f"{_DAMAGED}"
                )


def is_embedding(name: str) -> bool:
    """Whether a tensor is of a module that holds a row for each token, by its name."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-2] in (*EMBEDDINGS, *HEADS) and parts[-1] in ("weight", "bias")


def copied_embedding(name: str) -> str | None:
    """The embedding or head that tensor `name` of an adapter is, or is a copy of; None for none."""
    for part in (_AGAIN, _BEFORE, *_BASES):
        name = name.replace(part, ".")
    return name if is_embedding(name) else None
