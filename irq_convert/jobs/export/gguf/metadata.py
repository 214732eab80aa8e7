"""The key-value part of the file: what llama.cpp needs to know besides the tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf.gguf_writer import WriterState

from irq_convert.jobs.export.gguf.family import Model
from irq_convert.jobs.export.gguf.vocabulary import Vocabulary

FILE_TYPES = {
    GgmlType.F32: gguf.LlamaFileType.ALL_F32,
    GgmlType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GgmlType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GgmlType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    GgmlType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_SCALINGS = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}


@dataclass(frozen=True)
class TensorHead:
    """A tensor as the header describes it; `shape` is that of the checkpoint, rows first."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    nbytes: int


def build_gguf_header(
    model: Model, vocabulary: Vocabulary, name: str, kind: GgmlType, tensors: Sequence[TensorHead]
) -> bytes:
    """Everything before the data, padded to `ALIGNMENT`; data follows in the order of `tensors`.

    `name` is the model's, `kind` the type of most weights. Equal input gives equal bytes.
    """
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[model.family.arch])
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
        )
    _add_general(writer, name, kind)
    _add_sizes(writer, model)
    _add_rope(writer, model)
    _add_vocabulary(writer, vocabulary)
    buffer = io.BytesIO()
    # The writer opens paths only; handed over like this it writes into memory.
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = buffer.getvalue()
    return head + bytes(-len(head) % ALIGNMENT)


def _add_general(writer: gguf.GGUFWriter, name: str, kind: GgmlType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    total, shared, expert, experts = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, experts))
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_sizes(writer: gguf.GGUFWriter, model: Model) -> None:
    writer.add_vocab_size(model.vocab)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_rope_dimension_count(model.head_dim)


def _add_rope(writer: gguf.GGUFWriter, model: Model) -> None:
    rope = model.rope
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    scaling = _SCALINGS.get(str(rope.get("rope_type")))
    if scaling is None:
        return
    writer.add_rope_scaling_type(scaling)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if scaling != gguf.RopeScalingType.YARN:
        return
    original = rope.get("original_max_position_embeddings") or model.context
    writer.add_rope_scaling_orig_ctx_len(int(original))
    for key, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(float(rope[key]))


def rope_divisors(model: Model) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by, float32 `[head_dim / 2]`; None for none.

    Only "llama3" needs them, as the tensor rope_freqs.weight. They are the quotient of the plain
    frequencies and those of transformers' own function.
    """
    if model.rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    steps = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    plain = 1.0 / float(model.rope["rope_theta"]) ** steps
    return (plain / scaled.to(torch.float64)).to(torch.float32)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, token in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
