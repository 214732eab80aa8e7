"""`--to adapter`: IEC and pooling folded into a plain LoRA that anything can load.

    A' = A + beta1 P,   B' = B + beta2 E,   same rank, same alpha

A pooled A' is repeated over each block's columns, which is what summing the block did. Folded in
float64 and stored in the adapter's own dtype; never in place, since training resumes from the
unfolded files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.adapter import (
    LayerValues,
    StoredAdapter,
    StoredLayer,
    open_adapter,
    read_layer,
)
from irq_convert.artifact.adapter_config import CONFIG_FILE, NOTE_FILE, OWN_KEYS, WEIGHTS_FILE
from irq_convert.artifact.adapter_kinds import LORA, AdapterKind
from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.files import copy_file_atomic, write_bytes_atomic, write_json_atomic
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.system import os_errors
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec, build_header
from irq_convert.core.elastic import repeat_blocks
from irq_convert.errors import IrqError
from irq_convert.jobs.merge.check_layers import NOISE, ROUNDING, SMALLEST, LayerCheck, probe_input
from irq_convert.jobs.merge.check_layers import unfolded_output as unfolded
from irq_convert.jobs.merge.delta import fold_layer
from irq_convert.jobs.merge.match import Match
from irq_convert.jobs.merge.match_layers import Adapted
from irq_convert.jobs.merge.provenance import describe_adapter
from irq_convert.progress import Progress
from irq_convert.version import PRODUCER

_CARRIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges.txt", "chat_template")
_CARRIED_TOO = ("LICENSE", "README.md", "preprocessor_config.json", "processor_config.json")
COPY_CHUNK = 4 << 20
RECORD_BYTES = 1 << 20
"""Room for settings and note."""


def folded_specs(adapter: StoredAdapter, match: Match) -> list[TensorSpec]:
    """The tensors of the folded adapter: A is as wide as its layer, the betas are gone."""
    specs = []
    for found in match.every.values():
        a, b = found.layer.a, found.layer.b
        shape = a.shape if found.layer.embedding else (a.shape[0], found.cols)
        specs.append(TensorSpec(a.name, a.dtype, shape))
        specs.append(TensorSpec(b.name, b.dtype, b.shape))
    return specs + [TensorSpec(i.name, i.dtype, i.shape) for i in adapter.whole]


def folded_bytes(adapter: StoredAdapter, match: Match) -> int:
    """Bytes of the folded adapter's weights and of the files carried along, to the last one."""
    specs = folded_specs(adapter, match)
    weights = len(build_header(specs, {"format": "pt"})) + sum(spec.nbytes for spec in specs)
    with os_errors("look at its files", adapter.folder):
        return weights + sum(
            (adapter.folder / name).stat().st_size for name in carried_files(adapter)
        )


def carried_files(adapter: StoredAdapter) -> list[str]:
    """Files beside the adapter that belong to using it, not to its training."""
    return sorted(
        path.name
        for path in adapter.folder.iterdir()
        if path.is_file() and (path.name.startswith(_CARRIED) or path.name in _CARRIED_TOO)
    )


