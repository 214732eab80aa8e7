"""Write formats/vectors: small artifacts with their sources and the dense values they stand for.

Run `python tests/formats/make_vectors.py` after a change of the format or of the search; the
tests check that the files in the repository are what this script makes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.spec import QuantSpec

FOLDER = Path(__file__).parents[2] / "formats" / "vectors"


def source_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Weights with what breaks others; every number is exact in float32 whatever the library."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int, cols: int) -> torch.Tensor:
        # Sums of integers, so that no library's normal distribution is part of the contract.
        draws = torch.randint(-512, 513, (6, rows, cols), generator=generator)
        return draws.sum(0).float() / 2**15

    groups = noise(90, 40)  # 270 blocks of 16: two groups, the second begins inside a row
    groups[3, 0:16] = 0.0  # a zero block
    groups[4, 16:32] = 0.03125  # a constant block
    groups[70, 5] = 1.5  # an outlier
    tail = noise(5, 200)  # three blocks of 64 and a tail of 8
    tail[2, 192:] = -0.25  # a constant tail
    odd = noise(7, 21)  # columns that do not follow from the packed width
    return {"groups.weight": groups, "tail.weight": tail, "odd.weight": odd}


def quantize_source(codebook: str, source: dict[str, torch.Tensor]) -> dict[str, QuantizedTensor]:
    """Each tensor at its own block size."""
    sizes = {"groups.weight": 16, "tail.weight": 64, "odd.weight": 16}
    specs = {n: QuantSpec(codebook, sizes[n], "entropy") for n in source}
    return {n: quantize_tensor(w, specs[n]) for n, w in source.items()}


def with_plain_statistics(tensor: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same tensor with statistics stored as they are, rounded to `dtype`."""
    from irq_convert.core.scales import expand_statistic

    groups = tensor.scale, tensor.scale_grid
    scale = expand_statistic(*groups).to(dtype)
    tau = expand_statistic(tensor.tau, tensor.tau_grid).to(dtype)
    return replace(tensor, scale=scale, tau=tau, scale_grid=None, tau_grid=None)


def write_vector(
    folder: Path, tensors: dict[str, QuantizedTensor], **sources: torch.Tensor
) -> None:
    """One vector: config.json, model.safetensors, dense.safetensors and source.safetensors."""
    first = tensors["tail.weight"]
    default = ModuleFormat(first.codebook, 64)
    overrides = {}
    for name, tensor in tensors.items():
        own = ModuleFormat(tensor.codebook, tensor.block_size)
        own = replace(own, scale_dtype=_dtype(tensor.scale), tau_dtype=_dtype(tensor.tau))
        if own.columns_of(tensor.codes.shape[1]) != tensor.cols:
            own = replace(own, columns=tensor.cols)
        if own != default:
            overrides[name.removesuffix(".weight")] = own
    config = QuantizationConfig(default, ("head",), overrides, {"producer": "irq-convert"})
    stored = {n + suffix: p for n, t in tensors.items() for suffix, p in t.parts().items()}
    copied = {"head.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)}
    dense = {name: dequantize_tensor(tensor, backend="torch") for name, tensor in tensors.items()}
    _write_files(folder, config, {**stored, **copied}, dense, dict(sources))


def _write_files(
    folder: Path,
    config: QuantizationConfig,
    stored: dict[str, torch.Tensor],
    dense: dict[str, torch.Tensor],
    sources: dict[str, torch.Tensor],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"quantization_config": config.to_dict()}, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(dense, folder / "dense.safetensors", {"format": "pt"})
    save_file(sources, folder / "source.safetensors", {"format": "pt"})


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_all(folder: Path) -> None:
    """Every vector below `folder`."""
    for seed, codebook in enumerate(CODEBOOKS):
        source = source_tensors(seed)
        write_vector(folder / codebook, quantize_source(codebook, source), **source)
    source = source_tensors(100)
    tensors = quantize_source("nf3", source)
    for name, dtype in (("groups.weight", torch.float16), ("odd.weight", torch.float32)):
        tensors[name] = with_plain_statistics(tensors[name], dtype)
    write_vector(folder / "plain-statistics", tensors, **source)
    write_transposed(folder / "transposed")


def write_transposed(folder: Path) -> None:
    """A vector of tensors whose inputs are the last dimension but one, alone and stacked."""
    flat = source_tensors(101)
    rows = {"conv.weight": flat["tail.weight"], "experts.down": flat["groups.weight"]}
    parts = {name: quantize_tensor(w, QuantSpec("nf4", 16)) for name, w in rows.items()}
    shapes = {"conv.weight": (5,), "experts.down": (6, 15)}

    def turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(*shapes[name], -1).mT.contiguous()

    stored = {
        name + suffix: part if suffix.endswith("_grid") else part.reshape(*shapes[name], -1)
        for name, tensor in parts.items()
        for suffix, part in tensor.parts().items()
    }
    turn = ModuleFormat("nf4", 16, transposed=True)
    overrides = {"conv": turn, "experts.down": turn}
    config = QuantizationConfig(ModuleFormat("nf4", 16), (), overrides, {"producer": "irq-convert"})
    dense = {n: turned(n, dequantize_tensor(t, backend="torch")) for n, t in parts.items()}
    _write_files(folder, config, stored, dense, {n: turned(n, w) for n, w in rows.items()})


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
