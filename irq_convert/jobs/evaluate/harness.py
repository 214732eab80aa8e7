"""lm-evaluation-harness: its tasks, and a loaded model as it wants one.

All of it that is not documented and used here: that `TaskManager` tells where a task's file lies,
that a loader of its YAML can be called, and where it draws bars. pyproject pins the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.jobs.evaluate.task_options import TaskOptions

OFFLINE = (
    "where there is no network, copy the cache (HF_HOME) from where there is one, or give task "
    "files with local data by --task-path"
)
_OF_NETWORK = (
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "DataFilesNotFoundError",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
    "GatedRepoError",
    "RepositoryNotFoundError",
    "ProxyError",
)


def harness_version() -> str:
    """Of the installed lm-eval. Raises `UsageError`, naming the extra, where there is none."""
    try:
        found = version("lm-eval") if find_spec("lm_eval") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which is not installed: pip install "
            "'irq-convert[tasks]'"
        )
    return found


class Tasks:
    """The tasks that are known: those of lm-eval, and before them those of one's own folders."""

    def __init__(self, names: Sequence[str], options: TaskOptions) -> None:
        """Find `names`, which may be patterns (`mmlu_*`) or YAML files.

        Raises `UsageError` for one that there is not, naming those that are spelt alike, and for
        a folder or a file of one's own that holds no task.
        """
        from lm_eval.tasks import TaskManager

        self._paths = [path.resolve() for path in options.task_paths]
        for path in self._paths:
            _check_own_files(path)
        self._manager = TaskManager(include_path=self._paths, include_defaults=False)
        missing = [name for name in names if not self._has(name)]
        stored = StoredTasks() if missing else None
        if stored is not None:
            folders = [*stored.folders_of(missing), *self._paths]
            self._manager = TaskManager(include_path=folders, include_defaults=False)
        self.names = [known for name in names for known in self._known(name, stored)]
        if not self.names:
            raise UsageError("--tasks: name at least one")

    def load(self) -> list[Any]:
        """The tasks and groups, with their data, as lm-eval has them.

        Raises `IrqError` naming the task whose data cannot be downloaded or read, and the way out;
        `UsageError` for one that was named twice, by itself or by its groups.
        """
        built: list[Any] = []
        inside: dict[str, str] = {}
        for name in self.names:
            with _one_line_errors(name):
                found = self._load(name)
            for task in found["tasks"]:
                if task in inside:
                    raise UsageError(
                        f"--tasks: {inside[task]} and {name} both ask for {task}: name it once"
                    )
                inside[task] = name
            groups = found.get("groups") or {}
            inner = {child for group in groups.values() for child in group.child_names}
            tops = [group for key, group in groups.items() if key not in inner]
            built += tops or found["tasks"].values()
        return built

    @property
    def manager(self) -> Any:
        """lm-eval's own index."""
        return self._manager

    def _load(self, name: str) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._manager.load([name])
        except KeyError:  # a group with tasks of other folders
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(include_path=self._paths)
            found = self._manager.load([name])
        except FileNotFoundError:
            # Data are named from where the program runs, or from where the task's file lies.
            entry = self._manager.task_index.get(name)
            file = Path(name) if entry is None else entry.yaml_path
            if file is None or not file.is_file():
                raise
            with chdir(file.resolve().parent):
                found = self._manager.load([file.name if entry is None else name])
        return found

    def _has(self, name: str) -> bool:
        return bool(self._manager.match_tasks([name])) or _is_file(name)

    def _known(self, name: str, stored: StoredTasks | None) -> list[str]:
        if _is_file(name):
            return [name]
        found: list[str] = self._manager.match_tasks([name])
        if found:
            return sorted(found)
        every = {*self._manager.all_tasks, *(stored.names() if stored else ())}
        alike = get_close_matches(name, sorted(every), n=4, cutoff=0.6)
        say = f"; there are {', '.join(alike)}" if alike else "; `lm-eval ls tasks` lists all"
        raise UsageError(f"--tasks {name}: there is no such task{say}")


class StoredTasks:
    """The task files that come with lm-eval, as text: parsing all 14,000 takes fifteen seconds."""

    def __init__(self) -> None:
        import lm_eval.tasks

        self._root = Path(lm_eval.tasks.__file__).parent
        files = sorted(self._root.rglob("*.yaml"))
        self._texts = {path: path.read_text("utf-8", "replace") for path in files}

    def folders_of(self, names: Sequence[str]) -> list[Path]:
        """Folders below the root in which a file has one of `names`, or how a pattern begins.

        Where two have a task of one name lm-eval takes the first, and of several folders the last:
        so they are in reverse.
        """
        words = [re.split(r"[*?\[]", name)[0] for name in names]
        found = {
            self._root / path.relative_to(self._root).parts[0]
            for path, text in self._texts.items()
            if any(word in text for word in words)
        }
        return sorted((path for path in found if path.is_dir()), reverse=True)

    def names(self) -> set[str]:
        """Of tasks and groups."""
        return {name for text in self._texts.values() for name in _NAMED.findall(text)}


_NAMED = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w.:-]+)", re.MULTILINE)


def _check_own_files(folder: Path) -> None:
    """lm-eval leaves out a file that it cannot read, and says so to nobody."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UsageError(f"--task-path {folder}: holds no task file (*.yaml)")
    for path in files:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of YAML, and whatever a loader makes of it
            raise UsageError(f"{path}: not a task file: {one_line(error)}") from error


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a dataset, its Hub or a task's own code raises
        kinds = {kind.__name__ for kind in type(error).__mro__}
        line = one_line(error)
        if kinds & {*_OF_NETWORK}:
            raise IrqError(f"{name}: its data cannot be downloaded: {line}; {OFFLINE}") from error
        if isinstance(error, OSError):
            raise IrqError(f"{name}: its data cannot be read: {line}") from error
        kind = type(error).__name__
        raise IrqError(f"{name}: the task cannot be set up: {kind}: {line}") from error


def answer(lm: Any, built: Sequence[Any], manager: Any, options: TaskOptions) -> dict[str, Any]:
    """What `lm` answers to tasks that are loaded, and the scores of that.

    As `lm_eval.simple_evaluate` with its seeds and its rules for examples, but for its report on
    this machine, for which it runs programs that take longer than a small task.
    """
    import random

    import numpy as np
    import torch
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load(list(built))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if options.fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=options.fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results: dict[str, Any] = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=options.limit,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
    )
    return results


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of lm-eval and datasets; what goes on is told by progress of ours."""
    import datasets  # type: ignore[import-untyped]
    import lm_eval.api.task as module

    bars, drawn = module.tqdm, datasets.is_progress_bar_enabled()
    module.tqdm = partial(bars, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        module.tqdm = bars
        if drawn:
            datasets.enable_progress_bars()