def write_folded(
    adapter: StoredAdapter,
    match: Match,
    folder: Path,
    base: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the folded adapter into the empty `folder`; `base` describes its artifact.

    Raises `IrqError` when a folded number does not fit the adapter's dtype, or the disk fails.
    """
    specs = folded_specs(adapter, match)
    total = sum(spec.nbytes for spec in specs)
    progress.phase("folding", len(match.every) + len(adapter.whole), total)
    with ShardWriter(folder / WEIGHTS_FILE, specs) as writer, TileReader() as reader:
        for found in match.every.values():
            for info, folded in zip(
                (found.layer.a, found.layer.b), _folded(reader, adapter, found), strict=True
            ):
                writer.write(info.name, tensor_bytes(_stored(folded, info)))
                progress.advance(folded.numel() * torch_dtype(info.dtype).itemsize, False)
            progress.advance(0, finished=True)
        for info in adapter.whole:
            _copy(reader, writer, info, progress)
    for name in carried_files(adapter):
        copy_file_atomic(adapter.folder / name, folder / name)
    text = json.dumps(_settings(adapter, match), indent=2) + "\n"
    write_bytes_atomic(folder / CONFIG_FILE, text.encode())
    write_json_atomic(folder / NOTE_FILE, _note(adapter, base))


def _folded(
    reader: TileReader, adapter: StoredAdapter, found: Adapted
) -> tuple[torch.Tensor, torch.Tensor]:
    values = read_layer(reader, adapter.config, found.layer)
    a, b = fold_layer(values, found.cols, found.block_size)
    if found.layer.embedding:
        return b.T, a.T
    return (a if found.block_size is None else repeat_blocks(a, found.cols, found.block_size)), b


def _stored(folded: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    result = folded.to(torch_dtype(info.dtype)).contiguous()
    if not bool(result.isfinite().all()):
        raise IrqError(f"{info.name}: folded, it is too large for {info.dtype}: save it wider")
    return result


def _copy(reader: TileReader, writer: ShardWriter, info: TensorInfo, progress: Progress) -> None:
    at = 0
    for chunk in reader.iter_bytes(info, COPY_CHUNK):
        writer.write(info.name, chunk, at)
        at += len(chunk)
        progress.advance(len(chunk), finished=at == info.nbytes)


def _settings(adapter: StoredAdapter, match: Match) -> dict[str, Any]:
    """The settings of a plain LoRA with the same ranks and scalings.

    Layers are named one by one where some are excluded: stock PEFT rewrites short names of experts
    into stacks before it looks at what is excluded.
    """
    kept = {key: value for key, value in adapter.config.raw.items() if key not in OWN_KEYS}
    if kept.get("exclude_modules"):
        modules = sorted(found.layer.module for found in match.every.values())
        kept |= {"target_modules": modules, "exclude_modules": None}
    return kept | {"peft_type": LORA}


def _note(adapter: StoredAdapter, base: Mapping[str, Any]) -> dict[str, Any]:
    """`irq_adapter.json`, so that the result still knows its base."""
    path = adapter.folder / NOTE_FILE
    old = read_json_object(path) if path.is_file() else {}
    return {
        "format": "irq-adapter",
        "format_version": 1,
        "producer": PRODUCER,
        "base": dict(base),
        "lora": AdapterKind.PLAIN.value,
        "folded_from": describe_adapter(adapter),
        **({"training": old["training"]} if "training" in old else {}),
    }


def check_folded(
    adapter: StoredAdapter, match: Match, folder: Path, progress: Progress
) -> list[LayerCheck]:
    """Read the folded adapter back and compare each layer with the unfolded one on a probe.

    Raises `IrqError` naming the first module that differs by more than rounding explains.
    """
    written = open_adapter(folder)
    progress.phase("checking layers", len(match.every), written.nbytes)
    checks = []
    with TileReader() as reader:
        for tensor, found in match.every.items():
            layer = written.layers[found.layer.module]
            check = _check(reader, adapter, written, found, layer)
            progress.advance(layer.a.nbytes + layer.b.nbytes, finished=True)
            if check.bound is not None and not check.bound <= 1:
                raise IrqError(
                    f"{found.layer.module}: folded, it differs from the adapter by "
                    f"{check.difference:.3g} of its output, {check.bound:.3g} times what rounding "
                    "explains: the result was not kept; a disk or memory may be failing"
                )
            checks.append(LayerCheck(tensor, check.difference, check.bound))
    return checks


def _check(
    reader: TileReader,
    adapter: StoredAdapter,
    written: StoredAdapter,
    found: Adapted,
    layer: StoredLayer,
) -> LayerCheck:
    x = probe_input(found.tensor, found.cols)
    values = read_layer(reader, adapter.config, found.layer)
    wanted = unfolded(values, found.layer.scaling, x, found.block_size)
    plain: LayerValues = read_layer(reader, written.config, layer)
    got = layer.scaling * (plain.b @ (plain.a @ x))
    units = [ROUNDING[info.dtype] for info in (layer.a, layer.b)]
    tiny = max(SMALLEST[info.dtype] for info in (layer.a, layer.b))
    inner = plain.a.abs() @ x.abs()
    size = plain.b.abs() @ inner
    # Each of the two matrices is rounded once; the product of the roundings is covered by 2.
    slack = 2 * (sum(units) * size + tiny * (inner.sum() + plain.b.abs().sum(1) * x.abs().sum()))
    bound = layer.scaling * (slack + NOISE * size) + NOISE * wanted.abs()
    difference = (got - wanted).abs()
    quotient = torch.where(difference == 0, 0.0, difference / bound)
    worst = float("inf") if bool(quotient.isnan().any()) else float(quotient.max())
    largest = float(wanted.abs().max()) or 1.0
    return LayerCheck(found.tensor, float(difference.max()) / largest, worst)
