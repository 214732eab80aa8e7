"""Artifacts whose embeddings and heads are packed: loaded, run, saved, made dense, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

import irq_convert
from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.embedding import IrqEmbedding
from irq_convert.nn.linear import IrqLinear
from irq_convert.progress import Progress
from tests.folders import change_json, read_json, read_tensors
from tests.tiny import SMALL, tiny_config, tiny_model

IDS = torch.tensor([[1, 5, 7, 9, 11, 2, 3]])
CASES = [
    ("llama", True),
    ("llama", False),
    ("gemma3_text", True),  # its table scales what it looks up
    ("gpt2", True),  # its positions are no embeddings of the input
]


def artifact(
    folder: Path, family: str = "llama", tied: bool = True, model: Any = None, **options: Any
) -> Path:
    """A tiny model, quantized with its embeddings."""
    if model is None:
        model = tiny_model(family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    model.save_pretrained(folder / "source")
    options = {"bits": 3, "include_embeddings": True, "threads": 1} | options
    irq_convert.quantize(folder / "source", folder / "a", **options)
    return folder / "a"


def twin(folder: Path, out: Path) -> Any:
    """The dense model that the artifact stands for, in float32."""
    irq_convert.export(folder, out, to="dense", dtype="float32")
    return AutoModelForCausalLM.from_pretrained(out).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_logits_are_those_of_the_dense_twin(tmp_path: Path, family: str, tied: bool) -> None:
    folder = artifact(tmp_path, family, tied)
    dense = twin(folder, tmp_path / "dense")
    for model in (
        irq_convert.load(folder, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto"),
    ):
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert type(table) is IrqEmbedding
        assert type(head) is IrqLinear
        for name, part in table.packed_parts().items():
            other = head.packed_parts()[name]
            assert (part.data_ptr() == other.data_ptr()) == tied
            assert (part is other) == tied
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
        assert not any(p.requires_grad for p in table.parameters())
        made = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            made, dense.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        )
    assert irq_convert.verify(folder, against=tmp_path / "source").ok


@pytest.mark.parametrize("tied", [False, True])
def test_dtypes(tmp_path: Path, tied: bool) -> None:
    model = irq_convert.load(artifact(tmp_path, tied=tied))
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(table(IDS), table.dequantize(torch.bfloat16)[IDS])
    model.to(torch.float32)
    assert model.dtype == torch.float32
    assert (head.weight_scale is table.weight_scale) == tied


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_saving_gives_the_same_bytes(tmp_path: Path, family: str, tied: bool) -> None:
    folder = artifact(tmp_path, family, tied)
    model = irq_convert.load(folder)
    model.save_pretrained(tmp_path / "b")
    before, after = read_tensors(folder), read_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [
        read_json(f / "config.json")["quantization_config"] for f in (folder, tmp_path / "b")
    ]
    assert configs[0] == configs[1]
    again = irq_convert.load(tmp_path / "b")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.tie_weights()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_dequantize(tmp_path: Path, family: str, tied: bool) -> None:
    folder = artifact(tmp_path, family, tied)
    plain = irq_convert.load(folder, dtype=torch.float32).dequantize()
    table, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert (table.weight is head.weight) == tied
    assert torch.equal(plain(IDS).logits, twin(folder, tmp_path / "dense")(IDS).logits)
    plain.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    assert plain.resize_token_embeddings(90).weight.shape[0] == 90


def test_gradients_go_through_a_tied_head(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    model = irq_convert.load(folder, dtype=torch.float32)
    dense = twin(folder, tmp_path / "dense").requires_grad_(False)
    given = [torch.randn(1, 4, 96).requires_grad_()]
    given.append(given[0].detach().clone().requires_grad_())
    for each, x in zip((model, dense), given, strict=True):
        each(inputs_embeds=x).logits.square().sum().backward()
    assert given[0].grad is not None
    torch.testing.assert_close(given[0].grad, given[1].grad)


def test_the_loaded_model_is_smaller(tmp_path: Path) -> None:
    source = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True, vocab_size=2000)
    sizes = []
    for number, asked in enumerate((False, True)):
        folder = tmp_path / str(number)
        model = irq_convert.load(artifact(folder, model=source, include_embeddings=asked))
        assert model.num_parameters() > 0
        sizes.append(model.get_memory_footprint())
    dense, packed = 2 * 2000 * 96, 2000 * (36 + 2 * 2) + 16 * (-(-2000 * 2 // 256))
    assert sizes[0] - sizes[1] == dense - packed


def test_keeping_and_other_bits(tmp_path: Path) -> None:
    kept = artifact(tmp_path / "kept", keep=("embed_tokens",))
    assert {"lm_head", "model.embed_tokens"} <= set(
        read_json(kept / "config.json")["quantization_config"]["modules_to_not_convert"]
    )
    model = irq_convert.load(kept)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is torch.nn.Linear
    more = artifact(tmp_path / "more", tied=False, bits_for=(("embed", 4), ("lm_head", 2)))
    model = irq_convert.load(more)
    assert model.model.embed_tokens.fmt.codebook == "nf4"
    assert model.lm_head.fmt.codebook == "nf2"
    assert model.model.layers[0].mlp.up_proj.fmt.codebook == "nf3"
    both = artifact(tmp_path / "both", bits_for=(("embed", 4),))
    model = irq_convert.load(both)
    model.save_pretrained(tmp_path / "b")
    overrides = read_json(tmp_path / "b" / "config.json")["quantization_config"]["overrides"]
    assert overrides["model.embed_tokens"] == {"codebook": "nf4", "bits": 4}
    assert "lm_head" not in overrides
    assert model.lm_head.fmt == ModuleFormat("nf4", 64)


def test_a_tied_head_that_the_files_have_alone(tmp_path: Path) -> None:
    """Some old files have the head, and the embedding is it."""
    from tests.folders import change_tensors

    source = tiny_model(tie_word_embeddings=True)
    source.save_pretrained(tmp_path / "source")
    change_tensors(
        tmp_path / "source",
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    )
    irq_convert.quantize(
        tmp_path / "source", tmp_path / "a", bits=4, block_size=32, include_embeddings=True
    )
    model = irq_convert.load(tmp_path / "a")
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    wanted = IrqLinear.dequantize(model.lm_head)
    assert torch.equal(model.model.embed_tokens(IDS), wanted[IDS])
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(irq_convert.load(tmp_path / "b")(IDS).logits, model(IDS).logits)


def test_a_tied_head_that_differs_is_untied(tmp_path: Path) -> None:
    """config.json may call a head tied that the files have with other values."""
    source = tiny_model(tie_word_embeddings=False)
    source.save_pretrained(tmp_path / "source")
    change_json(tmp_path / "source" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    irq_convert.quantize(tmp_path / "source", tmp_path / "a", bits=3, include_embeddings=True)
    assert read_json(tmp_path / "a" / "config.json")["tie_word_embeddings"] is False
    model = irq_convert.load(tmp_path / "a")
    assert torch.equal(model(IDS).logits, twin(tmp_path / "a", tmp_path / "dense")(IDS).logits)
    change_json(tmp_path / "a" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    again = irq_convert.load(tmp_path / "a")  # as stock transformers, which compares dense ones
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.tie_weights()
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(irq_convert.load(tmp_path / "b")(IDS).logits, model(IDS).logits)


def test_encoder_and_decoder_share_one_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.T5Config(
        d_model=64, d_ff=96, num_layers=1, num_heads=4, vocab_size=50, d_kv=16,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    source = tf.T5ForConditionalGeneration(config).eval()
    folder = artifact(tmp_path, model=source)
    assert "shared.weight_scale" in read_tensors(folder)
    model = irq_convert.load(folder)
    found = {n for n, m in model.named_modules() if isinstance(m, IrqEmbedding)}
    assert found == {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}
    assert (
        len({m.weight_tau.data_ptr() for m in model.modules() if m.__class__ is IrqEmbedding}) == 1
    )
    irq_convert.export(folder, tmp_path / "dense", to="dense")
    dense = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense").eval()
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert torch.equal(model(**given).logits, dense(**given).logits)
    model.save_pretrained(tmp_path / "b")
    assert read_tensors(tmp_path / "b").keys() == read_tensors(folder).keys()


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Shifted(torch.nn.Embedding):
    """Does more than scale its rows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1.0


