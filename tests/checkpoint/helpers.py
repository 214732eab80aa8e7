"""What several tests share: safetensors files made by the reference library, or byte by byte."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors-like file by hand; `header` is JSON text, bytes or an object."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def make_checkpoint(folder: Path, shards: int = 1, extra: Mapping[str, str] | None = None) -> Path:
    """Make a small checkpoint of three tensors a shard, with an index when there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        name = "model.safetensors" if shards == 1 else name
        tensors = {
            f"layer.{number}.{key}": np.arange(size, dtype=dtype).reshape(shape)
            for key, size, shape, dtype in (
                ("a", 12, (3, 4), np.float32),
                ("b", 6, (6,), np.float16),
                ("c", 5, (5, 1), np.uint8),
            )
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if shards > 1:
        index = {"metadata": {"total_size": 65 * shards}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, text in (extra or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run_python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter with `env` added to the environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file under `folder` with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
