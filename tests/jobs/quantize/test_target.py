"""A size is asked for: what comes has it, is an ordinary artifact, and is no worse than uniform."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import irq_convert
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.errors import UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.jobs.calibration import source as text_source
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.quantize import target as targeting
from irq_convert.jobs.quantize import target_plan as planning
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import KEPT, LEFT
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.quantize.report import QuantizeReport
from irq_convert.jobs.sizing.options import TargetOptions
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.folders import listing
from tests.jobs.calibration.words import write_word_tokenizer
from tests.jobs.measure.conftest import VOCABULARY, make, text

__all__ = ["make", "text"]

Make = Callable[[str], Path]
SIZED = ("Llama 3", "GPT-NeoX")


@pytest.fixture
def make_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes a model of the zoo, wide enough for half a percent to be something."""
    monkeypatch.setattr(text_source, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)

    def write(name: str) -> Path:
        wide = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
        kind = BY_NAME[name]
        folder = write_checkpoint(replace(kind, values={**kind.values, **wide}), tmp_path / "wide")
        write_word_tokenizer(folder, VOCABULARY)
        return folder

    return write


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def sized(
    source: Path, out: Path, text: Path, progress: Progress | None = None, **settings: Any
) -> QuantizeReport:
    own = {
        name: settings.pop(name)
        for name in ("size", "bits", "file", "within", "at_least", "at_most")
        if name in settings
    }
    target = TargetOptions(text=str(text), tokens=512, window=16, **own)
    options = QuantizeOptions.of(target=target, threads=1, **settings)
    return quantize(source, out, options, progress=progress)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_mix_of_so_many_bits(make: Make, text: Path, tmp_path: Path) -> None:
    source, out = make("Llama 2"), tmp_path / "out"
    report = sized(source, out, text, bits=3.2)
    artifact = open_artifact(out)
    assert 3.1 < artifact.bits_per_weight <= 3.2
    assert report.target is not None
    assert report.target["bits"] == 3.2
    assert report.target["kl"] > 0
    assert report.target["uniform"]["kl"] > 0
    kinds = {(t.format.codebook, t.format.block_size) for t in artifact.quantized}
    assert report.target["kept"] == "uniform" or len(kinds) > 1
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["target"] == report.target
    assert manifest["options"]["target"]["bits"] == 3.2
    assert irq_convert.verify(out, against=source).ok
    assert not list(tmp_path.glob("*.states"))
    model = irq_convert.load(out)
    assert model.config.quantization_config is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 2", "Llama 3"])  # apart, and tied
def test_embeddings_and_heads_are_in_the_choice(
    make: Make, text: Path, tmp_path: Path, name: str
) -> None:
    source, kept = make(name), tmp_path / "kept.safetensors"
    more = {"include_embeddings": True, "at_least": (("embed_tokens", 16),)}
    sized(source, tmp_path / "dense", text, bits=16, file=kept, **more)
    dense = {tensor.name for tensor in open_artifact(tmp_path / "dense").quantized}
    assert "model.embed_tokens.weight" not in dense
    assert ("lm_head.weight" in dense) == (name == "Llama 2")
    settings = {"bits": 3.2, "include_embeddings": True, "bits_for": (("embed_tokens", 2),)}
    report = sized(source, tmp_path / "mixed", text, file=kept, **settings)
    (table,) = (t for t in open_artifact(tmp_path / "mixed").quantized if "embed" in t.name)
    assert table.format.bits == 2
    assert report.target is not None
    assert irq_convert.verify(tmp_path / "mixed", against=source).ok
    model = irq_convert.load(tmp_path / "mixed")
    assert model.get_input_embeddings().weight.dtype.is_floating_point is False
    with pytest.raises(UsageError, match=r"--sensitivity .*: made with tables \[.*embed_tokens"):
        sized(source, tmp_path / "without", text, bits=3.2, file=kept)


