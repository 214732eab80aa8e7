"""Two small tasks about stories, with their data, and a group of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {name}.jsonl
    examples: {name}.jsonl
test_split: test
fewshot_split: examples
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: homes.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{endings[label]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
metadata:
  version: 1
"""
GROUP = """group: tales
task:
  - endings
  - homes
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 3
"""
ENDINGS = [
    ("Once upon a", ["time", "stone", "door"], 0),
    ("The cat was very", ["seven", "happy", "under"], 1),
    ("She wanted to play with her", ["of", "friends", "quickly"], 1),
    ("They lived", ["spoon", "happily", "blue"], 1),
    ("One day, a little", ["girl", "the", "ran"], 0),
    ("He was sad and began to", ["cry", "moon", "red"], 0),
    ("The dog ran to the", ["went", "park", "said"], 1),
]
HOMES = [
    ("The fish lives in the", ["water", "sky"], 0),
    ("The bird sits in the", ["tree", "spoon"], 0),
    ("At night she sleeps in her", ["soup", "bed"], 1),
    ("The fox hid in the", ["wood", "song"], 0),
]


def write_tasks(folder: Path) -> Path:
    """Files of the tasks `endings` and `homes`, of their group `tales`, and of `written`."""
    folder.mkdir()
    for name, rows in (("endings", ENDINGS), ("homes", HOMES)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, cache=folder / "cache"))
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "tales.yaml").write_text(GROUP)
    (folder / "written.yaml").write_text(WRITTEN.format(cache=folder / "cache"))
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    keys = ("start", "endings", "label")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
