"""Bad input to `merge`: one line, an exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.folders import read_json, read_tensors
from tests.jobs.merge.make import (
    DOWN0,
    PREFIX,
    Q0,
    WEIGHTS,
    change_settings,
    change_weights,
    linear_shapes,
    make_artifact,
    write_adapter,
)

from .process import Commands, Result, assert_fails, nothing_left

A = f"{PREFIX}{Q0}.lora_A.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def artifact(tiny_nf4: Path) -> Path:
    return tiny_nf4


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize
    from tests.tiny import LLAMA, llama_tensors, write_source

    root = tmp_path_factory.mktemp("tied")
    tensors = {n: t for n, t in llama_tensors().items() if n != "lm_head.weight"}
    source = write_source(root / "source", tensors, LLAMA | {"tie_word_embeddings": True})
    quantize(str(source), root / "tied-irq", QuantizeOptions(threads=1))
    return root / "tied-irq"


@pytest.fixture
def adapter(artifact: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", artifact)


def run(irq: Commands, base: Path, adapter: Path, out: Path, *more: object) -> Result:
    to = () if "--to" in more else ("--to", "dense")
    with nothing_left(out.parent):
        return irq("merge", base, adapter, out, *to, "--check", "layers", *more)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda folder: change_weights(folder, change)


def _cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


BAD: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "missing half": (_weights(lambda t: t.pop(A)), 1, (A, "is missing")),
    "extra key": (
        _weights(lambda t: t.update({f"{PREFIX}x.weight": torch.ones(2)})),
        1,
        (f"{PREFIX}x.weight", "cannot be merged"),
    ),
    "no such module": (
        _weights(
            lambda t: t.update({k.replace("layers.1", "layers.7"): v + 0 for k, v in t.items()})
        ),
        1,
        ("model.layers.7.", "does not have"),
    ),
    "a layer left out": (
        _weights(lambda t: [t.pop(k) for k in list(t) if DOWN0 in k]),
        1,
        (DOWN0, "target_modules", "incomplete"),
    ),
    "NaN": (_weights(lambda t: t[A][0].fill_(float("nan"))), 1, (A, "NaN")),
    "truncated": (_cut, 1, (WEIGHTS,)),
    "emptied": (lambda f: (f / WEIGHTS).write_bytes(b""), 1, (WEIGHTS,)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), 1, (WEIGHTS,)),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), 2, ("not an adapter",)),
    "zero targets": (_weights(lambda t: t.clear()), 1, ("holds no tensor",)),
    "wrong shape": (
        _weights(lambda t: t.update({A: torch.ones(8, 95)})),
        1,
        (Q0, "[8, 95]", "[8, 96]"),
    ),
    "wrong rank": (lambda f: change_settings(f, r=4), 1, ("4 rank",)),
    "DoRA": (lambda f: change_settings(f, use_dora=True), 2, ("use_dora",)),
    "unknown type": (lambda f: change_settings(f, peft_type="VERA"), 2, ("VERA",)),
    "another base": (
        lambda f: change_settings(f, base_sha256="0123456789abcdef" * 4),
        2,
        ("0123456789ab", "trained on the artifact"),
    ),
    "no base": (lambda f: change_settings(f, base_sha256=None), 2, ("--any-base",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_adapters(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    change, code, words = BAD[name]
    change(adapter)
    result = run(irq, artifact, adapter, tmp_path / "out")
    assert_fails(result, code, *words)


def test_both_hashes_are_named(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path
) -> None:
    from irq_convert.artifact.identity import artifact_identity

    change_settings(adapter, base_sha256="f" * 64)
    result = run(irq, artifact, adapter, tmp_path / "out")
    assert_fails(result, 2, "f" * 12, artifact_identity(artifact)[:12])
    assert "f" * 13 not in result.err


@pytest.mark.parametrize("kind", ["plain", "iec"])
def test_any_base(irq: Commands, artifact: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, base=None)
    out = tmp_path / "out"
    assert_fails(run(irq, artifact, adapter, out), 2, "--any-base")
    result = irq("merge", artifact, adapter, out, "--to", "dense", "--any-base")
    assert result.code == 0, result


def test_the_wrong_artifact(irq: Commands, adapter: Path, tmp_path: Path) -> None:
    other = make_artifact(tmp_path / "other", "int3", seed=4)
    assert_fails(run(irq, other, adapter, tmp_path / "out"), 2, "trained on the artifact")


def test_merging_twice(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block")
    once = tmp_path / "once"
    assert irq("merge", artifact, adapter, once, "--to", "irq", "--check", "layers").code == 0
    for more in ((), ("--any-base",)):
        result = run(irq, once, adapter, tmp_path / "twice", "--to", "irq", *more)
        assert_fails(result, 2, "merged already")
    dense = tmp_path / "dense"
    assert irq("merge", artifact, adapter, dense, "--to", "dense", "--check", "layers").code == 0
    assert_fails(run(irq, dense, adapter, tmp_path / "twice"), 2, "not an irq artifact")


def test_a_block_size_that_is_not_the_artifacts(
    irq: Commands, artifact: Path, tmp_path: Path
) -> None:
    shapes = {m: (out, cols, 64) for m, (out, cols, _) in linear_shapes(artifact).items()}
    adapter = write_adapter(tmp_path / "adapter", artifact, shapes, kind="block", block_size=64)
    assert_fails(run(irq, artifact, adapter, tmp_path / "out"), 1, "blocks of 64", "blocks of 32")
    change_settings(adapter, block_size=None)
    assert_fails(run(irq, artifact, adapter, tmp_path / "out"), 1, "in blocks of 32")


def test_tied_weights_are_not_changed_behind_your_back(
    irq: Commands, tied: Path, tmp_path: Path
) -> None:
    """One of the two was trained: it alone changes, and the result says that nothing is tied."""
    before = read_tensors(tied)["model.embed_tokens.weight"]
    for number, name in enumerate(("lm_head", "model.embed_tokens")):
        adapter = write_adapter(
            tmp_path / str(number),
            tied,
            modules_to_save=[name],
            saved={f"{name}.weight": torch.ones(80, 96)},
        )
        out = tmp_path / f"out-{number}"
        result = irq("merge", tied, adapter, out, "--to", "dense", "--check", "layers")
        assert result.code == 0, result
        assert "untied" in result.out
        assert "lm_head.weight: no longer the embedding" in result.out
        assert read_json(out / "config.json")["tie_word_embeddings"] is False
        for key in ("lm_head", "model.embed_tokens"):
            wanted = torch.ones(80, 96) if key == name else before
            assert torch.equal(read_tensors(out)[f"{key}.weight"], wanted)


def test_a_saved_module_that_is_quantized(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter",
        artifact,
        modules_to_save=["o_proj"],
        saved={f"model.layers.{i}.self_attn.o_proj.weight": torch.ones(96, 96) for i in (0, 1)},
    )
    assert_fails(run(irq, artifact, adapter, tmp_path / "out"), 1, "o_proj", "quantized")
    change_weights(
        write_adapter(
            tmp_path / "second",
            artifact,
            modules_to_save=["lm_head"],
            saved={"lm_head.weight": torch.ones(81, 96)},
        ),
        lambda t: None,
    )
    assert_fails(
        run(irq, artifact, tmp_path / "second", tmp_path / "out"), 1, "[81, 96]", "[80, 96]"
    )


def test_too_little_survives(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="plain", size=1e-5)
    result = run(irq, artifact, adapter, tmp_path / "out", "--to", "irq")
    assert_fails(result, 1, "--min-survival 0.5", "--to dense", "--lora block")
    out = tmp_path / "out"
    args = ("--to", "irq", "--check", "layers", "--min-survival", "-1000000")
    assert irq("merge", artifact, adapter, out, *args).code == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--min-survival", "2"), ("--min-survival 2",)),
        (("--dtype", "bfloat16", "--to", "irq"), ("--dtype is for --to dense",)),
        (("--tau", "uint8", "--to", "dense"), ("--tau is for --to irq",)),
        (("--threads", "0"), ("--threads 0",)),
        (("--max-shard-size", "0"), ("--max-shard-size 0",)),
        (("--max-shard-size", "nan"), ("--max-shard-size nan",)),
    ],
)
def test_options_that_make_no_sense(
    irq: Commands,
    artifact: Path,
    adapter: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    assert_fails(run(irq, artifact, adapter, tmp_path / "out", *more), 2, *words)


@pytest.mark.parametrize("more", [("--to", "gguf"), (), ("--to", "dense", "--check", "maybe")])
def test_options_that_typer_refuses(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    with nothing_left(tmp_path):
        result = irq("merge", artifact, adapter, tmp_path / "out", *more)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_folders_in_each_others_way(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path
) -> None:
    for out in (artifact, artifact / "in", adapter, adapter / "in"):
        with nothing_left(tmp_path), nothing_left(artifact):
            result = irq("merge", artifact, adapter, out, "--to", "dense", "--overwrite")
        assert_fails(result, 2, str(out))
    assert_fails(run(irq, tmp_path / "no", adapter, tmp_path / "out"), 2, "no such folder")
    assert_fails(run(irq, artifact, tmp_path / "no", tmp_path / "out"), 2, "no such folder")
    assert_fails(run(irq, adapter, adapter, tmp_path / "out"), 2, "not an irq artifact")
    (tmp_path / "file").write_text("")
    assert_fails(run(irq, artifact, adapter, tmp_path / "file" / "out"), 2, "is a file")


def test_a_damaged_artifact(irq: Commands, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_fails(run(irq, broken, adapter, tmp_path / "out"), 1, "model.safetensors")
    shutil.rmtree(broken)
    shutil.copytree(artifact, broken)
    manifest = json.loads((broken / "irq_manifest.json").read_text())
    manifest["tensors"][f"{Q0}.weight"]["dtype"] = "I8"
    (broken / "irq_manifest.json").write_text(json.dumps(manifest))
    assert_fails(run(irq, broken, adapter, tmp_path / "out"), 1, "dtype 'I8'")