def test_a_second_run_reads_what_was_measured(make: Make, text: Path, tmp_path: Path) -> None:
    source, notes = make("Llama 2"), Notes()
    sized(source, tmp_path / "one", text, notes, bits=3.2)
    kept = tmp_path / "one.sensitivity.safetensors"
    assert any(str(kept) in line for line in notes.lines)
    again = Notes()
    sized(source, tmp_path / "two", text, again, bits=3.2, file=kept)
    assert f"sensitivities are read from {kept}" in again.lines
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    sized(source, tmp_path / "three", text, bits=2.6, file=kept)
    assert open_artifact(tmp_path / "three").bits_per_weight <= 2.6
    # One that lies there and was made for other choices changes nothing.
    shutil.copy(kept, tmp_path / "four.sensitivity.safetensors")
    other = Notes()
    sized(source, tmp_path / "four", text, other, bits=3.2, codebook="int")
    assert not any("are read from" in line for line in other.lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZED)
def test_the_size_is_what_was_asked_for(
    make_wide: Make, text: Path, tmp_path: Path, name: str
) -> None:
    source, out = make_wide(name), tmp_path / "out"
    kept = tmp_path / "kept.safetensors"
    sized(source, tmp_path / "any", text, bits=3.0, file=kept, codebook="int")
    size = int(1.02 * folder_size(tmp_path / "any"))
    report = sized(source, out, text, size=size, file=kept, codebook="int")
    assert 0.995 * size <= folder_size(out) <= size
    assert report.bytes_out == folder_size(out)


def test_long_rules_are_in_the_size(make: Make, text: Path, tmp_path: Path) -> None:
    """The manifest repeats them, and none of it is beyond what was asked for."""
    source, out, kept = make("Llama 2"), tmp_path / "out", tmp_path / "kept.safetensors"
    rules = tuple((f"o_proj|{'x' * 2000}{number}", 3) for number in range(20))
    sized(source, tmp_path / "any", text, bits=3.0, file=kept, codebook="int", at_least=rules)
    size = folder_size(tmp_path / "any") + 20_000
    sized(source, out, text, size=size, file=kept, codebook="int", at_least=rules)
    assert folder_size(out) <= size


def test_the_better_is_kept(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = make("Llama 2"), Notes()
    compare = targeting.compare

    def worse(*args: Any) -> Any:
        found = dict(compare(*args))
        return {
            name: each if name == "uniform" else type(each)(99.0, None)
            for name, each in found.items()
        }

    monkeypatch.setattr(targeting, "compare", worse)
    report = sized(source, tmp_path / "out", text, notes, bits=3.3)
    assert report.target is not None
    assert report.target["kept"] == "uniform"
    kinds = {
        (t.format.codebook, t.format.block_size) for t in open_artifact(tmp_path / "out").quantized
    }
    assert [f"{a}/{b}" for a, b in kinds] == [report.target["uniform"]["choice"]]
    assert any("for all is better than the mix" in line for line in notes.lines)


def test_rules_hold_in_what_is_written(make: Make, text: Path, tmp_path: Path) -> None:
    source, out = make("Mixtral"), tmp_path / "out"
    sized(
        source, out, text, bits=3.0, codebook="int", block_size=32,
        at_least=((r"o_proj", 4),), at_most=((r"v_proj", 2),), keep=("k_proj",),
        bits_for=(("q_proj", 3),),
    )  # fmt: skip
    found = {t.name: t.format for t in open_artifact(out).quantized}
    assert all(f.codebook.startswith("int") and f.block_size == 32 for f in found.values())
    for part, bits in (("o_proj", {4}), ("v_proj", {2}), ("q_proj", {3})):
        assert {f.bits for name, f in found.items() if part in name} <= bits
    assert not any("k_proj" in name for name in found)
    for layer in (0, 1):
        for part in ("w1", "w2", "w3"):
            own = {f for n, f in found.items() if f"layers.{layer}." in n and f".{part}." in n}
            assert len(own) <= 1  # the experts of a layer share
    assert irq_convert.verify(out, against=source).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name"),
    [("importance", "Llama 2"), ("importance", "Mixtral"), ("calibrate", "Llama 3")],
)
def test_it_goes_with_data(make: Make, text: Path, tmp_path: Path, how: str, name: str) -> None:
    """With experts, whose columns count apart, and with tied embeddings in the choice."""
    source, out = make(name), tmp_path / "out"
    settings: dict[str, Any] = {}
    if how == "importance":
        settings["importance"] = tmp_path / "i.safetensors"
        irq_convert.measure(source, settings["importance"], text=text, tokens=512, window=16)
    else:
        settings["calibrate"] = CalibrationOptions(str(text), tokens=512, window=16)
        settings["include_embeddings"] = True
    report = sized(source, out, text, bits=3.0, codebook="int", block_size=32, **settings)
    assert getattr(report, "calibration" if how == "calibrate" else how) is not None
    assert report.target is not None
    if how == "calibrate":
        fitted = report.target["calibrated"]
        assert report.target["kept"] == min(fitted, key=lambda name: fitted[name])
        assert report.calibration is not None
        own = report.calibration
        assert min(own["kl"], own["plain"]) == min(fitted.values())
    artifact = open_artifact(out)
    assert artifact.bits_per_weight <= 3.0
    names = {tensor.name for tensor in artifact.quantized}
    assert ("model.embed_tokens.weight" in names) == (how == "calibrate")
    assert irq_convert.verify(out).ok


