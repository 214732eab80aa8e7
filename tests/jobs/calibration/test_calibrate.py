"""`quantize --calibrate` as a job: what it makes, keeps, continues and refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.manifest import read_manifest
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.calibration import layer, loop
from irq_convert.jobs.calibration.judge import Judgement
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.calibration.workspace import calibration_folder
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.verify import verify
from irq_convert.progress import Progress
from tests.folders import listing, open_without_a_name
from tests.jobs.calibration.conftest import calibrating
from tests.jobs.calibration.words import write_word_tokenizer

DOWN = r"down_proj"


def _kl(folder: Path, source: Path, ids: torch.Tensor) -> float:
    from irq_convert.hf.causal_lm import load_causal_lm

    with torch.no_grad():
        one, other = (
            load_causal_lm(each)(input_ids=ids).logits.double().log_softmax(-1)
            for each in (source, folder)
        )
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_it_is_closer_to_the_source_than_without_data(
    source: Path, text: Path, tmp_path: Path
) -> None:
    options = calibrating(text)
    report = quantize(source, tmp_path / "out", options)
    quantize(source, tmp_path / "plain", bits=2, block_size=16, objective="mse", threads=1)
    ids = torch.randint(0, 80, (4, 32), generator=torch.Generator().manual_seed(5))
    assert _kl(tmp_path / "out", source, ids) < _kl(tmp_path / "plain", source, ids)
    record = report.calibration
    assert record is not None
    assert record["kl"] < record["plain"]
    assert record["kept"] == "calibrated"
    assert record == read_manifest(tmp_path / "out")["calibration"]
    assert not verify(tmp_path / "out", against=str(source)).failures
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out", "plain", "source", "words.txt"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"keep": (DOWN,)},
        {"bits_for": ((DOWN, 4),)},
        {"codebook": "int", "zero_point": "integer", "bits": 3},
        {"objective": "entropy", "bits": 3},
        {"correction": 0.0, "rounds": 0},
    ],
)
def test_other_options_compose(
    source: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    quantize(source, tmp_path / "out", calibrating(text, **changes))
    artifact = open_artifact(tmp_path / "out")
    kept = {info.name for info in artifact.copied}
    assert any("down_proj" in name for name in kept) == ("keep" in changes)
    books = {tensor.format.codebook for tensor in artifact.quantized}
    assert ("nf4" in books) == ("bits_for" in changes)
    assert not verify(tmp_path / "out").failures


def test_the_same_bytes_every_time(source: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(source, tmp_path / name, calibrating(text))
    small = calibrating(text, max_shard_bytes=40_000, tile_weights=5_000)
    quantize(source, tmp_path / "cut", small)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    parts: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "cut").glob("*.safetensors"):
        parts |= load_file(path)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_states_behind_give_their_room_back(source: Path, text: Path, tmp_path: Path) -> None:
    held: list[list[str]] = []

    class Watching(Progress):
        def advance(self, size: int, finished: int) -> None:
            held.append(open_without_a_name(tmp_path))

    quantize(source, tmp_path / "out", calibrating(text), progress=Watching())
    assert len(held) > 2
    assert not any(held)


def test_what_is_freed_is_given_back_before_the_largest_matrices(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("give_back_memory", "corrections", "factorize"):
        own = getattr(layer, name)

        def heard(*given: Any, name: str = name, own: Any = own) -> Any:
            called.append(name)
            return own(*given)

        monkeypatch.setattr(layer, name, heard)
    quantize(source, tmp_path / "out", calibrating(text))
    first = called.index("corrections") - 1
    steps = ["give_back_memory", "corrections", "give_back_memory", "factorize"]
    assert called[first : first + 8] == steps * 2


class _StopAt(Progress):
    """Stops the run, as Ctrl-C does, when so many layers or tensors are finished."""

    def __init__(self, phase: str, count: int) -> None:
        self._phase, self._left, self._now = phase, count, ""
        self.said = ""

    def phase(self, text: str, things: int, size: int) -> None:
        self._now = text

    def kept(self, text: str) -> None:
        self.said = text

    def advance(self, size: int, finished: int) -> None:
        if self._now == self._phase and finished:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt


@pytest.mark.parametrize(("phase", "count"), [("calibrating", 1), ("quantizing", 9)])
def test_a_stopped_run_continues_only_with_the_same(
    source: Path, text: Path, tmp_path: Path, phase: str, count: int
) -> None:
    options = calibrating(text, max_shard_bytes=40_000)
    quantize(source, tmp_path / "whole", options)
    stop = _StopAt(phase, count)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, progress=stop)
    assert "the same command continues there" in stop.said
    assert calibration_folder(tmp_path / "out").is_dir()
    with pytest.raises(UsageError, match="rounds"):
        quantize(source, tmp_path / "out", calibrating(text, rounds=1, max_shard_bytes=40_000))
    text.write_text("w1 w2 w3 w4 " * 1000)
    with pytest.raises(UsageError, match="calibration tokens sha256"):
        quantize(source, tmp_path / "out", options)


def test_finished_layers_are_used(source: Path, text: Path, tmp_path: Path) -> None:
    options = calibrating(text)
    quantize(source, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, progress=_StopAt("calibrating", 1))
    notes: list[str] = []
    told = Progress()
    told.note = notes.append  # type: ignore[method-assign]
    quantize(source, tmp_path / "out", options, progress=told)
    assert any("1 of 2 layers are calibrated already" in line for line in notes)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert not calibration_folder(tmp_path / "out").exists()


def test_what_is_damaged_is_made_again(source: Path, text: Path, tmp_path: Path) -> None:
    options = calibrating(text)
    quantize(source, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, progress=_StopAt("calibrating", 1))
    layer = calibration_folder(tmp_path / "out") / "files" / "layer-00000.safetensors"
    raw = bytearray(layer.read_bytes())
    raw[-1] ^= 1
    layer.write_bytes(raw)
    quantize(source, tmp_path / "out", options)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_never_keeps_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    options = calibrating(text, resume="never")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, progress=_StopAt("calibrating", 1))
    assert not calibration_folder(tmp_path / "out").exists()


def test_the_better_one_is_kept(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "judge", lambda *_: Judgement(0.5, 0.1, 0.4, 0.1))
    notes: list[str] = []
    told = Progress()
    told.note = notes.append  # type: ignore[method-assign]
    report = quantize(source, tmp_path / "out", calibrating(text), progress=told)
    assert any("calibrating has not helped: KL 0.5000" in line for line in notes)
    assert report.calibration is not None
    assert report.calibration["kept"] == "plain"
    quantize(source, tmp_path / "plain", bits=2, block_size=16, objective="mse", threads=1)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one == other


def test_of_several_choices_the_best_is_kept(source: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", calibrating(text, correction=(0.0, 0.5, 1.0)))
    record = report.calibration
    assert record is not None
    tried = {each["correction"]: each["kl"] for each in record["tried"]}
    assert list(tried) == [0.0, 0.5, 1.0]
    assert tried[record["correction"]] == record["kl"] == min(tried.values())
    quantize(source, tmp_path / "alone", calibrating(text, correction=record["correction"]))
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "alone"))
    assert one == other
    assert not list(tmp_path.glob("*.calibration*"))


def test_a_dry_run_says_what_it_costs(source: Path, text: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    found = estimate_quantize(source, tmp_path / "out", calibrating(text))
    cost = found.calibration
    assert cost is not None
    assert (cost.windows, cost.tokens, cost.layers) == (16, 512, 2)
    assert 0 < cost.seconds < 60
    assert found.disk_needed > cost.disk > 4 * 512 * 96 * 2
    assert listing(tmp_path) == before


def test_self_needs_no_text(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report = quantize(source, tmp_path / name, calibrating("self"))
    assert report.calibration is not None
    assert report.calibration["text"] == "self"
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def _refused(source: Path, text: Path, out: Path, kind: type[IrqError], says: str) -> None:
    with pytest.raises(kind, match=says):
        quantize(source, out, calibrating(text))
    assert not out.exists()
    assert not list(out.parent.glob("out*"))


def test_activations_that_overflow_name_the_layer(source: Path, text: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"] *= 1e30
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IrqError, match=r"model\.layers\.1\.self_attn.*overflow"):
        quantize(source, tmp_path / "out", calibrating(text))
    assert not (tmp_path / "out").exists()


def test_no_tokenizer(source: Path, text: Path, tmp_path: Path) -> None:
    for path in source.glob("*token*"):
        path.unlink()
    _refused(source, text, tmp_path / "out", IrqError, "tokenizer")


def test_a_tokenizer_of_another_model(source: Path, text: Path, tmp_path: Path) -> None:
    write_word_tokenizer(source, 200)
    text.write_text("w150 w3 " * 1000)
    _refused(source, text, tmp_path / "out", UsageError, "id 150, but the model's embedding has 80")


def test_a_window_beyond_the_context(source: Path, text: Path, tmp_path: Path) -> None:
    """As long as the context where nobody asked for one."""
    options = QuantizeOptions.of(calibrate=CalibrationOptions(str(text), tokens=512))
    cost = estimate_quantize(source, tmp_path / "out", options).calibration
    assert cost is not None
    assert (cost.tokens, cost.windows) == (512, 8)
    for window in (128, 512):
        with pytest.raises(UsageError, match=f"{window} is longer than the model's context of 64"):
            quantize(source, tmp_path / "out", calibrating(text, tokens=2048, window=window))
    short = CalibrationOptions(str(text), tokens=100)
    with pytest.raises(UsageError, match="100: at least two windows of 64, one"):
        estimate_quantize(source, tmp_path / "out", QuantizeOptions.of(calibrate=short))


def test_a_model_that_cannot_be_run_layer_by_layer(
    source: Path, text: Path, tmp_path: Path
) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    says = "cannot be calibrated layer by layer: .*give --importance"
    _refused(source, text, tmp_path / "out", UsageError, says)


def test_a_full_disk(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("irq_convert.jobs.calibration.states.os.posix_fallocate", full)
    _refused(source, text, tmp_path / "out", IrqError, "hidden states")


def test_layer_zero_is_what_the_solver_gives_for_its_true_inputs(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """An oracle of its own: transformers' whole model, its inputs hooked, H in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from irq_convert.core.dequantize import dequantize_tensor
    from irq_convert.core.spec import QuantSpec
    from irq_convert.jobs.calibration.text import choose_windows, tokenize_source
    from tests.core.solver.make import solve_matrix

    options = calibrating(text)
    quantize(source, tmp_path / "out", options)
    assert options.calibrate is not None
    chosen = options.calibrate
    ids, name = tokenize_source(chosen, AutoTokenizer.from_pretrained(source))
    windows = choose_windows(ids, chosen, name)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=windows.ids[: windows.calibrating])
    x = seen[0].reshape(-1, 96).double()
    weight = layer.weight.detach()
    wanted, _ = solve_matrix(
        weight,
        weight,
        (x.T @ x).float(),
        QuantSpec("nf2", 16, "mse", chosen.refine),
        chosen.choices[0].solver,
        threads=1,
    )
    loaded: Any = irq_convert.load(tmp_path / "out", dtype=torch.float32)
    found = loaded.model.layers[0].self_attn.q_proj.dequantize()
    same = (found - dequantize_tensor(wanted)).abs() < 1e-6
    assert same.double().mean() > 0.99