def test_a_class_that_does_more_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tf.models.gemma3.modeling_gemma3
    monkeypatch.setattr(module.Gemma3TextScaledWordEmbedding, "forward", Shifted.forward)
    from irq_convert.hf import tables

    tables._only_scales.cache_clear()
    try:
        model = tiny_model("gemma3_text", tie_word_embeddings=True)
        notes = Notes()
        folder = artifact(tmp_path, model=model, progress=notes)
        loaded = irq_convert.load(folder)
    finally:
        tables._only_scales.cache_clear()
    assert notes.lines == [
        "model.embed_tokens.weight stays dense: Gemma3TextScaledWordEmbedding does more than look "
        "rows up"
    ]
    assert type(loaded.lm_head) is torch.nn.Linear
    kept = read_json(folder / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in kept


@pytest.mark.parametrize("tied", [False, True])
def test_another_vocabulary_is_refused(tmp_path: Path, tied: bool) -> None:
    model = irq_convert.load(artifact(tmp_path, tied=tied))
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings(80) is table
    assert model.resize_token_embeddings() is table
    for each in (model, model.model):
        with pytest.raises(
            UsageError, match=r"embed_tokens.* cannot get 96 rows: resize the source"
        ):
            each.resize_token_embeddings(90, pad_to_multiple_of=32)
    assert model(IDS).logits.shape[-1] == 80


def test_no_class_that_could_say(tmp_path: Path) -> None:
    from tests.tiny import UNKNOWN, llama_tensors, write_source

    source = write_source(tmp_path / "s", llama_tensors(), UNKNOWN)
    with pytest.raises(UsageError, match=r"--include-embeddings needs a class .* leave it out"):
        irq_convert.quantize(source, tmp_path / "a", include_embeddings=True)


def test_the_option_is_in_the_manifest_only_when_given() -> None:
    from irq_convert.jobs.quantize.options import QuantizeOptions

    assert "include_embeddings" not in QuantizeOptions.of().to_dict()
    assert QuantizeOptions.of(include_embeddings=True).to_dict()["include_embeddings"] is True


def test_a_base_model_alone(tmp_path: Path) -> None:
    model = tf.LlamaModel(tiny_config(**SMALL)).eval()
    loaded = irq_convert.load(artifact(tmp_path, model=model))
    assert type(loaded.embed_tokens) is IrqEmbedding
    whole = artifact(tmp_path / "whole")
    base = tf.AutoModel.from_pretrained(whole)
    assert type(base.embed_tokens) is IrqEmbedding
    base.save_pretrained(tmp_path / "b")
    assert torch.equal(
        tf.AutoModel.from_pretrained(tmp_path / "b").embed_tokens(IDS), base.embed_tokens(IDS)
    )


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloading(tmp_path: Path, where: str) -> None:
    folder = artifact(tmp_path)
    wanted = irq_convert.load(folder)(IDS).logits
    device_map = {"model.embed_tokens": where, "lm_head": where, "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = irq_convert.load(folder, device_map=device_map, offload_folder=str(tmp_path / "off"))
    assert torch.equal(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(irq_convert.load(tmp_path / "b")(IDS).logits, wanted)


@pytest.mark.slow
def test_adapters_train_on_top(tmp_path: Path) -> None:
    from peft import LoraConfig

    folder = artifact(tmp_path)
    model = irq_convert.attach(
        irq_convert.load(folder, dtype=torch.float32),
        LoraConfig(r=2, target_modules="all-linear"),
        gradient_checkpointing=True,
    )
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("embed" in name or "lm_head" in name for name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    for to in ("dense", "irq"):
        options = {"any_base": True, "min_survival": -1e9} if to == "irq" else {"any_base": True}
        irq_convert.merge(folder, tmp_path / "adapter", tmp_path / to, to=to, **options)
    assert irq_convert.verify(tmp_path / "irq").ok
    before, after = read_tensors(folder), read_tensors(tmp_path / "irq")
    own = [name for name in before if "embed_tokens" in name]
    assert len(own) == 5
    assert all(torch.equal(before[name], after[name]) for name in own)
    merged = irq_convert.load(tmp_path / "irq", dtype=torch.float32)
    assert merged.lm_head.weight_tau is merged.model.embed_tokens.weight_tau


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_merging_into_a_packed_table_is_refused(tmp_path: Path, module: str) -> None:
    from peft import LoraConfig, get_peft_model

    folder = artifact(tmp_path)
    model = get_peft_model(irq_convert.load(folder), LoraConfig(r=2, target_modules=[module]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    says = "ties to model.embed_tokens.weight" if module == "lm_head" else "is quantized in the"
    with pytest.raises(IrqError, match=says):
        irq_convert.merge(folder, tmp_path / "adapter", tmp_path / "out", any_base=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(IrqError, match="save_embedding_layers=False"):
        irq_convert.merge(folder, tmp_path / "adapter", tmp_path / "out", any_base=True)
