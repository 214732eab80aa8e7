"""The walls: every import against the table in docs/architecture.md, and no circles of files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "irq_convert"
FREE = {"errors", "version", "progress", "remote_code"}
SHARED = {"jobs/common", "jobs/calibration", "jobs/sizing"}
"""Under `jobs/`, and no jobs."""
"""Files at the top that everybody may import."""
_ROW = re.compile(r"^\| `([a-z/]+)` \| .* \| ([a-z/, ]*)\|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """What each room may import, by the page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page[page.index("## Rooms and walls") : page.index("## Doors")]
    return {
        room: {name.strip() for name in allowed.split(",") if name.strip()}
        for room, allowed in _ROW.findall(rows)
    }


def modules(root: Path) -> dict[str, Path]:
    """Every module below `root`, by its dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also by a string it hands over."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [each if each in known else base for each in targets]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            targets = [node.value] if "." in node.value else []
        yield from (each for each in targets if each in known and each != name)


def room(module: str) -> str:
    """The room that a module is in; files at the top are rooms of their own name."""
    parts = module.split(".")[1:]
    if not parts:
        return "face"
    if parts[0] == "jobs":
        return "/".join(parts[:2])
    return "cli" if parts[0] == "__main__" else parts[0]


def broken_walls(root: Path, allowed: dict[str, set[str]]) -> list[str]:
    """One line for each import that the table does not allow."""
    known, found = modules(root), []
    for name, path in known.items():
        for target in imports(name, path, known):
            here, there = room(name), room(target)
            if here != there and there not in FREE and there not in allowed.get(here, set()):
                found.append(f"{here} imports {there}: {name} imports {target}")
    return found


def circles(root: Path) -> list[list[str]]:
    """Files that import each other, in rings: strongly connected parts of the graph (Tarjan)."""
    known = modules(root)
    graph = {name: list(imports(name, path, known)) for name, path in known.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    waiting: list[str] = []
    rings: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        waiting.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in waiting:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            at = waiting.index(name)
            ring, waiting[at:] = waiting[at:], []
            if ring[1:]:
                rings.append(sorted(ring))

    for name in graph:
        if name not in index:
            visit(name)
    return rings


def test_the_table_names_every_room() -> None:
    rooms = {room(name) for name in modules(ROOT)} - FREE - {"jobs"}
    assert rooms == set(table())


def test_walls_hold() -> None:
    assert not broken_walls(ROOT, table())


def test_no_circles() -> None:
    assert not circles(ROOT)


def test_jobs_are_no_libraries_for_each_other() -> None:
    """Whatever the page says: only the three that are no jobs and, for the demo, all."""
    for name, allowed in table().items():
        if name.startswith("jobs/") and name != "jobs/demo":
            assert {each for each in allowed if each.startswith("jobs/")} <= SHARED


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("core/blocks.py", "from irq_convert.checkpoint.header import TensorInfo", "checkpoint"),
        ("jobs/export/mlx.py", "from irq_convert.jobs.merge.plan import MergePlan", "jobs/merge"),
        ("checkpoint/cast.py", "import_module('irq_convert.artifact.config')", "artifact"),
    ],
)
def test_a_broken_wall_is_seen(tmp_path: Path, file: str, line: str, says: str) -> None:
    write_package(tmp_path, {file: line, "jobs/merge/plan.py": "", "artifact/config.py": "",
                             "checkpoint/header.py": ""})  # fmt: skip
    (found,) = broken_walls(tmp_path, table())
    assert f"imports {says}" in found


def test_a_circle_is_seen(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            "core/one.py": "from irq_convert.core import two",
            "core/two.py": "def late():\n    from irq_convert.core.three import x",
            "core/three.py": "import irq_convert.core.one",
        },
    )
    assert circles(tmp_path) == [[f"irq_convert.core.{name}" for name in ("one", "three", "two")]]


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
