"""The quantization method "irq" as vLLM's configuration. Imports vLLM: `register.py` alone may."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.version import __version__

from irq_convert.artifact import config as irq
from irq_convert.vllm.modules import StoredModules


class IrqVllmConfig(QuantizationConfig):
    """`quantization_config` of an artifact, and which modules of its files are packed."""

    def __init__(self, modules: StoredModules) -> None:
        super().__init__()
        self.modules = modules

    def get_name(self) -> str:
        """The method's name in config.json."""
        return irq.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that products are taken in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """As Triton's."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the configuration is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IrqVllmConfig:
        """Raises `IrqError` naming the key that is missing, unknown or contradictory."""
        return cls(StoredModules(irq.QuantizationConfig.from_dict(config)))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of the model's files, in its folder or on the Hub.

        They alone tell whether embeddings are packed; without them those count as dense.
        """
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        headers = get_safetensors_params_metadata(model_name, revision=revision)
        if headers:
            tensors = {name: info for name, info in headers.items() if "dtype" in info}
            self.modules = self.modules.with_tensors(
                {name: str(info["dtype"]) for name, info in tensors.items()}
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that a model's class has for the modules of the files."""
        self.modules = self.modules.renamed(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What computes `layer`; None where vLLM's own method for dense weights does.

        Raises `IrqError`, naming the module, for what cannot be served.
        """
        from irq_convert.vllm.choose import choose

        return choose(self, layer, prefix)


def add_method() -> str:
    """Register the method with vLLM; returns vLLM's version."""
    register_quantization_config(irq.QUANT_METHOD)(IrqVllmConfig)
    return str(__version__)
