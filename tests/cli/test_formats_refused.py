"""Damaged sources in other formats, at the command line: one true line, nothing left."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.meta_files import MetaModel, whole_tensors, write_meta
from tests.checkpoint.narrow import BLOCKS, in_fp8
from tests.checkpoint.test_modelopt import FILE, fp8_of_tensors, settings
from tests.folders import change_json, change_tensors
from tests.tiny import LLAMA, llama_tensors, write_source

from .process import Commands, assert_fails, nothing_left

FAILURE = 1
UP = "model.layers.0.mlp.up_proj.weight"
MODEL = MetaModel(parts=2)
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


class Code:
    """Runs a command where a pickle is trusted."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def meta(folder: Path) -> None:
    write_meta(folder, MODEL)


def pickle(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save(llama_tensors(), folder / "pytorch_model.bin")


def fp8(folder: Path) -> None:
    config = LLAMA | {"quantization_config": BLOCKS}
    write_source(folder, in_fp8(llama_tensors(torch.bfloat16)), config, files={})


def modelopt(folder: Path) -> None:
    files = {FILE: json.dumps(settings("FP8"))}
    write_source(folder, fp8_of_tensors()[0], LLAMA, files=files)


def params(**changes: object) -> Damage:
    return lambda folder: change_json(folder / "params.json", lambda raw: raw.update(changes))


def lost(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def part_of(model: MetaModel, seed: int) -> Damage:
    """The second file is that of another model."""

    def damage(folder: Path) -> None:
        other = folder / "other"
        write_meta(other, model, whole_tensors(model, seed))
        (other / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
        for path in other.iterdir():
            path.unlink()
        other.rmdir()

    return damage


def other_norm(folder: Path) -> None:
    state = torch.load(folder / "consolidated.01.pth")
    state["layers.1.ffn_norm.weight"][-1] += 1
    torch.save(state, folder / "consolidated.01.pth")


def with_code(name: str) -> Damage:
    def damage(folder: Path) -> None:
        state = torch.load(folder / name)
        torch.save({**state, "code": Code()}, folder / name)

    return damage


def cut(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-5000])


def compressed(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            how = zipfile.ZIP_DEFLATED if name.endswith("/data/1") else zipfile.ZIP_STORED
            archive.writestr(name, data, how)


def tensors(change: Callable[[Tensors], object]) -> Damage:
    return lambda folder: change_tensors(folder, change)


def nvfp4(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(settings("NVFP4")))


ANOTHER = "another model"
LINES: list[tuple[Damage, Damage, list[str]]] = [
    (meta, params(n_layers=3), ["consolidated.00.pth", "lacks layers.2.attention.wq.weight"]),
    (meta, params(n_layers=1), ["has layers.1.attention.wq.weight", "1 layer:", ANOTHER]),
    (meta, params(n_heads=4), ["rope.freqs is [4]", "[8] with 4 heads", ANOTHER]),
    (meta, params(n_kv_heads=4), ["attention.wk.weight is [64, 64]", "[32, 64]: it is of"]),
    (meta, params(vocab_size=500), ["tok_embeddings.weight is [96, 64]", "[500, 64]", ANOTHER]),
    (meta, lost("consolidated.00.pth"), ["consolidated.00.pth: missing"]),
    (meta, lost("consolidated.01.pth"), ["consolidated.01.pth is missing"]),
    (meta, lost("params.json"), ["consolidated.00.pth without params.json"]),
    (meta, part_of(MetaModel(2, dim=128), 0), ["consolidated.01.pth", "[96, 128]", "different"]),
    (meta, part_of(MODEL, 1), ["consolidated.01.pth", "norm.weight", "different models"]),
    (meta, other_norm, ["consolidated.01.pth", "layers.1.ffn_norm.weight", "different models"]),
    (meta, with_code("consolidated.00.pth"), ["consolidated.00.pth", "posix.system"]),
    (pickle, with_code("pytorch_model.bin"), ["pytorch_model.bin", "posix.system", "not run"]),
    (pickle, cut, ["pytorch_model.bin", "cut off or damaged"]),
    (pickle, compressed, ["pytorch_model/data/1 is compressed"]),
    (fp8, tensors(lambda t: t.pop(f"{UP}_scale_inv")), [UP, "without its scale"]),
    (fp8, tensors(lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 2)})), ["[11, 12]", UP]),
    (modelopt, tensors(lambda t: t.pop(f"{UP}_scale")), [UP, "without its scale"]),
    (modelopt, nvfp4, ["already quantized", "quant_algo 'NVFP4'"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
@pytest.mark.parametrize(("make", "damage", "words"), LINES)
def test_one_line(
    irq: Commands,
    tmp_path: Path,
    make: Damage,
    damage: Damage,
    words: list[str],
    dry: tuple[str, ...],
) -> None:
    source = tmp_path / "Llama-2"
    make(source)
    damage(source)
    with nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "out", *dry, cwd=tmp_path)
    assert_fails(result, FAILURE, str(source), *words)
