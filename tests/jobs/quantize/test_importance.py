"""`--importance`: lower weighted errors, the same bytes whatever the run, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irq_convert.artifact.importance import Importance, read_importance, write_importance
from irq_convert.artifact.manifest import fingerprint, read_manifest
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.inspect import inspect
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import plan_quantize
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.cli.process import Commands
from tests.folders import listing, read_tensors
from tests.formats import numpy_reader
from tests.tiny import write_source

Values = dict[str, np.ndarray]


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def make_importance(source: Path, path: Path, seed: int = 0, **more: Any) -> Values:
    """Write importance of very unlike columns for what `quantize` would quantize."""
    checkpoint = open_checkpoint(source)
    random = np.random.default_rng(seed)
    values = {}
    for tensor in plan_quantize(checkpoint, QuantizeOptions()).quantized:
        stack = tensor.info.shape[:1] if len(tensor.info.shape) == 3 else ()
        values[tensor.name] = np.exp(random.normal(0, 3, (*stack, tensor.shape.cols)))
    found = {"model": "m", "revision": None}
    found["tensors_sha256"] = fingerprint(checkpoint.tensors.values())
    write_importance(path, replace(Importance(values, "t.txt", 64, 16, "", found), **more))
    return values


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    make_importance(source, tmp_path / "i.safetensors")
    return tmp_path / "i.safetensors"


def weighted_error(out: Path, source: Path, values: Values) -> dict[str, float]:
    """By the independent reader, of each tensor with its columns weighed."""
    found = {}
    dense, wanted = numpy_reader.read_artifact(out), read_tensors(source)
    plan = plan_quantize(open_checkpoint(source), QuantizeOptions())
    transposed = {tensor.name for tensor in plan.quantized if tensor.transposed}
    for name, own in values.items():
        error = (dense[name].astype(np.float64) - wanted[name].double().numpy()) ** 2
        error = np.swapaxes(error, -1, -2) if name in transposed else error
        found[name] = float((error * own[..., None, :]).sum())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 2", "GPT-2", "Mixtral", "Mixtral, fused", "gpt-oss"])
def test_the_weighted_error_of_every_tensor_falls(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(BY_NAME[name], tmp_path / "source")
    file = tmp_path / "i.safetensors"
    values = make_importance(source, file)
    options = QuantizeOptions(QuantSpec("nf3", 16, objective="mse"))
    quantize(source, tmp_path / "plain", options)
    quantize(source, tmp_path / "weighed", replace(options, importance=file))
    before = weighted_error(tmp_path / "plain", source, values)
    after = weighted_error(tmp_path / "weighed", source, values)
    assert after.keys() == before.keys() == values.keys()
    for tensor in values:
        assert after[tensor] < before[tensor], tensor


def test_each_tensor_is_what_quantize_tensor_gives(
    tmp_path: Path, source: Path, file: Path
) -> None:
    options = QuantizeOptions(QuantSpec("int3", 32, objective="mse", refine=2), importance=file)
    quantize(source, tmp_path / "out", options)
    values, found = read_importance(file).values, numpy_reader.read_artifact(tmp_path / "out")
    for name, weight in read_tensors(source).items():
        if name in values:
            own = quantize_tensor(weight, options.spec, importance=values[name])
            np.testing.assert_array_equal(found[name], dequantize_tensor(own).numpy())


@pytest.mark.parametrize("name", ["Mixtral, fused", "gpt-oss", "GPT-2"])
def test_tiles_and_threads_change_no_byte(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(BY_NAME[name], tmp_path / "source")
    file = tmp_path / "i.safetensors"
    make_importance(source, file)
    found = []
    for number, (tile, threads) in enumerate(((1 << 21, 1), (1, 2), (5000, 1))):
        options = QuantizeOptions.of(
            bits=2, block_size=16, importance=file, tile_weights=tile, threads=threads
        )
        assert options.spec.objective == "mse"
        quantize(source, tmp_path / str(number), options)
        found.append(listing(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_processes_change_no_byte(irq: Commands, tmp_path: Path, source: Path, file: Path) -> None:
    more = ("--bits", 3, "--importance", file, "--max-shard-size", "5e-5", "--threads", 1)
    for result in (
        irq("quantize", source, tmp_path / "one", *more),
        irq.together(2, "quantize", source, tmp_path / "two", *more),
    ):
        assert (result.code, result.err) == (0, "")
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_the_manifest_says_it(tmp_path: Path, source: Path, file: Path) -> None:
    notes = Notes()
    report = quantize(source, tmp_path / "out", importance=file, progress=notes)
    assert notes.lines == []
    manifest = read_manifest(tmp_path / "out")
    record = manifest["importance"]
    assert record == report.importance
    assert record == {
        "kind": "irq importance",
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "text": "t.txt",
        "tokens": 64,
    }
    assert manifest["options"]["objective"] == "mse"
    assert inspect(tmp_path / "out").to_dict()["importance"] == record


def test_a_run_is_not_continued_with_another_file(
    tmp_path: Path, source: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings = {"importance": file, "max_shard_bytes": 50_000}
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, **settings)
    monkeypatch.undo()
    other = tmp_path / "j.safetensors"
    make_importance(source, other, seed=1)
    for importance in (other, None):
        for job in (quantize, estimate_quantize):
            with pytest.raises(UsageError, match=r"importance was \w+ and is \w+ now"):
                job(source, out, **{**settings, "importance": importance, **_mse(importance)})
    assert estimate_quantize(source, out, **settings).finished == 2
    quantize(source, out, **settings)
    quantize(source, tmp_path / "again", **settings)
    assert listing(out) == listing(tmp_path / "again")


def _mse(importance: Path | None) -> dict[str, str]:
    return {} if importance else {"objective": "mse"}


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt a run when it has written so many shards."""
    from irq_convert.jobs.quantize import job

    done = []
    original = job.quantize_shard

    def shard(*args: Any, **more: Any) -> Any:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **more)

    monkeypatch.setattr(job, "quantize_shard", shard)


