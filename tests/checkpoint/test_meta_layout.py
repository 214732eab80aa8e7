"""Meta's own files as a checkpoint: equal to the bit to a conversion of whole tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.errors import IrqError
from tests.checkpoint.meta_files import MetaModel, converted, slice_of, whole_tensors, write_meta
from tests.folders import assert_one_line

MODELS = {
    "one file": MetaModel(),
    "two files": MetaModel(parts=2),
    "grouped queries, eight files": MetaModel(parts=8, dim=128, heads=16, kv_heads=8),
    "LLaMA 3": MetaModel(parts=2, kv_heads=2, wide=False, more={"rope_theta": 500000.0}),
    "float16": MetaModel(parts=2, dtype=torch.float16),
}


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with TileReader() as reader:
        return {name: reader.read_tensor(info) for name, info in checkpoint.tensors.items()}


def hinted(folder: Path, version: str = "2") -> Checkpoint:
    return open_checkpoint(folder, hints=SourceHints(llama_version=version))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_tensor_is_that_of_the_whole_conversion(tmp_path: Path, model: MetaModel) -> None:
    wanted = converted(write_meta(tmp_path / "m", model), model)
    checkpoint = hinted(tmp_path / "m")
    found = read_all(checkpoint)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(found[name].dtype == model.dtype for name in wanted)
    assert checkpoint.source_format == "meta"
    assert [name for name, _ in checkpoint.dropped] == ["rope.freqs"]
    assert checkpoint.config is not None
    assert checkpoint.config["intermediate_size"] == model.ffn
    assert checkpoint.config["vocab_size"] == model.vocab
    assert checkpoint.config["num_key_value_heads"] == model.keys


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_any_tile_and_any_piece_of_bytes(tmp_path: Path, data: st.DataObject) -> None:
    model = MODELS["grouped queries, eight files"]
    folder = tmp_path / "m"
    if not folder.exists():
        write_meta(folder, model)
    wanted = converted(whole_tensors(model), model)
    checkpoint = hinted(folder)
    name = data.draw(st.sampled_from(sorted(n for n in wanted if wanted[n].ndim == 2)))
    info, whole = checkpoint.tensors[name], wanted[name]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    left = data.draw(st.integers(0, whole.shape[1]))
    right = data.draw(st.integers(left, whole.shape[1]))
    with TileReader() as reader:
        out = torch.empty((stop - start, whole.shape[1]), dtype=whole.dtype)
        assert torch.equal(reader.read_rows(info, start, stop, out), whole[start:stop])
        assert torch.equal(reader.read_columns(info, 0, left, right), whole[:, left:right])
        chunk = data.draw(st.integers(1, 3 * info.nbytes))
        pieces = [bytes(piece) for piece in reader.iter_bytes(info, chunk)]
    assert b"".join(pieces) == whole.view(torch.uint8).numpy().tobytes()
    assert {len(piece) for piece in pieces[:-1]} <= {chunk}


SCALED = {"rope_theta": 500000.0, "use_scaled_rope": True}


@pytest.mark.parametrize(
    ("called", "model", "version", "context", "theta", "factor"),
    [
        ("Llama-2-13b", MetaModel(), None, 4096, 10000.0, None),
        ("13B", MetaModel(), "1", 2048, 10000.0, None),
        ("llama-2-70b", MetaModel(kv_heads=2), None, 4096, 10000.0, None),
        ("70B", MetaModel(kv_heads=2), None, 4096, 10000.0, None),
        ("code", MetaModel(more={"rope_theta": 1000000.0}), None, 16384, 1000000.0, None),
        ("8B", MetaModel(more={"rope_theta": 500000.0}), None, 8192, 500000.0, None),
        ("8B", MetaModel(more=SCALED), "3.1", 131072, 500000.0, 8.0),
        ("1B", MetaModel(more=SCALED), "3.2", 131072, 500000.0, 32.0),
    ],
)
def test_what_follows_from_the_version(
    tmp_path: Path,
    called: str,
    model: MetaModel,
    version: str | None,
    context: int,
    theta: float,
    factor: float | None,
) -> None:
    tensors = whole_tensors(model)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]  # as in 3.2
    write_meta(tmp_path / called, model, tensors)
    checkpoint = open_checkpoint(tmp_path / called, hints=SourceHints(llama_version=version))
    config = checkpoint.config
    assert checkpoint.unknown is None
    assert config is not None
    assert (config["max_position_embeddings"], config["rope_theta"]) == (context, theta)
    assert config.get("rope_scaling", {}).get("factor") == factor
    assert config["tie_word_embeddings"] is (version == "3.2")
    assert ("lm_head.weight" in checkpoint.tensors) is (version != "3.2")


def test_instruct_models_end_their_turns(tmp_path: Path) -> None:
    write_meta(tmp_path / "Llama-3-Instruct", MODELS["LLaMA 3"])
    config = open_checkpoint(tmp_path / "Llama-3-Instruct").config
    assert config is not None
    assert config["eos_token_id"] == [128001, 128008, 128009]


@pytest.mark.parametrize(
    ("more", "says"), [({}, "--llama-version 1 or 2"), (SCALED, "3.1 (also for 3.3) or 3.2")]
)
def test_what_no_file_tells_is_asked_for(
    tmp_path: Path, more: dict[str, object], says: str
) -> None:
    write_meta(tmp_path / "m", MetaModel(more=more))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.unknown is not None
    assert_one_line(checkpoint.unknown, "params.json", says)


def test_a_head_that_is_not_the_embedding_is_no_llama_3_2(tmp_path: Path) -> None:
    write_meta(tmp_path / "m", MetaModel(more=SCALED))
    checkpoint = hinted(tmp_path / "m", "3.2")
    with TileReader() as reader, pytest.raises(IrqError, match="is another than in"):
        reader.read_tensor(checkpoint.tensors["model.embed_tokens.weight"])


def test_the_folder_original_is_read_where_nothing_else_is(tmp_path: Path) -> None:
    model = MetaModel(parts=2)
    write_meta(tmp_path / "m" / "original", model)
    checkpoint = hinted(tmp_path / "m")
    assert {path.parent.name for path in checkpoint.shards} == {"original"}
    assert "original/params.json" not in checkpoint.other_files


def change(folder: Path, part: int, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / f"consolidated.{part:02}.pth"
    state = torch.load(path)
    state.pop(name, None)
    torch.save(state if tensor is None else {**state, name: tensor}, path)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    model, folder = MetaModel(parts=2), tmp_path / "m"
    wq = "layers.1.attention.wq.weight"

    def refused(*words: str) -> None:
        with pytest.raises(IrqError) as caught:
            hinted(folder)
        assert_one_line(str(caught.value), *words)

    write_meta(folder, model)
    (folder / "consolidated.01.pth").unlink()
    refused("consolidated.01.pth is missing")
    write_meta(folder, model)
    (folder / "consolidated.00.pth").unlink()
    refused("consolidated.00.pth", "missing", "get all of them")
    write_meta(folder, model)
    (folder / "params.json").unlink()
    refused("consolidated.00.pth without params.json")
    for key, value, says in (
        ("dim", 128, "params.json makes it"),
        ("n_layers", 3, "lacks layers.2."),
        ("n_layers", 1, "has layers.1.attention.wq.weight, params.json says 1 layer:"),
        ("n_heads", 4, "rope.freqs is [4], params.json makes it [8] with 4 heads"),
        ("vocab_size", 1000, "[96, 64] in 2 parts, params.json makes it [1000, 64]: it is of"),
        ("vocab_size", 0, "vocab_size is 0, no whole number"),
        ("n_kv_heads", 4, "[64, 64] in 2 parts, params.json makes it [32, 64]: it is of another"),
        ("n_heads", 5, "do not divide"),
        ("n_heads", "8", "no whole number"),
        ("norm_eps", None, "norm_eps"),
    ):
        write_meta(folder, replace(model, more={key: value}))
        refused("params.json" if key != "dim" else "another model", says)
    write_meta(folder, model)
    change(folder, 0, "vision.weight", torch.zeros(2))
    refused("vision.weight is no tensor of a LLaMA", "only text models")
    write_meta(folder, model)
    change(folder, 1, wq, None)
    refused("consolidated.01.pth", f"lacks {wq}")
    write_meta(folder, model)
    change(folder, 1, wq, torch.zeros(16, 64, dtype=torch.bfloat16))
    refused("consolidated.01.pth", wq, "[16, 64]", "different models")
    write_meta(folder, model)
    change(folder, 1, "norm.weight", torch.zeros(64, dtype=torch.bfloat16))
    refused("consolidated.01.pth", "norm.weight", "different models")


def test_slices_are_what_meta_writes() -> None:
    """The maker itself: two files of a 64 x 64 matrix, below and beside each other."""
    model, whole = MetaModel(parts=2), torch.arange(64.0 * 64).view(64, 64)
    assert torch.equal(slice_of("layers.0.attention.wq.weight", whole, model, 1), whole[32:])
    assert torch.equal(slice_of("layers.0.attention.wo.weight", whole, model, 1), whole[:, 32:])
    assert torch.equal(slice_of("tok_embeddings.weight", whole, model, 0), whole[:, :32])
    assert json.dumps(model.params)
