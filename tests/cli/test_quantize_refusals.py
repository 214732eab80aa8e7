"""`quantize` given what it cannot work with: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import change_json, change_tensors

from .process import Commands, assert_fails, nothing_left
from .sources import DOWN0, INDEX, SHARD, UP0, join, make_source, split

USAGE, FAILURE = 2, 1


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "5"], ["--bits 5", "2, 3 or 4"]),
        (["--bits", "0"], ["--bits 0"]),
        (["--block-size", "63"], ["63", "64"]),
        (["--codebook", "foo"], ["--codebook foo", "nf", "int"]),
        (["--codebook", "nf3", "--bits", "4"], ["nf3", "--bits 3"]),
        (["--keep", "["], ["--keep", "'['", "regular expression"]),
        (["--keep", "nope"], ["--keep", "'nope'", "matches no tensor", UP0[:14]]),
        (["--keep", "embed"], ["--keep", "'embed'", "in any case"]),
        (["--bits-for", "("], ["--bits-for", "REGEX=BITS"]),
        (["--bits-for", "(=4"], ["--bits-for", "'('", "regular expression"]),
        (["--bits-for", "x"], ["--bits-for 'x'", "REGEX=BITS"]),
        (["--bits-for", "=4"], ["--bits-for '=4'", "REGEX=BITS"]),
        (["--bits-for", "down="], ["--bits-for", "REGEX=BITS"]),
        (["--bits-for", "down=²"], ["--bits-for", "REGEX=BITS"]),
        (["--bits-for", "down=8"], ["--bits-for", "8", "2, 3 or 4"]),
        (["--bits-for", "nope=3"], ["--bits-for", "'nope'", "matches no tensor"]),
        (["--threads", "0"], ["--threads 0", "at least 1"]),
        (["--refine", "-1"], ["refine", "-1"]),
        (["--max-shard-size", "0"], ["--max-shard-size", "positive"]),
        (["--max-shard-size", "nan"], ["--max-shard-size", "positive"]),
        (["--max-shard-size", "inf"], ["--max-shard-size", "positive"]),
        (["--max-shard-size", "1e-12"], ["--max-shard-size", "positive"]),
        (["--device", "foo"], ["--device foo", "not usable here"]),
        (["--device", "meta"], ["--device meta", "not usable here"]),
        (["--device", "hpu"], ["--device hpu", "not usable here"]),
        (["--revision", "main"], ["local folder", "revision"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_bad_options(
    irq: Commands, tmp_path: Path, source: Path, options: list[str], words: list[str], dry: bool
) -> None:
    with nothing_left(tmp_path):
        more = ["--dry-run"] if dry else []
        assert_fails(irq("quantize", source, tmp_path / "out", *options, *more), USAGE, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(irq: Commands, tmp_path: Path, source: Path) -> None:
    with nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "out", "--device", "cuda")
    assert_fails(result, USAGE, "--device cuda", "not usable here")


@pytest.mark.parametrize(
    "args",
    [[], ["--nope"], ["--objective", "foo"], ["--bits", "three"], ["a", "b", "c"]],
    ids=" ".join,
)
def test_what_cannot_be_parsed(irq: Commands, tmp_path: Path, args: list[str]) -> None:
    with nothing_left(tmp_path):
        result = irq("quantize", *args, cwd=tmp_path)
    assert result.code == USAGE
    assert "Traceback" not in result.err
    assert "Usage" in result.err or "Error" in result.err


@pytest.mark.slow
def test_outputs_that_cannot_be_used(irq: Commands, tmp_path: Path, source: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "out4.partial").mkdir()
    (tmp_path / "out4.partial" / "thesis.tex").write_text("42")
    cases: list[tuple[str, list[str], int, str]] = [
        ("full", [], USAGE, "not empty"),
        ("full", ["--overwrite"], USAGE, "holds no artifact"),
        ("file", ["--overwrite"], USAGE, "a file"),
        ("source", ["--overwrite"], USAGE, "the source itself"),
        ("alias", ["--overwrite"], USAGE, "the source itself"),
        ("source/out", [], USAGE, "inside the source"),
        ("alias/out", [], USAGE, "inside the source"),
        (".", ["--overwrite"], USAGE, "holds the source"),
        ("file/out", [], USAGE, "is a file"),
        ("file/out/deep", ["--dry-run"], USAGE, "is a file"),
        ("out4", [], USAGE, "out4.partial"),
        ("x" * 300, [], FAILURE, "too long"),
    ]
    with nothing_left(tmp_path):
        for out, options, code, word in cases:
            assert_fails(irq("quantize", source, tmp_path / out, *options), code, word)
        assert_fails(irq("quantize", ".", cwd=source), USAGE, "inside the source")


@pytest.mark.slow
def test_models_that_are_not_there(irq: Commands, tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases = [
        (tmp_path / "nope", USAGE, "no such folder"),
        ("./nope", USAGE, "no such folder"),
        ("~no-such-user-here/m", USAGE, "no such folder"),
        (tmp_path / "file", USAGE, "a file, not a folder"),
        (tmp_path / "file" / "m", USAGE, "no such folder"),
        ("", USAGE, "no model given"),
        ("a b!", USAGE, "not a Hub id"),
        ("https://huggingface.co/a/b", USAGE, "give its id"),
        ("x" * 5000, FAILURE, "too long"),
        ("/" + "x" * 5000, FAILURE, "too long"),
        ("org/model", FAILURE, "HF_HUB_OFFLINE"),
    ]
    with nothing_left(tmp_path):
        for model, code, word in cases:
            for more in ([], ["--dry-run"]):
                result = irq("quantize", model, tmp_path / "out", *more, HF_HOME=str(tmp_path))
                assert_fails(result, code, word)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_names_that_no_record_could_tell(
    irq: Commands, tmp_path: Path, source: Path, more: list[str]
) -> None:
    latin = os.fsdecode(b"mod\xe8le")
    named = make_source(tmp_path / latin)
    with nothing_left(tmp_path):
        for model, out in ((source, latin + "-irq"), (named, "out")):
            result = irq("quantize", model, tmp_path / out, *more)
            assert_fails(result, FAILURE, "mod\\udce8le", "not UTF-8")
    above = make_source(tmp_path / os.fsdecode(b"\xe8") / "m")  # no record names that
    assert irq("quantize", above, tmp_path / "fine", *more).code == 0
    (source / latin).touch()
    assert_fails(irq("quantize", source, tmp_path / "out", *more), FAILURE, "not UTF-8")


# --- damaged sources ------------------------------------------------------------------------------


def no_weights(folder: Path) -> None:
    (folder / SHARD).unlink()


def no_pickle(folder: Path) -> None:
    (folder / SHARD).rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-100])


def truncated_in_the_header(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:50])


def empty_file(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def giant_header(folder: Path) -> None:
    join(folder / SHARD, "{}", b"", length=3 << 30)


def endless_header(folder: Path) -> None:
    join(folder / SHARD, "{}", b"", length=1000)


def no_json(folder: Path) -> None:
    join(folder / SHARD, "x" * 50, b"")


def nested_json(folder: Path) -> None:
    join(folder / SHARD, "[" * 100_000, b"")


def change_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, data = split(folder / SHARD)
        change(header)
        join(folder / SHARD, header, data)

    return damage


def overlap(header: dict[str, Any]) -> None:
    header[UP0]["data_offsets"] = header[DOWN0]["data_offsets"]


def unknown_dtype(header: dict[str, Any]) -> None:
    header[UP0]["dtype"] = "F128"


def huge_shape(header: dict[str, Any]) -> None:
    header[UP0]["shape"] = [2**40, 2**40]


def twice_in_a_header(folder: Path) -> None:
    header, data = split(folder / SHARD)
    text = str(header).replace("'", '"')
    entry = str(header[UP0]).replace("'", '"')
    join(folder / SHARD, text[:-1] + f', "{UP0}": {entry}}}', data)


def twice_in_two_shards(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes((folder / SHARD).read_bytes())
    (folder / SHARD).rename(folder / "model-1.safetensors")


def fill(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP0][5, 7] = value

    return lambda folder: change_tensors(folder, change)


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP0] = tensors[UP0].to(dtype)

    return lambda folder: change_tensors(folder, change)


def quantized_config(folder: Path) -> None:
    entry = {"quantization_config": {"quant_method": "awq"}}
    change_json(folder / "config.json", lambda config: config.update(entry))


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def config_is_cut_off(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ')


def config_is_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def link_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)


def link_to_nothing(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("nowhere")


def link_of_another_file(folder: Path) -> None:
    (folder / "passwords.txt").symlink_to("/etc/passwd")


def nothing_but_norms(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            del tensors[name]

    change_tensors(folder, change)


def a_part_of_that_name(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{UP0}_tau": torch.zeros(1)}))


DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (no_weights, ["no *.safetensors"]),
    (no_pickle, ["pytorch_model.bin", "no file of torch.save"]),
    (truncated, [SHARD, "truncated"]),
    (truncated_in_the_header, [SHARD, "damaged"]),
    (empty_file, [SHARD, "shorter"]),
    (giant_header, [SHARD, str(3 << 30)]),
    (endless_header, [SHARD, "1000 bytes"]),
    (no_json, [SHARD, "not JSON"]),
    (nested_json, [SHARD, "not JSON"]),
    (change_header(overlap), [SHARD, UP0]),
    (change_header(unknown_dtype), [SHARD, UP0, "F128"]),
    (change_header(huge_shape), [SHARD, UP0]),
    (twice_in_a_header, [SHARD, UP0, "twice"]),
    (twice_in_two_shards, ["model-1.safetensors", "model-2.safetensors"]),
    (fill(float("nan")), [UP0, "[172, 64]", "NaN", "--keep"]),
    (fill(float("inf")), [UP0, "infinite", "--keep"]),
    (fill(float("-inf")), [UP0, "infinite"]),
    (fill(3e38), [UP0, "2^120"]),
    (cast(torch.float8_e4m3fn), [UP0, "F8_E4M3", "already quantized"]),
    (cast(torch.int8), [UP0, "I8", "already quantized"]),
    (cast(torch.int32), [UP0, "I32"]),
    (quantized_config, ["already quantized", "'awq'", "original"]),
    (config_is_a_list, ["config.json", "object"]),
    (config_is_cut_off, ["config.json", "not JSON"]),
    (config_is_binary, ["config.json"]),
    (link_out_of_the_folder, [SHARD, "outside"]),
    (link_to_nothing, ["merges.txt", "link"]),
    (link_of_another_file, ["passwords.txt", "outside"]),
    (nothing_but_norms, ["nothing to quantize"]),
    (a_part_of_that_name, [f"{UP0}_tau", "--keep"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_damaged_sources(
    irq: Commands,
    tmp_path: Path,
    source: Path,
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    damage(source)
    with nothing_left(tmp_path):
        assert_fails(irq("quantize", source, tmp_path / "new" / "out"), FAILURE, *words)


def missing_shard(index: dict[str, Any]) -> None:
    index["weight_map"][UP0] = "model-00009-of-00009.safetensors"


def missing_tensor(index: dict[str, Any]) -> None:
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"


def outside(name: str) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][UP0] = name

    return change


def no_map(index: dict[str, Any]) -> None:
    del index["weight_map"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing_shard, ["model-00009-of-00009.safetensors", "missing"]),
        (missing_tensor, ["layers.9", "lacks"]),
        (outside("../other.safetensors"), ["../other.safetensors", "outside"]),
        (outside("/etc/other.safetensors"), ["/etc/other.safetensors", "outside"]),
        (outside("passwd"), ["passwd", "not a *.safetensors file"]),
        (no_map, [INDEX, "weight_map"]),
    ],
)
def test_damaged_indexes(
    irq: Commands, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    source = make_source(tmp_path / "source", shards=3)
    (tmp_path / "other.safetensors").write_bytes((source / "tokenizer.json").read_bytes())
    change_json(source / INDEX, change)
    with nothing_left(tmp_path):
        assert_fails(irq("quantize", source, tmp_path / "out"), FAILURE, *words)


# --- disks and permissions ------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_too_small(irq: Commands, tmp_path: Path, tiny_disk: Path) -> None:
    source = make_source(tmp_path / "source", rows=20_000)  # 2.9 MB in 4 bits
    with nothing_left(tmp_path):
        result = irq("quantize", source, tiny_disk / "out")
        assert_fails(result, FAILURE, "not enough space", "needed", "free")
        result = irq("quantize", source, tiny_disk / "out", "--dry-run")
    assert result.code == 0
    assert "not enough" in result.out


def test_a_disk_that_is_just_large_enough(irq: Commands, tmp_path: Path, tiny_disk: Path) -> None:
    source = make_source(tmp_path / "source", rows=4000)
    result = irq("quantize", source, tiny_disk / "out")
    assert result.code == 0, result
    assert (tiny_disk / "out" / "irq_manifest.json").exists()


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """`tmp_path`, for anybody to enter."""
    if os.geteuid() != 0:
        pytest.skip("must be able to become nobody")
    changed = []
    for folder in (tmp_path, *tmp_path.parents):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            changed.append((folder, mode))
            folder.chmod(mode | 0o055)
    yield tmp_path
    for folder, mode in changed:
        folder.chmod(mode)


def test_what_may_not_be_read_or_written(irq: Commands, open_path: Path) -> None:
    locked, hidden = make_source(open_path / "locked"), make_source(open_path / "hidden")
    half, whole = make_source(open_path / "half"), make_source(open_path / "whole")
    for path in open_path.rglob("*"):
        path.chmod(0o755)
    (locked / SHARD).chmod(0)
    (half / "tokenizer.json").chmod(0)
    hidden.chmod(0)
    mine = open_path / "mine"
    mine.mkdir(0o777)
    mine.chmod(0o777)
    (open_path / "closed").mkdir(0o700)
    cases = [
        (locked, mine / "out", SHARD),
        (half, mine / "out", "tokenizer.json"),
        (hidden, mine / "out", "hidden"),
        (hidden / "deeper", mine / "out", "deeper"),
        (whole, open_path / "out", "out"),
        (whole, open_path / "closed" / "out", "out"),
        (whole, open_path / "closed" / "deep" / "er" / "out", "out"),
    ]
    with nothing_left(open_path):
        for model, out, word in cases:
            result = irq("quantize", model, out, nobody=True)
            assert_fails(result, FAILURE, word, "permission denied")
    result = irq("quantize", whole, mine / "out", nobody=True)
    assert result.code == 0, result
