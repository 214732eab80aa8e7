"""What an evaluation on tasks found: scores with standard errors, and how far two models differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from irq_convert.jobs.evaluate.report import finite_or_none

_CLOSE = 1e-9


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: its name; `group` where it stands for several.
        metric, filter: as lm-eval names them (`acc`, `none`).
        value, se: the score and its standard error; None where lm-eval gives none.
        higher_is_better: None where it does not say.
        documents: how many questions it is a score over.
        fewshot: solved examples before each.
        version: of the task, by its file.
        reference, reference_se: the same of the model that is compared with; None without one.
        difference_se: standard error of `value - reference`. Questions are the same for both, so
            it is taken over the differences of each, and far smaller than that of either score.
            None where the score is no mean over questions.
    """

    task: str
    group: bool
    metric: str
    filter: str
    value: float
    se: float | None
    higher_is_better: bool | None
    documents: int
    fewshot: int | None
    version: str
    reference: float | None = None
    reference_se: float | None = None
    difference_se: float | None = None

    @property
    def difference(self) -> float | None:
        """How much higher than the reference's."""
        return None if self.reference is None else self.value - self.reference

    def to_dict(self) -> dict[str, Any]:
        """For JSON, no number as None; what belongs to a comparison only where there is one."""
        fields = asdict(self) | {"difference": self.difference}
        alone = self.reference is None
        shown = {k: v for k, v in fields.items() if not (alone and k in _COMPARED)}
        return {k: finite_or_none(v) if isinstance(v, float) else v for k, v in shown.items()}


_COMPARED = ("reference", "reference_se", "difference", "difference_se")


@dataclass(frozen=True)
class TaskReport:
    """All scores. `shown` are those of tasks that are in no group, and of groups; `lm_eval` is the
    version of the harness; `kept` the file beside the artifact, None where there is none."""

    scores: tuple[TaskScore, ...]
    shown: tuple[TaskScore, ...]
    lm_eval: str
    kept: str | None = None

    @property
    def compared(self) -> bool:
        """Whether there was a reference."""
        return any(score.reference is not None for score in self.scores)

    def to_dict(self) -> dict[str, Any]:
        """All fields but `shown`, for JSON."""
        rows = [score.to_dict() for score in self.scores]
        return {"lm_eval": self.lm_eval, "kept": self.kept, "scores": rows}


@dataclass(frozen=True)
class Found:
    """What lm-eval returned for one model, and which groups hold which tasks."""

    results: Mapping[str, Any]

    def scores(self) -> list[TaskScore]:
        """Every number of every task and group, in the order of lm-eval."""
        rows = []
        for name, values in self.results["results"].items():
            rows += [self._score(name, values, key) for key in values if _is_score(key, values)]
        return rows

    def _score(self, name: str, values: Mapping[str, Any], key: str) -> TaskScore:
        metric, _, kind = key.partition(",")
        se = values.get(f"{metric}_stderr,{kind}")
        shots = self.results["n-shot"].get(name)
        return TaskScore(
            task=name,
            group=bool(self.leaves(name)),
            metric=metric,
            filter=kind,
            value=float(values[key]),
            se=float(se) if se is not None and _is_number(se) else None,
            higher_is_better=self.results["higher_is_better"].get(name, {}).get(metric),
            documents=int(values.get("sample_len") or 0),
            fewshot=shots if isinstance(shots, int) else None,
            version=str(self.results["versions"].get(name, "")),
        )

    def leaves(self, name: str) -> list[str]:
        """The tasks below a group; none for a task."""
        inner = self.results["group_subtasks"].get(name) or ()
        return [leaf for each in inner for leaf in (self.leaves(each) or [each])]

    def by_document(self, score: TaskScore) -> dict[Any, float] | None:
        """A task's metric for each document, where its score is their mean; else None."""
        found: dict[Any, float] = {}
        for sample in self.results["samples"].get(score.task, ()):
            value = sample.get(score.metric)
            if sample.get("filter") == score.filter and isinstance(value, int | float | np.number):
                found[sample["doc_id"]] = float(value)
        mean = sum(found.values()) / len(found) if found else math.nan
        return found if abs(mean - score.value) < _CLOSE else None


def compare(found: Found, other: Found) -> list[TaskScore]:
    """Scores of `found` with those of `other` as the reference, over the same documents."""
    rows = found.scores()
    theirs = {_name(row): row for row in other.scores()}
    single: dict[tuple[str, ...], TaskScore] = {}
    for row in rows:
        ref = theirs.get(_name(row))
        if ref is not None:
            spread = None if row.group else _paired_se(found, other, row, ref)
            single[_name(row)] = replace(
                row, reference=ref.value, reference_se=ref.se, difference_se=spread
            )
    return [_with_group(found, single.get(_name(row), row), single) for row in rows]


def shown_scores(found: Found, rows: Sequence[TaskScore]) -> tuple[TaskScore, ...]:
    """Groups that have a score, and tasks that are in none of these."""
    inside = {leaf for row in rows if row.group for leaf in found.leaves(row.task)}
    return tuple(row for row in rows if row.group or row.task not in inside)


def _paired_se(found: Found, other: Found, row: TaskScore, ref: TaskScore) -> float | None:
    ours, theirs = found.by_document(row), other.by_document(ref)
    if ours is None or theirs is None or ours.keys() != theirs.keys() or len(ours) < 2:
        return None
    differences = np.array([ours[key] - theirs[key] for key in ours])
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _with_group(
    found: Found, row: TaskScore, single: Mapping[tuple[str, ...], TaskScore]
) -> TaskScore:
    """A group's error of the difference, from those of its tasks, which are independent."""
    if not row.group or row.reference is None:
        return row
    leaves = [single.get((leaf, row.metric, row.filter)) for leaf in found.leaves(row.task)]
    tasks = [leaf for leaf in leaves if leaf is not None]
    errors = [leaf.difference_se for leaf in tasks if leaf.difference_se is not None]
    weights = _weights(tasks, row.value)
    if not tasks or len(errors) != len(tasks) or weights is None:
        return row
    pairs = zip(weights, errors, strict=True)
    return replace(row, difference_se=math.sqrt(sum((w * se) ** 2 for w, se in pairs)))


def _weights(tasks: Sequence[TaskScore], value: float) -> list[float] | None:
    """By size or all alike: whichever makes the group's score of those of its tasks."""
    total = sum(task.documents for task in tasks)
    if not total:
        return None
    for weights in ([task.documents / total for task in tasks], [1 / len(tasks)] * len(tasks)):
        made = sum(w * task.value for w, task in zip(weights, tasks, strict=True))
        if abs(made - value) < _CLOSE:
            return weights
    return None


def _name(row: TaskScore) -> tuple[str, ...]:
    return row.task, row.metric, row.filter


def _is_score(key: str, values: Mapping[str, Any]) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr") and _is_number(values[key])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
