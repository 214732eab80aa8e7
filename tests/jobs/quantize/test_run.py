"""The whole job: what lies in the folder afterwards, and that nothing lies there after a failure.

Values are read back with the independent numpy reader, statistics are computed anew with numpy.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from irq_convert.checkpoint import planned_folder
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.quantize import quantize as run
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.folders import listing, read_tensors
from tests.formats import numpy_reader
from tests.tiny import (
    LLAMA,
    OTHER_FILES,
    SMALL,
    UNKNOWN,
    VISION,
    llama_tensors,
    tiny_config,
    write_source,
)

from .models import is_linear

DOWN = "model.layers.0.mlp.down_proj.weight"
QUICK = UNKNOWN  # decided by name: no class has to be imported and built


def convert(source: Path, out: Path, **options: Any) -> Any:
    return quantize(str(source), out, QuantizeOptions(**options))


DTYPES, SHARD_BYTES = (torch.float32, torch.bfloat16, torch.float64), (10**9, 25_000, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "max_shard_bytes", "source_shards"),
    [  # every two of these together
        (dtype, most, (1, 3)[(i + j) % 2])
        for i, dtype in enumerate(DTYPES)
        for j, most in enumerate(SHARD_BYTES)
    ],
)
def test_the_artifact(
    tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int, source_shards: int
) -> None:
    tensors = llama_tensors(dtype) | {"steps": torch.tensor(5), "none": torch.zeros(0, 3)}
    source, out = tmp_path / "source", tmp_path / "out"
    write_source(source, tensors, shards=source_shards)
    before = listing(source)
    spec = QuantSpec("nf3", 32)
    report = convert(
        source, out, spec=spec, bits_for=(("down", 2),), max_shard_bytes=max_shard_bytes
    )
    assert listing(source) == before
    stored = read_tensors(out)
    expected: dict[str, torch.Tensor] = {}
    dense: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if not is_linear(name):
            expected[name] = tensor
            continue
        own = QuantSpec("nf2", 32) if "down" in name else spec
        q = quantize_tensor(tensor, own)
        expected |= {name + suffix: part for suffix, part in q.parts().items()}
        dense[name] = dequantize_tensor(q, backend="torch").numpy()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    values = numpy_reader.read_artifact(out)
    assert values.keys() == tensors.keys()
    for name, wanted in dense.items():
        assert values[name].tobytes() == wanted.tobytes(), name
    check_layout(out, source, max_shard_bytes)
    assert report.decided_by == "the class LlamaForCausalLM"


def check_layout(out: Path, source: Path, max_shard_bytes: int) -> None:
    """File names, index, header metadata, carried files, config."""
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    index_path = out / "model.safetensors.index.json"
    if max_shard_bytes == 10**9:
        assert shards == ["model.safetensors"]
        assert not index_path.exists()
    else:
        count = len(shards)
        assert shards == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        index = json.loads(index_path.read_text())
        held: dict[str, str] = {}
        for name in shards:
            with safe_open(out / name, "pt") as file:
                held |= dict.fromkeys(file.keys(), name)
        assert index["weight_map"] == held
        size = sum(tensor.nbytes for tensor in read_tensors(out).values())
        assert index["metadata"] == {"total_size": size}
    for name in shards:
        with safe_open(out / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    made = {*shards, "config.json", "irq_manifest.json"}
    made |= {index_path.name} if index_path.exists() else set()
    assert there == made | OTHER_FILES.keys()
    for name in OTHER_FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "irq"
    assert config == json.loads((source / "config.json").read_text())
    numpy_reader.read_config(out)


# --- the manifest ---------------------------------------------------------------------------------


def half_entropy(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum() * counts.sum())


def entropies(
    weights: NDArray[np.float32], codes: NDArray[np.uint8], book: str, block: int
) -> tuple[float, float]:
    """(plain, stored) bits a code: section 7 of the specification, block by block."""
    levels = numpy_reader.levels(book)
    mids = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    plain = stored = 0.0
    for row, row_codes in zip(weights, codes, strict=True):
        for at in range(0, len(row), block):
            w = row[at : at + block]
            stored += half_entropy(np.bincount(row_codes[at : at + block]))
            if book.startswith("nf"):
                base, scale = np.float32(0), np.abs(w).max()
            else:
                base, scale = (
                    (w.max() + w.min()) / np.float32(2),
                    (w.max() - w.min()) / np.float32(2),
                )
            bare = (w[:, None] >= base + mids * scale).sum(axis=1)
            plain += half_entropy(np.bincount(bare))
    return plain / weights.size, stored / weights.size


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("nf3"), QuantSpec("int2", 32), QuantSpec("nf4", 128, "mse"), QuantSpec("int4")],
)
def test_the_manifest(tmp_path: Path, spec: QuantSpec) -> None:
    source, out = tmp_path / "my model", tmp_path / "out"
    tensors = llama_tensors(torch.bfloat16)
    write_source(source, tensors, QUICK, shards=2, files=OTHER_FILES | {".hidden/x": "1"})
    report = convert(source, out, spec=spec, max_shard_bytes=30_000)
    manifest = json.loads((out / "irq_manifest.json").read_text())
    check_files(out, manifest["files"])
    assert manifest["source"] == {
        "model": "my model",
        "revision": None,
        "tensors_sha256": fingerprint(source),
    }
    assert manifest["options"] == QuantizeOptions(spec, max_shard_bytes=30_000).to_dict()
    assert list(manifest["tensors"]) == sorted(n for n in tensors if is_linear(n))
    dense, packed = numpy_reader.read_artifact(out), read_tensors(out)
    sums = np.zeros(5)
    for name, entry in manifest["tensors"].items():
        w = tensors[name].float().numpy()
        codes = numpy_reader.unpack(packed[name].numpy(), spec.bits, w.shape[1])
        plain, stored = entropies(w, codes, spec.codebook, spec.block_size)
        error = float(((w.astype(np.float64) - dense[name]) ** 2).sum())
        energy = float((w.astype(np.float64) ** 2).sum())
        assert entry == {
            "shape": list(w.shape),
            "dtype": "BF16",
            "codebook": spec.codebook,
            "block_size": spec.block_size,
            "entropy_plain": pytest.approx(plain, abs=1e-4),
            "entropy": pytest.approx(stored, abs=1e-4),
            "relative_error": pytest.approx(error / energy, rel=2e-3),
        }
        sums += [w.size, plain * w.size, stored * w.size, error, energy]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    parts = ("", "_scale", "_tau", "_scale_grid", "_tau_grid")
    bits = 8 * sum(packed[name + part].nbytes for name in manifest["tensors"] for part in parts)
    totals = {
        "weights": sum(t.numel() for t in tensors.values()),
        "quantized_weights": int(sums[0]),
        "bytes": size,
        "bits_per_weight": bits / sums[0],
        "entropy_plain": pytest.approx(sums[1] / sums[0], abs=1e-4),
        "entropy": pytest.approx(sums[2] / sums[0], abs=1e-4),
        "relative_error": pytest.approx(sums[3] / sums[4], rel=2e-3),
    }
    assert manifest["totals"] == totals
    for key in ("weights", "quantized_weights", "bits_per_weight", "entropy", "relative_error"):
        assert getattr(report, key) == totals[key]
    assert report.bytes_out == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    worst = sorted(manifest["tensors"].items(), key=lambda item: -item[1]["relative_error"])[:3]
    assert [w.name for w in report.worst] == [name for name, _ in worst]
    assert report.to_dict()["share"] == report.quantized_weights / report.weights


def check_files(out: Path, listed: dict[str, Any]) -> None:
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert ".hidden/x" in there
    assert list(listed) == sorted(there - {"irq_manifest.json", "README.md", ".hidden/x"})
    for name, entry in listed.items():
        data = (out / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def fingerprint(source: Path) -> str:
    """Section 7, from the files themselves."""
    lines = {}
    for path in source.glob("*.safetensors"):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        for name, entry in header.items():
            if name != "__metadata__":
                shape = "x".join(str(dim) for dim in entry["shape"])
                lines[name] = f"{name}\t{entry['dtype']}\t{shape}\t{path.name}\n"
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


# --- the same again, and not at all ---------------------------------------------------------------


def test_same_bytes_whatever_the_threads_and_tiles(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", None, QUICK)
    runs = [{}, {"threads": 1, "tile_weights": 1}, {"threads": 2, "tile_weights": 5000}]
    folders = []
    for number, options in enumerate(runs):
        convert(source, tmp_path / str(number), **options)
        folders.append(listing(tmp_path / str(number)))
    assert folders[0] == folders[1] == folders[2]


def test_overwrite_replaces_an_artifact_and_nothing_else(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", None, QUICK)
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("42")
    with pytest.raises(UsageError, match="not empty"):
        convert(source, precious)
    with pytest.raises(UsageError, match="holds no artifact"):
        convert(source, precious, overwrite=True)
    assert listing(precious) == {"thesis.tex": b"42"}
    out = tmp_path / "out"
    convert(source, out)
    old = listing(out)
    (out / "mine.txt").write_text("goes with the folder")
    with pytest.raises(UsageError, match="not empty"):
        convert(source, out)
    convert(source, out, overwrite=True)
    assert listing(out) == old
    convert(source, out, overwrite=True, spec=QuantSpec("nf2"))
    assert listing(out) != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "source"]


def test_a_failed_overwrite_leaves_the_old_artifact(tmp_path: Path) -> None:
    good = write_source(tmp_path / "good", None, QUICK)
    tensors = llama_tensors()
    tensors[DOWN][3, 4] = float("nan")
    bad = write_source(tmp_path / "bad", tensors, QUICK)
    out = tmp_path / "out"
    convert(good, out)
    before = listing(tmp_path)
    with pytest.raises(IrqError, match="down_proj"):
        convert(bad, out, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("where", ["copy", "checksum", "manifest", "progress"])
def test_a_failure_anywhere_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = write_source(tmp_path / "source", None, QUICK)
    before = listing(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise IrqError("the disk fails")

    progress = Progress()
    if where == "progress":
        monkeypatch.setattr(progress, "advance", fail)
    else:
        room, name = {
            "copy": (planned_folder, "copy_file_atomic"),
            "checksum": (planned_folder, "sha256_file"),
            "manifest": (run, "build_manifest"),
        }[where]
        monkeypatch.setattr(room, name, fail)
    with pytest.raises(IrqError, match="the disk fails"):
        quantize(str(source), tmp_path / "new" / "out", progress=progress)
    assert listing(tmp_path) == before
    assert not [
        t
        for t in threading.enumerate()
        if t.name.startswith(("irq-reader", "irq-writer", "irq-checksum"))
    ]


def test_home_folders_and_empty_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "m", None, QUICK)
    monkeypatch.setenv("HOME", str(tmp_path))
    for inside in ("m/out", "m"):
        with pytest.raises(UsageError, match="the source"):
            quantize("~/m", tmp_path / inside)
        with pytest.raises(UsageError, match="the source"):
            estimate_quantize("~/m", tmp_path / inside, QuantizeOptions())
    with pytest.raises(UsageError, match="no model given"):
        quantize("", tmp_path / "out")
    with pytest.raises(UsageError, match="no such folder"):
        quantize("~no-such-user-here/m", tmp_path / "out")
    quantize("~/m", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


class Course(Progress):
    """Notes the course of a conversion."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.bytes = 0

    def stage(self, text: str) -> None:
        self.events.append(text)

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        self.events.append("start")

    def advance(self, nbytes: int, finished: bool) -> None:
        self.bytes += nbytes
        if self.events[-1] != "advance":
            self.events.append("advance")