def test_a_dry_run_shows_the_frontier_and_writes_nothing(
    make: Make, text: Path, tmp_path: Path
) -> None:
    source = make("Llama 2")
    before = listing(tmp_path)
    target = TargetOptions(text=str(text), tokens=512, window=16, bits=3.0)
    found = estimate_quantize(
        source, tmp_path / "out", QuantizeOptions.of(target=target, threads=1)
    )
    assert listing(tmp_path) == before
    assert found.bits_per_weight <= 3.0
    expected = [point.expected for point in found.frontier]
    sizes = [point.size for point in found.frontier]
    assert sizes == sorted(sizes)
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == 0
    (near,) = (point for point in found.frontier if point.nearest)
    assert near.bits == min((p.bits for p in found.frontier), key=lambda bits: abs(bits - 3.0))


def test_what_cannot_be_is_said_before_anything_is_written(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, kept = make("Llama 2"), tmp_path / "kept.safetensors"
    sized(source, tmp_path / "any", text, bits=3.0, file=kept)
    before = listing(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"--target-bits 1.5: the choices reach from 2\.\d+ to 32"):
        sized(source, out, text, bits=1.5)
    with pytest.raises(UsageError, match=r"--target-size 9000 bytes .*: the choices re") as error:
        sized(source, out, text, size=9000)
    assert "--include-embeddings may quantize more" in str(error.value)
    least = int(re.findall(r"reach from (\d+) bytes", str(error.value))[0])
    too_much: tuple[dict[str, Any], ...]
    too_much = {"size": 10**9}, {"bits": 32.0}, {"bits": 3.0, "at_least": ((".", 16),)}
    for much in too_much:
        with pytest.raises(UsageError, match="nothing would be quantized"):
            sized(source, out, text, **much)
    with pytest.raises(UsageError, match="the target chooses the bits"):
        QuantizeOptions.of(bits=3, target=TargetOptions(bits=3.0))
    assert QuantizeOptions.of(target="3kB").target == TargetOptions(size=3000)
    assert QuantizeOptions.of(target=3).target == TargetOptions(bits=3)
    with pytest.raises(UsageError, match="--codebook nf3: with a target"):
        QuantizeOptions.of(codebook="nf3", target=TargetOptions(bits=3.0))
    with pytest.raises(UsageError, match="made with objective 'mse', and this run has 'entropy'"):
        sized(source, out, text, bits=3.0, file=kept, objective="entropy")
    with pytest.raises(UsageError, match="exists and holds no sensitivities"):
        sized(source, out, text, bits=3.0, file=source / "model.safetensors")
    with pytest.raises(UsageError, match="is no folder; name a file"):
        sized(source, out, text, bits=3.0, file=tmp_path / "no" / "s.safetensors")
    assert listing(tmp_path) == before
    sized(source, tmp_path / "least", text, size=least, file=kept)
    assert folder_size(tmp_path / "least") <= least
    before = listing(tmp_path)

    def refuse(*args: Any) -> Any:
        raise NotLayered("it is not")

    monkeypatch.setattr(planning, "open_layered", refuse)
    with pytest.raises(
        UsageError, match="cannot be run layer by layer, so its weights cannot be m"
    ):
        sized(source, out, text, bits=3.0)
    assert listing(tmp_path) == before


def test_a_folder_for_states_that_is_not_ours_is_left_alone(
    make: Make, text: Path, tmp_path: Path
) -> None:
    source, states = make("Llama 2"), tmp_path / "out.states"
    states.mkdir()
    (states / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"out\.states: exists, not empty, not made by a run"):
        sized(source, tmp_path / "out", text, bits=3.0)
    (states / LOCK_NAME).touch()
    with pytest.raises(UsageError, match=r"out\.states: hidden states would lie there"):
        sized(source, tmp_path / "out", text, bits=3.0)
    assert (states / "mine.txt").read_text() == "kept"
    (states / "mine.txt").rename(states / "source-00000")
    sized(source, tmp_path / "out", text, bits=3.0, codebook="int")  # what a killed run has left
    assert not states.exists()


def test_states_of_a_run_are_left_alone_by_another(tmp_path: Path) -> None:
    out = tmp_path / "new" / "more" / "out"
    with planning.scratch_folder(out) as states:
        (states / "source-00000").write_text("kept")
        with (
            pytest.raises(UsageError, match=r"out\.states: in use by a run that is not finished"),
            planning.scratch_folder(out),
        ):
            pass
        assert (states / "source-00000").read_text() == "kept"
    assert not list(tmp_path.iterdir())


def test_files_beside_an_output_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` is a name like any other where the output is written; a shell has made it a home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    Path("~").mkdir()
    with planning.scratch_folder(Path("~/out")) as states:
        assert states == tmp_path / "~" / "out.states"
    file = planning.SensitivityFile.of(None, Path("~/out"), {}, {}, ())
    assert file.path == tmp_path / "~" / "out.sensitivity.safetensors"


def test_what_a_target_leaves_as_it_is(make: Make, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 12.0, "at_least": (("down_proj", 16),)}
    report = sized(make("Llama 2"), tmp_path / "out", text, **options)
    assert LEFT in report.kept
    assert KEPT not in report.kept


def test_sensitivities_of_another_model_are_refused(make: Make, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    first = make("Llama 2")
    sized(first, tmp_path / "any", text, bits=3.0, file=kept)
    tuned = shutil.copytree(first, tmp_path / "tuned" / "source")
    weights = load_file(tuned / "model.safetensors")
    metadata = {"format": "pt"}
    save_file({n: 1.5 * w for n, w in weights.items()}, tuned / "model.safetensors", metadata)
    with pytest.raises(UsageError, match="measured on source, whose files are not those of this"):
        sized(tuned, tmp_path / "out", text, bits=3.0, file=kept)
    first.rename(tmp_path / "first")
    other = make("Qwen 2")
    with pytest.raises(UsageError, match="measured on source, whose files are not those of this"):
        sized(other, tmp_path / "out", text, bits=3.0, file=kept)


def test_without_a_text_the_source_writes_one(make: Make, tmp_path: Path) -> None:
    source = make("Llama 2")
    target = TargetOptions(bits=3.0, tokens=128, window=16)
    report = quantize(source, tmp_path / "out", QuantizeOptions.of(target=target, threads=1))
    assert report.target is not None
    assert report.target["text"] == "self"
    with pytest.raises(UsageError, match="--stream never has on the disk: give --target-text"):
        quantize(
            source, tmp_path / "two", QuantizeOptions.of(target=target, threads=1, stream=True)
        )
