"""The dry run: what would be trained, for how long, and about how much memory it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.hf.model_names import model_names
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.finetune.data import Data
from irq_convert.jobs.finetune.model import linears_on_meta, predict_trainable
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.prepare import Preparation, prepare
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.recipe import Recipe
from irq_convert.jobs.finetune.teacher_file import all_examples
from irq_convert.jobs.finetune.teacher_pass import states_bytes
from irq_convert.jobs.finetune.teacher_source import Teacher
from irq_convert.remote_code import remote_code

ADAPTER_BYTES = 16  # float32: the parameter, its gradient and AdamW's two moments
LOGIT_BYTES = 12  # float32: logits, their softmax and gradient


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, roughly; `activations` are those of one pass."""

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class TeacherCost:
    """A teacher's logits of `tokens`, `bytes` in a file; `there`: they need not be made. `states`:
    bytes of hidden states on the disk while they are."""

    teacher: str
    tokens: int
    bytes: int
    states: int
    there: bool

    @classmethod
    def of(cls, teacher: Teacher, data: Data) -> TeacherCost:
        """By shapes alone."""
        lengths = [len(example.ids) for example in all_examples(data)]
        contents = teacher.contents
        states = 0 if teacher.there else states_bytes(lengths, teacher.width)
        return cls(teacher.name, contents.rows, contents.nbytes, states, teacher.there)


@dataclass(frozen=True)
class FinetuneEstimate:
    """What a run would do."""

    plan: Preparation
    trainable: int
    memory: Memory

    @property
    def teacher(self) -> TeacherCost | None:
        """What its logits take; None where there is no teacher."""
        return (
            None if self.plan.teacher is None else TeacherCost.of(self.plan.teacher, self.plan.data)
        )

    @property
    def epochs(self) -> float:
        """Times that the data is gone through."""
        recipe, examples = self.plan.recipe, len(self.plan.data.train.examples)
        return recipe.steps * recipe.batch_size / examples

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        memory = self.memory
        return {
            "model": self.plan.model,
            "recipe": self.plan.recipe.to_dict(),
            "data": self.plan.data.to_dict(),
            "epochs": self.epochs,
            "trainable_parameters": self.trainable,
            "teacher": None if self.teacher is None else asdict(self.teacher),
            "memory_bytes": {
                "weights": memory.weights,
                "adapter": memory.adapter,
                "activations": memory.activations,
                "total": memory.total,
            },
        }


def estimate_finetune(
    model: str | Path,
    data: str | Path,
    options: FinetuneOptions | None = None,
    *,
    eval_data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: TrainingProgress | None = None,
    **settings: Any,
) -> FinetuneEstimate:
    """What `finetune` with the same arguments would train, counted without loading weights.

    Raises as `prepare`, and `IrqError` when transformers cannot build the model that config.json
    describes.
    """
    options = chosen(FinetuneOptions, options, settings)
    more = {"eval_data": eval_data, "tokenizer": tokenizer}
    with remote_code(options.trust_remote_code):
        return estimate_plan(prepare(model, data, options, **more, progress=progress))


def estimate_plan(plan: Preparation) -> FinetuneEstimate:
    """The same of a run that is prepared."""
    linears = linears_on_meta(plan.config)
    trainable = predict_trainable(plan.recipe, linears, plan.artifact.config, _expert_blocks(plan))
    size = 2 if plan.recipe.dtype == "bfloat16" else 4
    weights = plan.artifact.quantized_bytes + size * sum(t.numel for t in plan.artifact.copied)
    memory = Memory(weights, ADAPTER_BYTES * trainable, _activations(plan, linears, size))
    return FinetuneEstimate(plan, trainable, memory)


def _expert_blocks(plan: Preparation) -> int:
    """Blocks of quantized experts that are trained; to find them builds the model on meta."""
    if plan.recipe.rank or plan.recipe.target_modules is not None:
        return 0
    experts = model_names(plan.artifact).experts
    return sum(
        tensor.shape.rows * tensor.shape.blocks_per_row
        for tensor in plan.artifact.quantized
        if tensor.name in experts
    )


def _activations(plan: Preparation, linears: dict[str, Any], size: int) -> int:
    """What backward needs of one pass: inputs, dropped-out inputs and outputs of linears, logits.

    With gradient checkpointing the input of each layer, and one layer's activations at a time.
    """
    recipe: Recipe = plan.recipe
    config = plan.config.get_text_config()
    longest = max(len(example.ids) for example in plan.data.train.examples)
    tokens = recipe.micro_batch * longest
    copies = 2 if recipe.dropout else 1
    kept = sum(copies * m.in_features + m.out_features for m in linears.values()) * size
    layers = max(1, getattr(config, "num_hidden_layers", 1))
    if recipe.gradient_checkpointing:
        kept = kept // layers + layers * int(getattr(config, "hidden_size", 0)) * size
    dense = max((m.in_features * m.out_features for m in linears.values()), default=0) * size
    return tokens * (kept + int(getattr(config, "vocab_size", 0)) * LOGIT_BYTES) + dense
