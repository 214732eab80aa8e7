"""Scores on tasks through lm-eval: against plain sums of log-likelihoods, in pairs, kept, shown."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import irq_convert
from irq_convert.cli.main import app
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.evaluate import harness, tasks
from irq_convert.jobs.evaluate.task_options import TaskOptions
from irq_convert.jobs.evaluate.task_report import Found, TaskReport, compare
from irq_convert.jobs.evaluate.tasks import evaluate_tasks
from irq_convert.jobs.push.push import push
from irq_convert.progress import Progress
from tests.folders import assert_one_line
from tests.jobs.generate.test_generate import with_more_words
from tests.paths import DEMO

from .own_tasks import ENDINGS, HOMES, write_rows, write_tasks

pytest.importorskip("lm_eval", reason="needs the extra `tasks`: lm-eval is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture(scope="module")
def artifact(demo_nf3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since scores are kept beside it."""
    return Path(shutil.copytree(demo_nf3, tmp_path_factory.mktemp("scored") / "demo-nf3"))


@pytest.fixture(scope="module")
def report(artifact: Path, folder: Path) -> TaskReport:
    return evaluate_tasks(artifact, "tales", against=DEMO, task_paths=(folder,), batch_size=4)


def right(model: Any, rows: Sequence[Any]) -> list[float]:
    """1 for each question whose right ending is the likeliest, else 0."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = []
    for start, endings, label in rows:
        sums = []
        for ending in endings:
            before = len(tokenizer(start)["input_ids"])
            ids = torch.tensor([tokenizer(f"{start} {ending}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            picked = logs[torch.arange(before - 1, ids.shape[1] - 1), ids[0, before:]]
            sums.append(float(picked.sum()))
        found.append(float(sums.index(max(sums)) == label))
    return found


def test_scores_are_those_of_the_log_likelihoods(report: TaskReport, artifact: Path) -> None:
    ours = irq_convert.load(artifact, dtype="float32")
    source = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    by_name = {(score.task, score.metric): score for score in report.scores}
    everything: list[float] = []
    for name, rows in (("endings", ENDINGS), ("homes", HOMES)):
        mine, theirs = torch.tensor(right(ours, rows)), torch.tensor(right(source, rows))
        score = by_name[name, "acc"]
        assert score.value == pytest.approx(float(mine.mean()))
        assert score.reference == pytest.approx(float(theirs.mean()))
        assert score.se == pytest.approx(float(mine.std()) / math.sqrt(len(rows)))
        spread = float((mine - theirs).std()) / math.sqrt(len(rows))
        assert score.difference_se == pytest.approx(spread)
        assert (score.documents, score.fewshot, score.version) == (len(rows), 0, "1")
        everything += mine.tolist()
    group = by_name["tales", "acc"]
    assert group.group
    assert group.value == pytest.approx(sum(everything) / len(everything))
    weights = [len(ENDINGS) / len(everything), len(HOMES) / len(everything)]
    parts = [by_name[name, "acc"].difference_se or 0 for name in ("endings", "homes")]
    sizes = zip(weights, parts, strict=True)
    assert group.difference_se == pytest.approx(math.hypot(*(w * se for w, se in sizes)))
    assert [score.task for score in report.shown] == ["tales"]
    assert {score.metric for score in report.scores} == {"acc", "acc_norm"}


def test_a_mean_of_groups_that_is_not_by_size() -> None:
    def found(values: dict[str, list[float]]) -> Found:
        means = {name: sum(v) / len(v) for name, v in values.items()}
        samples = {
            name: [{"doc_id": i, "filter": "none", "acc": x} for i, x in enumerate(v)]
            for name, v in values.items()
        }
        both = {"acc,none": sum(means.values()) / 2, "acc_stderr,none": "N/A", "sample_len": 5}
        rows = {k: {"acc,none": m, "sample_len": len(values[k])} for k, m in means.items()}
        return Found(
            {
                "results": {"both": both, **rows},
                "group_subtasks": {"both": ["a", "b"]},
                "samples": samples,
                "n-shot": {},
                "higher_is_better": {"a": {"acc": True}},
                "versions": {},
            }
        )

    one = found({"a": [1.0, 0.0, 1.0], "b": [1.0, 1.0]})
    other = found({"a": [0.0, 0.0, 1.0], "b": [0.0, 1.0]})
    group, a, b = compare(one, other)
    assert group.se is None
    assert (a.higher_is_better, b.higher_is_better) == (True, None)
    assert group.difference == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert a.difference_se is not None
    assert b.difference_se is not None
    assert group.difference_se == pytest.approx(math.hypot(a.difference_se, b.difference_se) / 2)


def test_examples_adapters_and_progress(artifact: Path, folder: Path, tmp_path: Path) -> None:
    from irq_convert.artifact.adapter_kinds import AdapterKind
    from tests.jobs.generate.test_generate import make_adapter

    class Seen(Progress):
        said: list[str]
        counted = 0

        def note(self, text: str) -> None:
            self.said.append(text)

        def phase(self, text: str, things: int, size: int) -> None:
            self.counted -= things

        def advance(self, size: int, finished: int) -> None:
            self.counted += finished

    seen = Seen()
    seen.said = []
    adapter = make_adapter(artifact, AdapterKind.IEC, tmp_path / "adapter")
    how = {"task_paths": (folder,), "fewshot": 2, "limit": 3}
    found = evaluate_tasks(artifact, ["endings"], adapter=adapter, context=16, progress=seen, **how)
    assert all(score.fewshot == 2 and score.documents == 3 for score in found.scores)
    assert seen.counted == 0
    assert any("longer than 16 tokens and lose their beginning" in line for line in seen.said)
    assert found.kept == str(adapter / "irq_scores.json")
    (acc, _) = json.loads((adapter / "irq_scores.json").read_text())["scores"]
    assert (acc["limit"], acc["fewshot"], acc["in_group"]) == (3, 2, False)


def test_scores_are_kept_and_shown_in_the_card(
    report: TaskReport, artifact: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert report.kept == str(artifact / "irq_scores.json")
    assert irq_convert.verify(artifact).ok
    pushed = push(artifact, "org/model", dry_run=True)
    assert "irq_scores.json" in pushed.uploaded
    part = pushed.card.split("## Scores")[1].split("## Files")[0]
    score = report.shown[0]
    assert f"| tales | 0 | acc | {score.value:.4f} ± {score.se:.4f} | " in part
    assert f"| {score.difference:+.4f} ± {score.difference_se:.4f} |" in part
    assert "the reference is `model`" in part
    assert "endings" not in part  # of the group, and in the file
    again = evaluate_tasks(artifact, "homes", task_paths=(folder,))
    rows = json.loads(Path(again.kept or "").read_text())["scores"]
    names = [(row["task"], row["metric"]) for row in rows]
    assert len(names) == len({*names}) == 5
    assert next(row for row in rows if row["task"] == "homes")["against"] is None
    # Other weights have other scores.
    kept = json.loads((artifact / "irq_scores.json").read_text())
    other = artifact.with_name("other")
    shutil.copytree(artifact, other)
    (other / "irq_scores.json").write_text(json.dumps(kept | {"sha256": "0" * 64}))
    pushed = push(other, "org/model", dry_run=True)
    assert "irq_scores.json" not in pushed.uploaded
    assert "## Scores" not in pushed.card
    irq_convert.export(artifact, artifact.with_name("dense"), to="dense")
    assert not (artifact.with_name("dense") / "irq_scores.json").exists()
    before = (DEMO / "irq_scores.json").exists()
    assert evaluate_tasks(DEMO, "homes", task_paths=(folder,), limit=1).kept is None
    assert not before


def test_what_is_no_number_is_not_kept(
    report: TaskReport, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = replace(report.scores[0], value=math.nan, se=math.inf)
    assert (score.to_dict()["value"], score.to_dict()["se"]) == (None, None)
    said: list[str] = []
    progress = Progress()
    progress.note = said.append  # type: ignore[method-assign]
    broken = replace(report, scores=(score, *report.scores[1:]))
    model: Any = SimpleNamespace(source=str(artifact), adapter=None)
    kept = tasks._kept(broken, model, None, TaskOptions(), progress)
    rows = json.loads(Path(kept.kept or "").read_text())["scores"]
    assert {row["metric"] for row in rows}
    assert said == [f"1 of {len(report.scores)} scores are no finite numbers: not kept"]


def refused(kind: type[Exception], task: str, *paths: Path, **how: Any) -> str:
    with pytest.raises(kind) as caught:
        evaluate_tasks(DEMO, task, task_paths=paths, keep=False, **how)
    return str(caught.value)


def test_names_that_there_are_not(folder: Path, tmp_path: Path) -> None:
    assert_one_line(
        refused(UsageError, "endigns", folder), "--tasks endigns: there is no such task", "endings"
    )
    (tmp_path / "empty").mkdir()
    assert_one_line(refused(UsageError, "endigns", tmp_path / "empty"), "holds no task file")
    broken = write_tasks(tmp_path / "broken")
    (broken / "endings.yaml").write_text("task: [endings\n")
    assert_one_line(refused(UsageError, "endings", broken), "endings.yaml: not a task file")
    assert_one_line(refused(UsageError, "piqa", tmp_path / "none"), "--task-path", "no such folder")


def test_data_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = write_tasks(tmp_path / "lost")
    (lost / "homes.jsonl").unlink()
    assert_one_line(refused(IrqError, "homes", lost), "homes: its data cannot be read")
    task = (lost / "homes.yaml").read_text()
    away = task[: task.index("dataset_path")] + "dataset_path: org/nowhere\n"
    (lost / "homes.yaml").write_text(away + task[task.index("test_split") :])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says = refused(IrqError, "homes", lost)
    assert_one_line(says, "homes: its data cannot be downloaded", "org/nowhere", "--task-path")
    write_rows(lost / "endings.jsonl", [("Once", ["a"], 7)])
    assert_one_line(refused(IrqError, "endings", lost), "cannot be")


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert_one_line(refused(UsageError, "endings", folder), "irq-convert[tasks]")


def test_what_is_written_has_room(folder: Path, tmp_path: Path) -> None:
    """And a request that is cut for it is told of."""
    said: list[str] = []

    class Notes(Progress):
        def note(self, text: str) -> None:
            said.append(text)

    how: dict[str, Any] = {"task_paths": (folder,), "limit": 2, "keep": False}
    found = evaluate_tasks(DEMO, "written", context=12, progress=Notes(), **how)
    assert [score.metric for score in found.scores] == ["exact_match"]
    assert any("longer than 4 tokens and lose their beginning" in line for line in said)
    says = refused(UsageError, "written", folder, context=8)
    assert_one_line(says, "an answer may take 8 tokens", "raise --context")


def test_a_task_in_two_of_those_asked_for(folder: Path) -> None:
    with pytest.raises(UsageError, match="tales and endings both ask for endings: name it once"):
        evaluate_tasks(DEMO, ["tales", "endings"], task_paths=(folder,))


def test_a_context_beyond_the_positions(folder: Path) -> None:
    says = refused(UsageError, "homes", folder, context=100_000)
    assert_one_line(says, "--context 100000 is longer than the model's context of 256 tokens")


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = with_more_words(tmp_path / "other")
    for task in ("homes", "written"):
        says = refused(UsageError, task, folder, tokenizer=other)
        assert_one_line(says, "the tokenizer belongs to another model")


def test_no_chat_template(folder: Path) -> None:
    assert_one_line(refused(UsageError, "endings", folder, chat=True), "has no chat template")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fewshot": -1}, "--fewshot -1"),
        ({"limit": 0}, "--limit 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"context": 1}, "--context 1"),
    ],
)
def test_options_that_mean_nothing(settings: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TaskOptions(**settings)  # type: ignore[arg-type]


def test_the_command(artifact: Path, folder: Path) -> None:
    words = ["eval", str(artifact), "--tasks", "tales", "--task-path", str(folder)]
    args = [*words, "--against", str(DEMO), "--no-keep", "--limit", "2"]
    result = CliRunner().invoke(app, args, catch_exceptions=False, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines[3:])) <= 80
    (row,) = (line.split() for line in lines if line.strip().startswith("tales"))
    assert row[:3] == ["tales", "0", "acc"]
    assert row.count("±") == 3
    found = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert [score["task"] for score in found["scores"]].count("endings") == 2
    assert found["kept"] is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give either --text FILE or --tasks"),
        (["--text", "a.txt", "--tasks", "piqa"], "give either --text FILE or --tasks"),
        (["--text", "a.txt", "--fewshot", "5"], "--fewshot: belongs to --tasks"),
        (["--tasks", "piqa", "--max-tokens", "5"], "--max-tokens: belongs to --text"),
    ],
)
def test_text_or_tasks(args: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(DEMO), *args])
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)


ALONE = """
import json, sys
import peft  # the first of all, so that it is on its way when torch calls us
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, adapter, tasks = sys.argv[1:]
found = []
for more in ("", f",peft={adapter}"):
    loaded = TaskManager(include_path=tasks, include_defaults=False).load(["tales"])
    given = f"pretrained={model},dtype=float32,device=cpu,batch_size=4{more}"
    lm = HFLM.create_from_arg_string(given)
    if not more:
        assert type(lm.model.model.layers[0].mlp.up_proj).__name__ == "IrqLinear"
    found.append(evaluate(lm, loaded, log_samples=False)["results"])
assert "IEC_LORA" in peft.PEFT_TYPE_TO_CONFIG_MAPPING
print(json.dumps(found))
"""


@pytest.mark.slow
def test_lm_eval_alone_gives_the_same(
    report: TaskReport, artifact: Path, folder: Path, tmp_path: Path
) -> None:
    """Its `hf` model in a program that imports nothing of ours: torch's entry point does."""
    from irq_convert.artifact.adapter_kinds import AdapterKind
    from tests.jobs.generate.test_generate import make_adapter

    adapter = make_adapter(artifact, AdapterKind.IEC, tmp_path / "adapter")
    how = {"task_paths": (folder,), "batch_size": 4}
    adapted = evaluate_tasks(artifact, "tales", adapter=adapter, **how)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(artifact), str(adapter), str(folder)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in zip((report, adapted), found, strict=True):
        for score in ours.scores:
            own = theirs[score.task][f"{score.metric},{score.filter}"]
            assert own == pytest.approx(score.value)
    assert found[0] != found[1]
