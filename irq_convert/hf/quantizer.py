"""The transformers quantizer "irq": swaps layers before loading and freezes them after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import __version__ as TRANSFORMERS
from transformers.quantizers.base import HfQuantizer

from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.config import IrqConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from irq_convert.hf.conversions import Adjusted

# Modules that need a fully imported transformers are imported where they are used: this one is
# imported while transformers' quantizers still are.

LEAST_TRANSFORMERS = (5, 20)
"""As the package requires; an environment of vLLM may pin an older one."""


class IrqQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models whose layers are `IrqLinear` and `IrqEmbedding`."""

    requires_calibration = False
    quantization_config: IrqConfig
    _adjusted: Adjusted | None = None
    _pairs: tuple[tuple[str, str], ...] = ()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `UsageError` in an environment whose transformers is too old.

        Or when asked to quantize a dense model while loading it.
        """
        found = tuple(map(int, TRANSFORMERS.split(".")[:2]))
        if found < LEAST_TRANSFORMERS:
            least = ".".join(map(str, LEAST_TRANSFORMERS))
            raise UsageError(
                f"irq models need transformers {least} or later, and this environment "
                f"has {TRANSFORMERS}: load them in another one (vLLM serves them as they are)"
            )
        if not self.pre_quantized:
            raise UsageError(
                "irq models are quantized ahead: run `irq-convert quantize` and load the result"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the headers of the files and replace dense layers, all on meta."""
        from irq_convert.hf.swap import swap_layers
        from irq_convert.hf.validate import check_loaded_names, plan_swaps, read_headers

        files = kwargs.get("checkpoint_files")
        if not files:
            raise UsageError("irq models load from safetensors files: give a folder or a Hub id")
        tensors = read_headers(files)
        swaps = plan_swaps(model, self.quantization_config.parsed, tensors)
        swap_layers(model, swaps)
        self._adjusted = check_loaded_names(model, swaps, tensors)
        self._pairs = swaps.pairs(tensors)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Keep transformers from merging or rearranging packed tensors, when saving, too."""
        from irq_convert.hf.conversions import adjust

        return adjust(weight_conversions, self._adjusted)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Freeze the packed parts: the loader makes every floating parameter trainable."""
        from irq_convert.hf.names import finish_parts
        from irq_convert.hf.resizing import forbid_resizing
        from irq_convert.nn.embedding import IrqEmbedding
        from irq_convert.nn.experts import IrqExperts
        from irq_convert.nn.packed import PackedWeight

        finish_parts(model, self._pairs)
        forbid_resizing(model)
        for module in model.modules():
            if isinstance(module, IrqEmbedding):
                module.place_witness()
            if not isinstance(module, PackedWeight | IrqExperts):
                continue
            dtypes = module.part_dtypes()
            for name, part in module.packed_parts().items():
                part.requires_grad_(False)
                if part.dtype != dtypes[name]:  # a model's own dtype plan may widen float16
                    part.data = part.data.to(dtypes[name])
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
        from irq_convert.hf.resizing import allow_resizing
        from irq_convert.hf.tied import untie_parts
        from irq_convert.nn.experts import IrqExperts
        from irq_convert.nn.packed import PackedWeight
        from irq_convert.nn.unpacked import unpack_experts

        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        loaded = model.dtype if model.dtype.is_floating_point else model.config.dtype
        kinds = (PackedWeight, IrqExperts)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        for name, module in layers.items():
            if any(part.is_meta for part in module.packed_parts().values()):
                raise IrqError(
                    f"{name} is offloaded to disk: load the model without offloading to dequantize"
                )
        for module in layers.values():
            if isinstance(module, IrqExperts):
                unpack_experts(module, wanted)
        made: dict[int, nn.Parameter] = {}  # tied weights stay one
        for name, module in layers.items():
            if isinstance(module, PackedWeight) and _holds(model, name, module):
                codes = id(module.packed_parts()["weight"])
                if codes not in made:
                    made[codes] = nn.Parameter(module.dequantize(wanted))
                model.set_submodule(name, _dense(module, made[codes]))
        untie_parts(model)
        allow_resizing(model)
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


def _dense(layer: nn.Module, weight: nn.Parameter) -> nn.Module:
    from irq_convert.nn.embedding import IrqEmbedding, dense_embedding
    from irq_convert.nn.linear import IrqLinear, dense_layer

    if isinstance(layer, IrqEmbedding):
        return dense_embedding(layer, weight)
    assert isinstance(layer, IrqLinear)
    return dense_layer(layer, weight)


def _holds(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether `module` is still there: those of experts have gone into one parameter."""
    parent, _, child = name.rpartition(".")
    try:
        return model.get_submodule(parent)._modules.get(child) is module
    except AttributeError:
        return False
