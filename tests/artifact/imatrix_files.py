"""Files of llama.cpp's imatrix written by hand, in both forms."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_list(
    path: Path,
    means: Mapping[str, np.ndarray],
    calls: int = 7,
    dataset: str | None = "/home/me/wiki.txt",
) -> Path:
    """The older form of `means`, `[matrices, cols]` by llama.cpp's name, as it scales them."""
    parts = [struct.pack("<i", len(means))]
    for name, values in means.items():
        flat = np.asarray(values, np.float64).reshape(-1)
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, flat.size)]
        parts.append((flat * calls).astype("<f4").tobytes())
    if dataset is not None:
        parts += [struct.pack("<ii", 99, len(dataset)), dataset.encode()]
    path.write_bytes(b"".join(parts))
    return path


def write_gguf(
    path: Path,
    means: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray] | None = None,
    kind: str = "imatrix",
) -> Path:
    """The newer form: sums and counts, one count a matrix, 40 where `counts` says nothing."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["C:\\texts\\wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in means.items():
        wide = np.atleast_2d(np.asarray(values, np.float64))
        times = np.asarray((counts or {}).get(name, np.full(len(wide), 40.0)), np.float64)
        writer.add_tensor(f"{name}.in_sum2", (wide * times[:, None]).astype(np.float32))
        writer.add_tensor(f"{name}.counts", times[:, None].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_CPP = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_values(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp would have for these, by its names."""
    found = {}
    for name, own in values.items():
        _, _, layer, *rest = name.removesuffix(".weight").split(".")
        found[f"blk.{layer}.{LLAMA_CPP['.'.join(rest)]}.weight"] = own[None]
    return found