def _with(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Values], None]:
    def write(path: Path, values: Values) -> None:
        tensors = dict(values)
        change(tensors)
        found = read_importance(path)
        write_importance(path, replace(found, values=tensors))

    return write


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.pop(UP), f"lacks 1 of the 14 weights to quantize, the first is {UP}"),
        (lambda v: v.update({UP: v[UP][:-1]}), f"{UP} [172, 96] has importance [95], not [96]"),
        (lambda v: v.update({UP: v[UP][None]}), f"{UP} [172, 96] has importance [1, 96], not [96]"),
    ],
)
@pytest.mark.parametrize("job", [quantize, estimate_quantize])
def test_what_does_not_fit(
    tmp_path: Path, source: Path, file: Path, change: Any, says: str, job: Any
) -> None:
    _with(change)(file, dict(read_importance(file).values))
    before = listing(tmp_path)
    with pytest.raises(UsageError) as caught:
        job(source, tmp_path / "out", importance=file)
    assert str(caught.value).startswith(f"{file}: {says}")
    assert listing(tmp_path) == before


def test_what_is_kept_need_not_be_there(tmp_path: Path, source: Path, file: Path) -> None:
    _with(lambda v: v.pop(UP))(file, dict(read_importance(file).values))
    quantize(source, tmp_path / "out", importance=file, keep=("up_proj",))


def test_notes(tmp_path: Path, source: Path, file: Path) -> None:
    values = dict(read_importance(file).values) | {"x.weight": np.ones(3)}
    told = {"model": "org/other", "revision": None, "tensors_sha256": "00"}
    write_importance(file, Importance(values, "t.txt", 64, 16, "", told))
    notes = Notes()
    estimate_quantize(source, tmp_path / "out", importance=file, progress=notes)
    assert notes.lines == [
        f"{file}: 1 names in it are not used, the first is x.weight",
        f"{file}: measured on org/other, whose files are not those of this model; all names and "
        "shapes fit",
    ]


def test_nothing_to_weigh_is_refused(source: Path, file: Path) -> None:
    with pytest.raises(UsageError, match="--objective none without --refine looks at no error"):
        QuantizeOptions.of(objective="none", importance=file)
    QuantizeOptions.of(objective="none", refine=1, importance=file)


def test_a_file_that_is_not_there(tmp_path: Path, source: Path) -> None:
    for path, says in ((tmp_path / "none", "no such file"), (source, "a folder, not a file")):
        with pytest.raises(UsageError, match=says):
            quantize(source, tmp_path / "out", importance=path)


def test_damage_is_said_before_the_source_is_opened(tmp_path: Path, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-8:] = np.float64(-1).tobytes()
    file.write_bytes(raw)
    (tmp_path / "empty").mkdir()
    with pytest.raises(IrqError, match="has negative numbers"):
        quantize(tmp_path / "empty", tmp_path / "out", importance=file)
    assert json.loads(json.dumps(QuantizeOptions(importance=file).to_dict()))


def test_embeddings_are_not_in_the_file_and_weighed_equally(
    tmp_path: Path, source: Path, file: Path
) -> None:
    quantize(source, tmp_path / "a", importance=file, bits=3, include_embeddings=True)
    found = read_tensors(tmp_path / "a")
    wanted = read_tensors(source)["model.embed_tokens.weight"]
    q = quantize_tensor(wanted, QuantSpec("nf3", objective="mse"))
    assert torch.equal(found["model.embed_tokens.weight"], q.codes)
    assert torch.equal(found["model.embed_tokens.weight_tau"], q.tau)
    assert "lm_head.weight_scale" in found
