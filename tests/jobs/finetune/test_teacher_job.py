"""Whole runs towards a teacher: nearer to it or not kept, the same when resumed or divided."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import irq_convert
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.causal_lm import load_causal_lm
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.folder import LOGITS, STATE
from irq_convert.jobs.finetune.prepare import prepare
from irq_convert.jobs.finetune.report import FinetuneReport
from irq_convert.jobs.finetune.teacher_file import TOP
from irq_convert.jobs.finetune.teacher_pass import TeacherPass
from tests.cli.process import Commands, assert_fails
from tests.paths import DEMO

from .base import quick
from .teaching import taught
from .test_distributed import together
from .test_job import Listener, stop_at, weights


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run of these tests puts its teacher's logits, and the others find them."""
    return tmp_path_factory.mktemp("logits") / "logits.safetensors"


@pytest.fixture(scope="module")
def run(
    int2: Path, tales: Path, logits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneReport]:
    """A run of seven steps that nothing has interrupted."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, finetune(int2, tales, out, taught(steps=7, teacher_logits=logits))


def never_again(*args: Any) -> None:
    raise AssertionError("the teacher is run again")


@pytest.mark.slow
def test_it_comes_nearer_to_the_teacher(
    int2: Path, tales: Path, run: tuple[Path, FinetuneReport]
) -> None:
    """And what is reported is KL to it, by both models in transformers, buckets aside."""
    out, report = run
    assert report.before is not None
    assert report.after is not None
    assert report.after.mean < 0.7 * report.before.mean
    held = prepare(int2, tales, quick()).data.heldout
    assert held is not None
    teacher: Any = load_causal_lm(DEMO)
    student: Any = PeftModel.from_pretrained(irq_convert.load(int2, dtype=torch.float32), str(out))
    student.eval()
    total = 0.0
    for example in held.examples:
        with torch.no_grad():
            one, other = (
                model(input_ids=example.ids[None]).logits[0, :-1].double().log_softmax(-1)
                for model in (teacher, student)
            )
        top = one.topk(TOP, 1).indices
        parts = [torch.cat([each.gather(1, top), each.scatter(1, top, -torch.inf)
                 .logsumexp(1, keepdim=True)], 1) for each in (one, other)]  # fmt: skip
        total += float((parts[0].exp() * (parts[0] - parts[1])).sum())
    tokens = sum(len(example.ids) - 1 for example in held.examples)
    assert report.after.mean == pytest.approx(total / tokens, rel=2e-3)
    assert sum(report.after.counts) == tokens


def test_it_is_called_kl_everywhere(run: tuple[Path, FinetuneReport]) -> None:
    out, report = run
    with (out / "loss.csv").open() as file:
        assert next(csv.reader(file))[:3] == ["step", "kl", "heldout_kl"]
    training = json.loads((out / "irq_adapter.json").read_text())["training"]
    assert training["losses"]["measure"] == "KL to model"
    assert training["recipe"]["teacher"] == "model"
    assert training["recipe"]["teacher_weight"] == 1.0
    assert str(DEMO) not in (out / "irq_adapter.json").read_text()
    assert report.to_dict()["losses"]["measure"] == "KL to model"


def test_the_card_of_the_adapter_calls_it_so(run: tuple[Path, FinetuneReport]) -> None:
    from irq_convert.jobs.push.card_body import _training
    from irq_convert.jobs.push.pushed_folder import open_pushed_folder

    (_, table, *_) = _training(open_pushed_folder(run[0]))
    assert "held-out KL to model before" in table
    assert "held-out loss" not in table


@pytest.mark.slow
def test_plain_lora_and_logits_that_are_there(
    int2: Path, tales: Path, logits: Path, run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(TeacherPass, "run", never_again)
    options = taught(AdapterKind.PLAIN, steps=3, teacher_logits=logits)
    report = finetune(int2, tales, tmp_path / "out", options)
    assert report.before == run[1].before
    assert report.after is not None
    assert report.after.mean < report.before.mean  # type: ignore[union-attr]


@pytest.mark.parametrize("weight", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_passes_divide_a_step_without_changing_it(
    int2: Path, logits: Path, run: Any, tales: Path, tmp_path: Path, weight: float
) -> None:
    """Rows of different lengths and parts learned: each mean is over the tokens of the step."""
    rows = [
        {"prompt": "The cat " * n, "completion": "sat on a mat. " * (9 - n)} for n in range(1, 9)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = []
    for micro in (1, 4):
        options = taught(
            micro_batch=micro, steps=2, dropout=0.0, holdout=0.0, teacher_weight=weight,
            max_grad_norm=0.0, rank=2,
        )  # fmt: skip
        out = tmp_path / f"out-{micro}"
        report = finetune(int2, tmp_path / "rows.json", out, options)
        found.append((weights(out), [point.loss for point in report.curve]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_weight_0_trains_on_labels_alone(int2: Path, tales: Path, tmp_path: Path) -> None:
    """By transformers' own loss, up to rounding."""
    settings: dict[str, Any] = {"steps": 2, "holdout": 0.0}
    mixed = finetune(int2, tales, tmp_path / "mixed", taught(teacher_weight=0.0, **settings))
    plain = finetune(int2, tales, tmp_path / "plain", quick(**settings))
    one, other = ([p.loss for p in r.curve if p.loss is not None] for r in (mixed, plain))
    assert one == pytest.approx(other, rel=1e-5)
    assert (mixed.recipe.measure, mixed.recipe.trained_on) == ("KL to model", "mixed loss")
    with (tmp_path / "mixed" / "loss.csv").open() as file:
        assert next(csv.reader(file))[:3] == ["step", "loss", "heldout_kl"]


