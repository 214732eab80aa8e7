"""The plan of the house in numbers: files, lines, functions, walls, words with two meanings.

    python tests/bench/house.py [ROOT ...]

counts the package in each ROOT (a clone of this repository, by default this one) and prints them
side by side, so that a change of the plan can be seen: `git worktree add OLD REV` makes another. A
word with two meanings is a public class or function whose name stands in more than one room.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.test_rooms import circles, imports, modules, room

SHARDS = re.compile(r"\bplan_shards\(")
"""Whoever cuts tensors into shards plans a folder to be written."""


def definitions(root: Path) -> Iterator[tuple[str, str, ast.AST]]:
    """Public classes and functions at the top of files: module, name, node."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    for module, path in modules(root).items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                yield module, node.name, node


def functions(root: Path) -> list[tuple[int, str]]:
    """Length in lines of every function, the longest first."""
    found = []
    for module, path in modules(root).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                found.append((length, f"{module}.{node.name}"))
    return sorted(found, reverse=True)


def several(root: Path) -> dict[str, list[str]]:
    """Names of classes and functions that stand in more than one room, with the modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, name, _ in definitions(root):
        homes[name].append(module)
    return {n: m for n, m in homes.items() if len({room(each) for each in m}) > 1}


def figures(root: Path) -> dict[str, object]:
    known = modules(root)
    texts = {name: path.read_text() for name, path in known.items()}
    lengths = functions(root)
    pairs = Counter(
        (room(name), room(target))
        for name, path in known.items()
        for target in imports(name, path, known)
        if room(name) != room(target)
    )
    files = Counter(path.name for path in known.values())
    jobs = ("convert", "finetune", "merge", "export", "evaluate", "hub")
    siblings = sum(n for (a, b), n in pairs.items() if _job(a, jobs) and _job(b, jobs))
    return {
        "files": len(known),
        "lines": sum(text.count("\n") for text in texts.values()),
        "longest file": max(text.count("\n") for text in texts.values()),
        "longest function": lengths[0][0],
        "functions over 50 lines": sum(length > 50 for length, _ in lengths),
        "rooms": len({room(name) for name in known}),
        "imports that cross rooms": sum(pairs.values()),
        "pairs of rooms": len(pairs),
        "imports from one job to another": siblings,
        "circles of files": len(circles(root)),
        "files that plan a folder of shards": sum(
            bool(SHARDS.search(text))
            for name, text in texts.items()
            if "def plan_shards" not in text
        ),
        "files called run.py": files["run.py"],
        "classes and functions in several rooms": len(several(root)),
    }


def _job(name: str, old: tuple[str, ...]) -> bool:
    """A job by today's folders or by those before; not what jobs share, nor the demo."""
    new = name.startswith("jobs/") and name not in ("jobs/common", "jobs/demo")
    return new or name in old


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("roots", nargs="*", type=Path, default=[Path(__file__).parents[2]])
    parser.add_argument("--words", action="store_true", help="list the words with two meanings")
    options = parser.parse_args()
    columns = [figures(root) for root in options.roots]
    for name in columns[0]:
        print(f"{name:40}" + "".join(f"{column[name]!s:>10}" for column in columns))
    if options.words:
        for root in options.roots:
            print(f"\n{root}")
            for name, homes in sorted(several(root).items()):
                print(
                    f"  {name:24} {', '.join(home.removeprefix('irq_convert.') for home in homes)}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