def test_progress_is_told_in_order(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", None, QUICK)
    course = Course()
    quantize(str(source), tmp_path / "out", progress=course)
    stages = ["planning", "loading kernels (compiled once per machine)", "start", "advance"]
    assert course.events == [*stages, "checksums"]
    assert course.bytes == open_checkpoint(source).nbytes


def test_estimate_says_what_will_be(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", None, LLAMA, shards=2)
    options = QuantizeOptions(QuantSpec("nf2"), max_shard_bytes=40_000)
    before = listing(tmp_path)
    found = estimate_quantize(str(source), tmp_path / "new" / "out", options)
    assert listing(tmp_path) == before
    report = quantize(str(source), tmp_path / "new" / "out", options)
    manifest = (tmp_path / "new" / "out" / "irq_manifest.json").stat().st_size
    assert found.bytes_out + manifest == report.bytes_out
    assert found.bytes_out < report.bytes_out <= found.disk_needed
    for key in ("bytes_in", "weights", "quantized_weights", "bits_per_weight", "decided_by"):
        assert getattr(found, key) == getattr(report, key)
    assert found.shards == len(list((tmp_path / "new" / "out").glob("*.safetensors")))
    assert found.tensors == len(llama_tensors())
    assert found.seconds == found.quantized_weights / found.rate > 0
    with pytest.raises(UsageError, match="not empty"):
        estimate_quantize(str(source), tmp_path / "new" / "out", options)


def test_the_artifact_loads_and_computes(tmp_path: Path) -> None:
    """The end of the way: transformers loads it, and it computes with the values stored."""
    import transformers

    from irq_convert import load

    source, out = write_source(tmp_path / "source", files={}), tmp_path / "out"
    convert(source, out, spec=QuantSpec("nf3"), keep=(r"layers\.1\..*up_proj",))
    model = load(out)
    dense = transformers.LlamaForCausalLM.from_pretrained(source)
    values = {n: torch.from_numpy(v) for n, v in numpy_reader.read_artifact(out).items()}
    dense.load_state_dict(values)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Mixtral", "Llava", "T5", "Bert"])
def test_other_classes_load_and_compute(tmp_path: Path, kind: str) -> None:
    """Experts, renamed modules, weights that a class wants in float32, a model that is no LLM."""
    import transformers as tf
    from safetensors.torch import save_file

    from irq_convert import load

    grouped = SMALL | {"num_key_value_heads": 2}
    text = tiny_config(**SMALL)
    model = {
        "Mixtral": lambda: tf.MixtralForCausalLM(
            tiny_config("mixtral", **grouped, num_local_experts=4)
        ),
        "Llava": lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=text)
        ),
        "T5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=64, d_ff=96, num_layers=1, num_heads=4, vocab_size=50, d_kv=16)
        ),
        "Bert": lambda: tf.BertForMaskedLM(tiny_config("bert", **SMALL)),
    }[kind]()
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    convert(source, out)
    quantized = load(out)
    values = {n: torch.from_numpy(v) for n, v in numpy_reader.read_artifact(out).items()}
    save_file(values, source / "model.safetensors", {"format": "pt"})
    dense = type(model).from_pretrained(source)
    ids = torch.arange(3, 20)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "T5" else {})
    with torch.no_grad():
        torch.testing.assert_close(quantized(**inputs).logits, dense(**inputs).logits)
