"""Embeddings and output heads, tied or not, on packed rows. Imports vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from irq_convert.artifact.config import ModuleFormat
from irq_convert.nn.embedding import packed_embedding
from irq_convert.vllm.held import HeldWeights, Piece
from irq_convert.vllm.linear import hold, is_dummy
from irq_convert.vllm.shards import Shard


class IrqTableMethod(QuantizeMethodBase):
    """Looks rows of table `name` of the files up, and multiplies with them as a head.

    Ranks split a table by rows; vLLM pads it with rows that no token has.
    """

    def __init__(self, name: str, fmt: ModuleFormat) -> None:
        super().__init__()
        self.name = name
        self.fmt = fmt
        self.empty = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Plan which rows the rank holds; those that pad the table are made when it computes."""
        own: Any = layer.shard_indices
        rows = (own.org_vocab_start_index, own.org_vocab_end_index)
        shard = Shard((rows,) if rows[0] < rows[1] else ())
        self.empty = is_dummy()
        hold(layer, HeldWeights((Piece(self.name, input_size, shard, self.fmt),), params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises `IrqError` naming a tensor that the files lack."""
        layer.irq.finish(self.empty)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows of integers `[...]`, `[..., inputs]` in the dtype of the model."""
        held: Any = layer.irq
        ids = input_.reshape(-1)
        if not held.rows[0]:
            rows = torch.zeros(ids.shape[0], held.pieces[0].cols, dtype=held.dtype).to(ids.device)
        else:
            rows = packed_embedding(ids, held.quantized(0), held.dtype)
        return rows.view(*input_.shape, -1)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[..., inputs]` to a number for each row that vLLM has, those of its padding 0."""
        held: Any = layer.irq
        more = int(layer.num_embeddings_per_partition) - held.rows[0]
        logits: torch.Tensor = functional.pad(held(x), (0, more)) if more else held(x)
        return logits if bias is None else logits + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head `layer` hold what `embed_tokens` holds."""
        held: Any = embed_tokens.irq
        layer.irq = held
        for name in [name for name in layer._parameters if name.startswith("weight")]:
            setattr(layer, name, getattr(embed_tokens, name))
        return layer