@pytest.mark.parametrize("own", [True, False])
def test_a_source_that_gives_nan_is_named(
    source: Path, text: Path, tmp_path: Path, own: bool
) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IrqError, match=r"source model.* NaN"):
        quantize(source, tmp_path / "out", calibrating("self" if own else text))


def test_what_will_be_refused_is_refused_before_calibrating(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the dry run, too."""
    out, options = tmp_path / "out", calibrating(text, max_shard_bytes=40_000)
    plain = QuantizeOptions.of(bits=3, block_size=16, max_shard_bytes=40_000)

    def refused(says: str, **changes: Any) -> None:
        for run in (quantize, estimate_quantize):
            with pytest.raises(UsageError, match=says):
                run(source, out, replace(options, **changes))
        assert not calibration_folder(out).exists()

    refused("nothing to resume", resume=Resume.REQUIRED)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, plain, progress=_StopAt("quantizing", 9))
    refused(r"of another run: calibration .* was null.*--resume never")
    shutil.rmtree(out.with_name("out.partial"))
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    refused("a mount point, which cannot be replaced")


def test_finished_layers_are_something_to_resume(source: Path, text: Path, tmp_path: Path) -> None:
    options = calibrating(text)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, progress=_StopAt("calibrating", 1))
    quantize(source, tmp_path / "out", replace(options, resume=Resume.REQUIRED))
    assert (tmp_path / "out" / "irq_manifest.json").is_file()
