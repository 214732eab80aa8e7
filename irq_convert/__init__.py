"""Quantize language models to 2, 3 or 4 bits, load them back, and keep them trainable.

Importing the package is cheap: names come from their modules when they are first used. It also
teaches transformers the quantization method "irq" as soon as transformers is imported, so that
`AutoModelForCausalLM.from_pretrained` reads an artifact directly. Each verb is a command of
`irq-convert`, and takes its options as keywords (docs/python.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irq_convert import autoload
from irq_convert.version import __version__

if TYPE_CHECKING:
    from irq_convert.adapters.attach import attach, prepare_for_training
    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.core.dequantize import dequantize_tensor
    from irq_convert.core.quantize import quantize_tensor
    from irq_convert.core.quantized import QuantizedTensor
    from irq_convert.core.spec import QuantSpec
    from irq_convert.errors import IrqError, UsageError
    from irq_convert.hf.loading import load
    from irq_convert.jobs.calibration.options import CalibrationOptions
    from irq_convert.jobs.evaluate.evaluate import evaluate
    from irq_convert.jobs.evaluate.options import EvalOptions
    from irq_convert.jobs.evaluate.task_options import TaskOptions
    from irq_convert.jobs.evaluate.tasks import evaluate_tasks
    from irq_convert.jobs.export.export import estimate_export, export
    from irq_convert.jobs.export.options import ExportOptions
    from irq_convert.jobs.finetune.estimate import estimate_finetune
    from irq_convert.jobs.finetune.finetune import finetune
    from irq_convert.jobs.finetune.options import FinetuneOptions
    from irq_convert.jobs.generate.generate import generate
    from irq_convert.jobs.generate.options import GenerateOptions
    from irq_convert.jobs.inspect import inspect
    from irq_convert.jobs.measure.measure import estimate_measure, measure
    from irq_convert.jobs.measure.options import MeasureOptions
    from irq_convert.jobs.merge.estimate import estimate_merge
    from irq_convert.jobs.merge.merge import merge
    from irq_convert.jobs.merge.options import MergeOptions
    from irq_convert.jobs.push.push import PushOptions, push
    from irq_convert.jobs.quantize.estimate import estimate_quantize
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize
    from irq_convert.jobs.sizing.options import TargetOptions
    from irq_convert.jobs.verify import verify
    from irq_convert.progress import Progress

_HOMES = {
    "CalibrationOptions": "irq_convert.jobs.calibration.options",
    "EvalOptions": "irq_convert.jobs.evaluate.options",
    "ExportOptions": "irq_convert.jobs.export.options",
    "FinetuneOptions": "irq_convert.jobs.finetune.options",
    "GenerateOptions": "irq_convert.jobs.generate.options",
    "IecLoraConfig": "irq_convert.adapters.config",
    "IrqError": "irq_convert.errors",
    "MeasureOptions": "irq_convert.jobs.measure.options",
    "MergeOptions": "irq_convert.jobs.merge.options",
    "Progress": "irq_convert.progress",
    "PushOptions": "irq_convert.jobs.push.push",
    "QuantSpec": "irq_convert.core.spec",
    "QuantizeOptions": "irq_convert.jobs.quantize.options",
    "QuantizedTensor": "irq_convert.core.quantized",
    "TargetOptions": "irq_convert.jobs.sizing.options",
    "TaskOptions": "irq_convert.jobs.evaluate.task_options",
    "UsageError": "irq_convert.errors",
    "attach": "irq_convert.adapters.attach",
    "dequantize_tensor": "irq_convert.core.dequantize",
    "estimate_export": "irq_convert.jobs.export.export",
    "estimate_finetune": "irq_convert.jobs.finetune.estimate",
    "estimate_measure": "irq_convert.jobs.measure.measure",
    "estimate_merge": "irq_convert.jobs.merge.estimate",
    "estimate_quantize": "irq_convert.jobs.quantize.estimate",
    "evaluate": "irq_convert.jobs.evaluate.evaluate",
    "evaluate_tasks": "irq_convert.jobs.evaluate.tasks",
    "export": "irq_convert.jobs.export.export",
    "finetune": "irq_convert.jobs.finetune.finetune",
    "generate": "irq_convert.jobs.generate.generate",
    "inspect": "irq_convert.jobs.inspect",
    "load": "irq_convert.hf.loading",
    "measure": "irq_convert.jobs.measure.measure",
    "merge": "irq_convert.jobs.merge.merge",
    "prepare_for_training": "irq_convert.adapters.attach",
    "push": "irq_convert.jobs.push.push",
    "quantize": "irq_convert.jobs.quantize.quantize",
    "quantize_tensor": "irq_convert.core.quantize",
    "verify": "irq_convert.jobs.verify",
}
"""Every name of the face, and the module that it comes from."""

__all__ = [
    "CalibrationOptions",
    "EvalOptions",
    "ExportOptions",
    "FinetuneOptions",
    "GenerateOptions",
    "IecLoraConfig",
    "IrqError",
    "MeasureOptions",
    "MergeOptions",
    "Progress",
    "PushOptions",
    "QuantSpec",
    "QuantizeOptions",
    "QuantizedTensor",
    "TargetOptions",
    "TaskOptions",
    "UsageError",
    "__version__",
    "attach",
    "dequantize_tensor",
    "estimate_export",
    "estimate_finetune",
    "estimate_measure",
    "estimate_merge",
    "estimate_quantize",
    "evaluate",
    "evaluate_tasks",
    "export",
    "finetune",
    "generate",
    "inspect",
    "load",
    "measure",
    "merge",
    "prepare_for_training",
    "push",
    "quantize",
    "quantize_tensor",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload.install()
