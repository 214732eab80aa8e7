"""The transformers quantizer "irq": swaps layers before loading and freezes them after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from irq_convert.errors import IrqError, UsageError
from irq_convert.hf import autoload
from irq_convert.hf.config import IrqConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules that need a fully imported transformers are imported where they are used: this one is
# imported while transformers' quantizers still are.


class IrqQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models whose linear layers are `IrqLinear`."""

    requires_calibration = False
    quantization_config: IrqConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `UsageError` when asked to quantize a dense model while loading it."""
        if not self.pre_quantized:
            raise UsageError(
                "irq models are quantized ahead: run `irq-convert quantize` and load the result"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the headers of the files and replace dense layers, all on meta."""
        from irq_convert.hf.validate import check_names, plan_swaps, read_headers
        from irq_convert.nn.linear import IrqLinear

        files = kwargs.get("checkpoint_files")
        if not files:
            raise UsageError("irq models load from safetensors files: give a folder or a Hub id")
        tensors = read_headers(files)
        swaps = plan_swaps(model, self.quantization_config.parsed, tensors)
        for swap in swaps:
            dense = model.get_submodule(swap.module)
            assert isinstance(dense, nn.Linear)
            packed = IrqLinear(
                dense.in_features,
                dense.out_features,
                swap.fmt,
                bias=dense.bias is not None,
                device="meta",
                dtype=dense.weight.dtype,
            )
            model.set_submodule(swap.module, packed.train(dense.training))
        check_names(model, swaps, tensors)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Freeze the packed parts: the loader makes every floating parameter trainable."""
        from irq_convert.nn.linear import IrqLinear, part_shapes

        for module in model.modules():
            if not isinstance(module, IrqLinear):
                continue
            shapes = part_shapes(module.out_features, module.in_features, module.fmt)
            for name, part in module.packed_parts().items():
                part.requires_grad_(False)
                if part.dtype != shapes[name][1]:  # a model's own dtype plan may widen float16
                    part.data = part.data.to(shapes[name][1])
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Called before saving: make the configuration true of what will be in the files."""
        from irq_convert.hf.describe import describe

        if not getattr(model, "_hf_peft_config_loaded", False):
            parsed = describe(model, self.quantization_config.parsed)
            if parsed is not self.quantization_config.parsed:
                self.quantization_config = IrqConfig(**parsed.to_dict())
                model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """Replace packed layers by dense ones in `dtype`, one at a time."""
        from irq_convert.nn.linear import IrqLinear

        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        loaded = model.dtype if model.dtype.is_floating_point else model.config.dtype
        layers = {n: m for n, m in model.named_modules() if isinstance(m, IrqLinear)}
        for name, module in layers.items():
            if module.weight.is_meta:
                raise IrqError(
                    f"{name} is offloaded to disk: load the model without offloading to dequantize"
                )
        for name, module in layers.items():
            bias = module.bias is not None
            dense = nn.Linear(module.in_features, module.out_features, bias, device="meta")
            dense.weight = nn.Parameter(module.dequantize(wanted))
            if module.bias is not None:
                dense.bias = module.bias
            model.set_submodule(name, dense.train(module.training))
        for parameter in model.parameters():
            if parameter.dtype == loaded != wanted:
                parameter.data = parameter.data.to(wanted)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed parts as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` passes through the layers."""
        return True


autoload.install()  # where importing this module is what first imported transformers
