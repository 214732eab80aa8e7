"""Files of a folder read at once, and changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHARD = "model.safetensors"


def listing(folder: Path) -> dict[str, object]:
    """Every path under `folder`: the content of a file, the target of a link, or "folder"."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def open_without_a_name(folder: Path) -> list[str]:
    """Files of `folder` that this process has open and that are removed: they still take room."""
    links = [
        path.readlink().as_posix() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
    ]
    return [link for link in links if link.startswith(str(folder)) and link.endswith(" (deleted)")]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of `folder`, as stored."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = SHARD
) -> None:
    """Rewrite a file of `folder`, by default its only shard, with `change` applied to its dict."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a JSON file with `change` applied to what it holds."""
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))


def change_config(folder: Path, change: Callable[[Any], object]) -> None:
    """Rewrite config.json of `folder` with `change` applied to its `quantization_config`."""
    change_json(folder / "config.json", lambda raw: change(raw["quantization_config"]))


def assert_one_line(message: str, *words: str) -> None:
    """Check that a message is one line and names every one of `words`."""
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
