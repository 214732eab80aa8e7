"""Other formats as people meet them: streamed from the Hub, killed, verified, evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.meta_files import MetaModel, write_meta
from tests.checkpoint.narrow import BLOCKS, in_fp8
from tests.folders import listing
from tests.hf.test_meta_tokenizer import train_pieces
from tests.hf.test_packed_sources import deepseek
from tests.jobs.push.server import serve
from tests.jobs.push.state import FolderRepo, World
from tests.jobs.quantize.test_decoded_sources import fp8, modelopt, mxfp4
from tests.tiny import LLAMA, llama_tensors

from .process import Commands
from .stopping import stop_at

pytestmark = pytest.mark.slow
NAME = "org/model"
SHARDS = ("--max-shard-size", "5e-5")


def sharded(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Three files of torch and their index."""
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[number::3]}, folder / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    return folder


def pickles(folder: Path) -> Path:
    return sharded(folder, llama_tensors())


def pickles_of_fp8(folder: Path) -> Path:
    tensors = in_fp8(llama_tensors(torch.bfloat16))
    return sharded(folder, tensors, dtype="bfloat16", quantization_config=BLOCKS)


def gpt_oss(folder: Path) -> Path:
    """With the copies that its repository has, which are neither fetched nor carried over."""
    mxfp4(folder)
    for name in ("original/model.safetensors", "original/dtypes.json", "metal/model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"another copy")
    return folder


@pytest.mark.parametrize("make", [pickles, pickles_of_fp8, fp8, modelopt, deepseek, gpt_oss])
def test_streamed_from_the_hub(
    irq: Commands,
    hub_settings: Callable[[str], dict[str, str]],
    tmp_path: Path,
    work: Path,
    make: Callable[[Path], Path],
) -> None:
    """The same files as from a folder, none of the source's left, and whole against both."""
    source = make(tmp_path / "m")
    weights = (".bin", ".safetensors", ".pth")
    files = sum(path.stat().st_size for path in source.iterdir() if path.suffix in weights)
    with serve(World({NAME: FolderRepo(source)})) as server:
        own = hub_settings(server.url)
        streamed = ("quantize", NAME, work / "streamed", "--stream", *SHARDS)
        result = irq(*streamed, "--dry-run", "--json", cwd=work, **own)
        assert result.code == 0, result
        dry = json.loads(result.out)
        assert dry["fetched"] <= files == dry["bytes_in"]
        result = irq(*streamed, "--json", cwd=work, **own)
        assert result.code == 0, result
        assert json.loads(result.out)["source_format"] == dry["source_format"]
        left = (work / "home" / "irq-convert" / "streamed").rglob("*")
        assert not [path for path in left if path.is_file()]
        result = irq("quantize", source, work / "local", *SHARDS)
        assert result.code == 0, result
        found = [listing(work / name) for name in ("streamed", "local")]
        for each in found:
            del each["irq_manifest.json"]
        assert found[0] == found[1]
        assert not [name for name in found[0] if name.startswith(("original", "metal"))]
        assert not server.asked("GET", "(original|metal)/")
        for against in (source, NAME):
            result = irq("verify", work / "local", "--against", against, cwd=work, **own)
            assert result.code == 0, result


def test_a_killed_conversion_of_pickles_goes_on(irq: Commands, tmp_path: Path) -> None:
    source, out = pickles(tmp_path / "m"), tmp_path / "out"
    args = ("quantize", source, out, "--objective", "mse", "--block-size", 16, *SHARDS)
    assert irq(*args, "--threads", 1).code == 0
    wanted = listing(out)
    shutil.rmtree(out)
    stop_at(
        lambda: irq.start(*args, "--threads", 1),
        lambda: list(tmp_path.glob("out.partial/records/model*.record")),
        lambda: shutil.rmtree(out),
        whole=out.exists,
    )
    result = irq(*args, "--resume", "required")
    assert result.code == 0, result
    assert "continuing" in result.err
    assert listing(out) == wanted
    stop_at(
        lambda: irq.start(*args, "--overwrite", "--bits", 3),
        lambda: list(tmp_path.glob("out.partial/records/model*.record")),
        lambda: None,
        whole=lambda: listing(out) != wanted,
    )
    file = source / "pytorch_model-00001-of-00003.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = irq(*args, "--overwrite", "--bits", 3, "--resume", "required")
    assert result.code == 2, result
    assert file.name in result.err


def test_eval_against_metas_files(irq: Commands, tmp_path: Path) -> None:
    """The reference is what the dense conversion of them is."""
    model, source = MetaModel(parts=2, vocab=340), tmp_path / "Llama-2"
    write_meta(source, model)
    train_pieces(source / "tokenizer.model", model.vocab)
    assert irq("quantize", source, tmp_path / "out").code == 0
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 40)
    args = ("--text", tmp_path / "text.txt", "--context", 32, "--json")
    result = irq("eval", tmp_path / "out", "--against", source, *args)
    assert result.code == 0, result
    against = json.loads(result.out)
    alone = json.loads(irq("eval", source, *args).out)
    assert against["kl"] > 0
    assert alone["perplexity"] == pytest.approx(against["reference_perplexity"], rel=1e-5)
