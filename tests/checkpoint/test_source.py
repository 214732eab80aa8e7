"""Opening folders: what is read, what is carried over, what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError, UsageError
from tests.folders import assert_one_line

from .helpers import make_checkpoint

INDEX = "model.safetensors.index.json"


def refused(folder: Path, *words: str, kind: type[IrqError] = IrqError) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert_one_line(str(caught.value), *words)
    assert type(caught.value) is kind


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_opens_single_and_sharded(tmp_path: Path, shards: int) -> None:
    folder = make_checkpoint(tmp_path / "m", shards)
    opened = open_checkpoint(folder, repo_id="o/m", revision="abc")
    assert len(opened.shards) == shards
    assert (opened.repo_id, opened.revision) == ("o/m", "abc")
    assert opened.config == {"model_type": "llama"}
    assert opened.nbytes == 65 * shards
    assert opened.index_metadata == ({"total_size": 195} if shards == 3 else {})
    assert opened.shard_metadata[opened.shards[0]] == {"format": "pt"}
    assert opened.left_out == ()
    want = {name: a.shape for path in opened.shards for name, a in load_file(path).items()}
    assert {name: info.shape for name, info in opened.tensors.items()} == want
    places = [(info.shard.name, info.offset) for info in opened.tensors.values()]
    assert places == sorted(places)


def test_carries_every_other_file(tmp_path: Path) -> None:
    kept = [
        "README.md",
        "LICENSE",
        "tokenizer.model",
        "a/b/template.jinja",
        "1_Pooling/config.json",
    ]
    weights = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5"]
    weights += ["original/consolidated.00.pth", "metal/model.bin", "consolidated.safetensors"]
    weights += ["onnx/model.onnx", "2_Dense/model.safetensors", "model.fp16.safetensors"]
    hidden = [".git/HEAD", ".cache/huggingface/x", ".gitattributes", "a/.DS_Store"]
    hidden += [".model.safetensors.tmp-12-0"]
    away = [*weights, "original/params.json", "original/tokenizer.model"]
    folder = make_checkpoint(tmp_path / "m", extra=dict.fromkeys([*kept, *away, *hidden], "x"))
    opened = open_checkpoint(folder)
    assert opened.other_files == tuple(sorted([*kept, "config.json"]))
    assert opened.left_out == tuple(sorted(away))
    assert opened.file_bytes == (folder / "model.safetensors").stat().st_size > opened.nbytes
    assert [path.name for path in opened.shards] == ["model.safetensors"]


def test_folder_without_index_reads_every_file(tmp_path: Path) -> None:
    save_file({"x": np.zeros(2)}, tmp_path / "consolidated-2.safetensors")
    save_file({"y": np.zeros(2)}, tmp_path / "consolidated-1.safetensors")
    save_file({"lora": np.zeros(2)}, tmp_path / "adapter_model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert list(opened.tensors) == ["y", "x"]
    assert opened.config is None
    assert opened.left_out == ("adapter_model.safetensors",)


def test_index_of_another_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 2)
    (folder / INDEX).rename(folder / "diffusion.safetensors.index.json")
    save_file({"stray": np.zeros(1)}, folder / "stray.safetensors")
    opened = open_checkpoint(folder)
    assert len(opened.tensors) == 6
    assert opened.left_out == ("stray.safetensors",)


def test_single_file_beside_a_stale_index_wins(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 2)
    save_file({"only": np.zeros(1)}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert list(opened.tensors) == ["only"]
    assert len(opened.left_out) == 3
    edit_index(folder, only="model.safetensors")
    assert len(open_checkpoint(folder).tensors) == 7


def test_tensor_missing_from_the_index_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 2)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["layer.2.b"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "layer.2.b" in open_checkpoint(folder).tensors


def test_refuses_what_is_not_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder", kind=UsageError)
    file = tmp_path / "file"
    file.touch()
    refused(file, "a file, not a folder", kind=UsageError)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["not a Hugging Face checkpoint"]),
        (["consolidated.00.pth"], ["consolidated.00.pth", "without params.json", "get it, too"]),
        (["x.ckpt"], ["x.ckpt", "*.bin, *.pth or *.pt"]),
        (["optimizer.pt", "training_args.bin"], ["optimizer.pt", "give the folder"]),
        (["model.gguf"], ["model.gguf", "gguf_file"]),
        (["unet/x.safetensors"], ["top level", "unet/x.safetensors"]),
        (["adapter_model.safetensors"], ["adapter", "merge"]),
    ],
)
def test_refuses_folders_without_weights(
    tmp_path: Path, files: list[str], words: list[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refused(tmp_path, str(tmp_path), *words)


def test_refuses_broken_indexes(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good", 2)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    folder = broken("shard missing")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", INDEX, "missing")
    folder = broken("tensor missing")
    edit_index(folder, ghost="model-00001-of-00002.safetensors")
    refused(folder, "model-00001-of-00002.safetensors", "'ghost'")
    folder = broken("wrong shard")
    edit_index(folder, **{"layer.2.a": "model-00001-of-00002.safetensors"})
    refused(folder, "'layer.2.a'")
    for text, words in (
        ("{", ["not JSON"]),
        ("[]", ["JSON list"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": {"a": 1}}', ["'a'"]),
        ('{"weight_map": {"a": "x.bin"}}', ["'a'", "x.bin"]),
        ('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', ["'a' appears twice"]),
    ):
        (folder / INDEX).write_text(text)
        refused(folder, INDEX, *words)


def test_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"x": np.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "b.safetensors")
    refused(tmp_path, "a.safetensors", "b.safetensors", "'x'")


@pytest.mark.parametrize("name", ["../secret.safetensors", "{outside}", "link.safetensors"])
def test_refuses_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "secret.safetensors"
    save_file({"x": np.zeros(2)}, outside)
    folder = make_checkpoint(tmp_path / "m", 2)
    (folder / "link.safetensors").symlink_to(outside)
    edit_index(folder, x=name.format(outside=outside))
    refused(folder, "outside the folder")


def test_refuses_other_files_that_link_outside(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (tmp_path / "private.txt").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "private.txt")
    refused(folder, "README.md", "outside the folder")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(folder / "absent")
    refused(folder, "README.md", "link to nothing")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("config.json")
    assert "README.md" in open_checkpoint(folder).other_files


def test_reads_a_hub_cache_entry(tmp_path: Path) -> None:
    """In the Hub cache every file of a snapshot is a link into `blobs`."""
    made = make_checkpoint(tmp_path / "made", 2, {"sub/x.txt": "x"})
    entry = tmp_path / "models--o--m"
    snapshot = entry / "snapshots" / "abc"
    (entry / "blobs").mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(made.rglob("*")) if p.is_file()):
        blob = entry / "blobs" / str(number)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    opened = open_checkpoint(snapshot)
    assert len(opened.tensors) == 6
    assert opened.other_files == ("config.json", "sub/x.txt")
    (entry / "other").touch()
    (snapshot / "evil.txt").symlink_to("../../other")
    refused(snapshot, "evil.txt", "outside the folder")


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"a": 1, "a": 2}', "\udcff"])
def test_refuses_broken_config(tmp_path: Path, text: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


def test_refuses_a_damaged_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, shard.name, "truncated")


def test_refuses_names_that_are_not_utf8(tmp_path: Path) -> None:
    """No record could tell them, which is said before anything is read."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / "sub").mkdir()
    (folder / "sub" / os.fsdecode(b"mod\xe8le.txt")).touch()
    refused(folder, "mod\udce8le.txt", "not UTF-8", "another")
    refused(make_checkpoint(tmp_path / os.fsdecode(b"mod\xe8le")), "mod\udce8le", "not UTF-8")
    above = tmp_path / os.fsdecode(b"\xe8") / "m"  # no record names it
    assert open_checkpoint(make_checkpoint(above)).other_files == ("config.json",)