@pytest.mark.slow
def test_what_is_not_nearer_is_not_kept(
    int2: Path, tales: Path, logits: Path, run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    options = taught(steps=2, learning_rate=3.0, eval_every=2, teacher_logits=logits)
    with pytest.raises(IrqError, match="no adapter is kept: KL to model on held-out") as raised:
        finetune(int2, tales, out, options)
    line = str(raised.value)
    assert type(raised.value) is IrqError
    assert "\n" not in line
    assert f"was {run[1].before.mean:.4f} nats" in line
    assert "lower --learning-rate (3) or --steps (2)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_its_logits_wait_in_the_state_for_the_next_try(
    int2: Path, tales: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    with pytest.raises(IrqError, match=f"no adapter is kept.*wait in .*{LOGITS} for the next run"):
        finetune(int2, tales, out, taught(steps=1, learning_rate=30.0, eval_every=1))
    assert [path.name for path in (out / STATE).iterdir()] == [LOGITS]
    assert [path.name for path in out.iterdir()] == [STATE]
    monkeypatch.setattr(TeacherPass, "run", never_again)
    report = finetune(int2, tales, out, taught(steps=2))
    assert report.end == "finished"
    assert not (out / STATE).exists()


@pytest.mark.slow
def test_those_of_other_data_are_made_again(int2: Path, tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / STATE).mkdir(parents=True)
    (out / STATE / LOGITS).write_bytes(b"of something else")
    listener = Listener()
    finetune(int2, tales, out, taught(steps=1, holdout=0.0), progress=listener)
    assert any("made again" in note for note in listener.notes)
    assert any("KL to model was not measured" in note for note in listener.notes)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_one_that_was_not(
    int2: Path, tales: Path, run: tuple[Path, FinetuneReport], tmp_path: Path, monkeypatch: Any
) -> None:
    """With the logits in its state, which the second process finds."""
    parts = tmp_path / "parts"
    stopped = finetune(int2, tales, parts, taught(steps=7), progress=stop_at(1))
    assert stopped.end == "interrupted"
    assert (parts / STATE / LOGITS).is_file()
    for changes, says in (
        ({"teacher_weight": 0.5}, r"--teacher-weight was 1.0 and is 0.5 now"),
        ({"teacher": None}, r"--teacher was 'model' and is None now"),
    ):
        with pytest.raises(UsageError, match=says):
            finetune(int2, tales, parts, dataclasses.replace(taught(steps=7), **changes))
    monkeypatch.setattr(TeacherPass, "run", never_again)
    resumed = finetune(int2, tales, parts, taught(steps=7), resume="required")
    assert resumed.resumed_from == 2
    out, report = run
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.csv"):
        assert (parts / name).read_bytes() == (out / name).read_bytes(), name
    assert resumed.after == report.after
    assert not (parts / STATE).exists()


@pytest.mark.slow
def test_an_adapter_of_an_interruption_goes_when_the_end_is_worse(
    int2: Path, tales: Path, logits: Path, run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = taught(steps=3, learning_rate=3.0, eval_every=3, teacher_logits=logits)
    finetune(int2, tales, out, options, progress=stop_at(1))
    assert (out / "adapter_config.json").is_file()
    with pytest.raises(IrqError, match="no adapter is kept"):
        finetune(int2, tales, out, options)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_an_older_adapter_stays_when_the_new_one_is_no_good(
    int2: Path, tales: Path, logits: Path, run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finetune(int2, tales, out, taught(steps=1, teacher_logits=logits))
    before = (out / "adapter_model.safetensors").read_bytes()
    options = taught(steps=2, learning_rate=3.0, eval_every=2, teacher_logits=logits)
    with pytest.raises(IrqError, match="no adapter is kept"):
        finetune(int2, tales, out, options, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert not (out / STATE).exists()


class Killed(BaseException):
    pass


def test_stopped_while_the_teacher_runs(
    int2: Path, tales: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nothing is left, not even of the file that was being written."""

    def stop(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TeacherPass, "_finish", stop)
        with pytest.raises(Killed):
            finetune(int2, tales, tmp_path / "out", taught(teacher_logits=tmp_path / "logits"))
    assert not list(tmp_path.iterdir())


def test_the_disk_is_asked_first(int2: Path, tales: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from irq_convert.checkpoint import disk

    monkeypatch.setattr(TeacherPass, "run", never_again)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(IrqError, match="not enough space to keep the teacher's logits and its"):
        finetune(int2, tales, tmp_path / "out", taught())
    assert not list(tmp_path.iterdir())


def test_a_class_that_turns_out_not_to_be_layered(
    int2: Path, tales: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def begin(*args: Any) -> None:
        raise NotLayered("it changes hidden states between two layers")

    monkeypatch.setattr(LayeredModel, "begin", begin)
    says = "LlamaForCausalLM cannot be run layer by layer: it changes .*leave out --teacher"
    with pytest.raises(UsageError, match=says):
        finetune(int2, tales, tmp_path / "out", taught())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    irq: Commands, int2: Path, tales: Path, tmp_path: Path
) -> None:
    common = (int2, "--data", tales, "--teacher", DEMO, "--teacher-logits", tmp_path / "logits")
    better = ("--learning-rate", 1e-3, "--steps", 3, "--out", tmp_path / "two", "--json")
    done = together(irq, *common, *better)
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    options = taught(batch_size=8, dropout=0.0, steps=3)
    alone = finetune(int2, tales, tmp_path / "one", options).to_dict()
    for name in ("heldout_before", "heldout_after"):
        values = [each["losses"][name]["value"] for each in (report, alone)]
        assert math.isclose(*values, rel_tol=1e-4), name
    found, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)
    worse = ("--learning-rate", 30, "--steps", 1, "--out", tmp_path / "worse")
    assert_fails(together(irq, *common, *worse), 1, "no adapter is kept")
    assert not (tmp_path / "worse" / "adapter_config.json").exists()
