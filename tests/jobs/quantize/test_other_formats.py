"""The same model from pickles and from Meta's files gives the same bytes as from safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.locate import open_source
from irq_convert.errors import UsageError
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.push.command_again import command_again
from irq_convert.jobs.push.pushed_folder import open_pushed_folder
from irq_convert.jobs.quantize import quantize as room
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.job import quantize_job
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import plan_quantize
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.checkpoint.meta_files import MetaModel, converted, whole_tensors, write_meta
from tests.cli.process import Commands
from tests.folders import listing
from tests.hf.test_meta_tokenizer import train_pieces
from tests.tiny import tiny_model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_pickles_in_two_files(tmp_path: Path) -> None:
    """Views of one storage and a wrapper's prefix among them."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "safe")
    state = dict(model.state_dict())
    turned = "model.layers.0.mlp.up_proj.weight"
    state[turned] = state[turned].T.contiguous().T
    folder = tmp_path / "pickled"
    folder.mkdir()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({f"module.{n}": state[n] for n in part}, folder / f"pytorch_model-{number}.bin")
    weight_map = {
        f"module.{n}": f"pytorch_model-{number}.bin"
        for number, part in enumerate((names[::2], names[1::2]))
        for n in part
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    quantize(folder, tmp_path / "a", bits=3, block_size=32)
    quantize(tmp_path / "safe", tmp_path / "b", bits=3, block_size=32)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert verify_artifact(tmp_path / "a", against=open_source(str(folder))).failures == ()


def test_metas_files(tmp_path: Path) -> None:
    model = MetaModel(parts=2, kv_heads=4)
    write_meta(tmp_path / "Llama-2", model)
    tensors = converted(whole_tensors(model), model)
    quantize(tmp_path / "Llama-2", tmp_path / "a", bits=2, tile_weights=2048)
    twin = tmp_path / "twin"
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    quantize(twin, tmp_path / "b", bits=2)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert listing(tmp_path / "a").keys() - listing(tmp_path / "b").keys() == {
        "generation_config.json"
    }


def test_a_version_that_nobody_tells_is_asked_for(tmp_path: Path) -> None:
    write_meta(tmp_path / "13B", MetaModel())
    for job in (quantize, estimate_quantize):
        with pytest.raises(UsageError, match="--llama-version 1 or 2"):
            job(tmp_path / "13B", tmp_path / "out")
    with pytest.raises(UsageError, match="--llama-version 4: choose"):
        quantize(tmp_path / "13B", tmp_path / "out", llama_version="4")
    assert not list(tmp_path.glob("out*"))
    quantize(tmp_path / "13B", tmp_path / "out", llama_version="1")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    again = command_again(open_pushed_folder(tmp_path / "out"))
    assert "--llama-version 1" in again  # or it would stop and ask
    assert "llama_version" not in QuantizeOptions().to_dict()


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    model = MetaModel(parts=2, vocab=340)
    write_meta(tmp_path / "Llama-2", model)
    train_pieces(tmp_path / "Llama-2" / "tokenizer.model", model.vocab)
    return tmp_path / "Llama-2"


def test_only_the_first_process_makes_the_tokenizer(
    with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, and the others write shards alone: these are the same."""
    options = QuantizeOptions(threads=1)
    whole = plan_quantize(open_source(str(with_tokenizer)), options)
    assert "tokenizer.json" in whole.folder.files
    part = plan_quantize(open_source(str(with_tokenizer)), options, shards_only=True)
    assert "tokenizer.json" not in part.folder.files
    assert part.folder.shards == whole.folder.shards
    jobs = [quantize_job(plan, "m", tmp_path / "out", options) for plan in (whole, part)]
    assert jobs[0].identity.digest() == jobs[1].identity.digest()
    asked: list[bool] = []

    def planned(checkpoint: object, options: object, *, shards_only: bool) -> None:
        asked.append(shards_only)
        raise InterruptedError

    monkeypatch.setattr(room, "plan_quantize", planned)
    for rank in range(3):
        processes: Any = SimpleNamespace(ranks=Ranks(rank, 3))
        args = (str(with_tokenizer), tmp_path / "out", options, None, processes, Progress())
        with pytest.raises(InterruptedError):
            room._quantize(*args)
    assert asked == [False, True, True]


@pytest.mark.slow
def test_metas_files_by_two_processes(irq: Commands, with_tokenizer: Path, tmp_path: Path) -> None:
    more = ("--max-shard-size", "1e-4")
    done = irq.together(2, "quantize", with_tokenizer, tmp_path / "two", *more)
    assert done.code == 0, done.err
    quantize(with_tokenizer, tmp_path / "one", max_shard_bytes=100_000)
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("model-*"))) > 1
