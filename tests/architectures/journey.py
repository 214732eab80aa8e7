"""One architecture all the way: quantize, load, compare, save, load again, one step of training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert.artifact.contents import Artifact, open_artifact, read_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.quantize.report import QuantizeReport

from .zoo import Kind, inputs, logits, make_model, write_checkpoint

TOLERANCE = 1e-5
ALIGNED = 1e-6
"""Equal weights at other addresses: a dense product may add in another order."""
"""Of logits of order 1 in float32: a product for each expert instead of one for all of them."""


@dataclass(frozen=True)
class Result:
    """What one architecture showed.

    `difference` is the largest of a logit against the dense model with decoded weights, `lost` that
    against the model before quantizing. `reloaded`: saved and loaded again, same logits and same
    bytes. `learned`: adapters whose gradient was not zero in a step that lowered the loss.
    """

    kind: Kind
    report: QuantizeReport
    artifact: Artifact
    model: Any
    difference: float
    lost: float
    reloaded: bool
    learned: int
    adapters: int


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits are those of equal weights."""
    return float((found - wanted).abs().max()) <= ALIGNED * float(wanted.abs().max())


def run(kind: Kind, folder: Path) -> Result:
    """Everything for `kind`, in the empty `folder`."""
    write_checkpoint(kind, folder / "source")
    report = quantize_kind(kind, folder / "source", folder / "artifact")
    twin = dense_twin(kind, folder / "artifact", folder / "dense")
    model: Any = irq_convert.load(folder / "artifact", dtype=torch.float32)
    wanted, found = logits(twin, kind), logits(model, kind)
    model.save_pretrained(folder / "saved")
    again: Any = irq_convert.load(folder / "saved", dtype=torch.float32)
    same = agree(found, logits(again, kind))
    learned, adapters = step(again, kind)
    return Result(
        kind,
        report,
        open_artifact(folder / "artifact"),
        model,
        float((wanted - found).abs().max()),
        float((logits(make_model(kind), kind) - found).abs().max()),
        same and stored_bytes(folder / "artifact") == stored_bytes(folder / "saved"),
        learned,
        adapters,
    )


def quantize_kind(kind: Kind, source: Path, out: Path, **options: Any) -> QuantizeReport:
    """Convert in blocks of 16, of which none of the widths is a multiple everywhere."""
    spec = QuantSpec("nf4", 16, objective="none")
    given = {"spec": spec, "include_towers": kind.towers, "threads": 1, **options}
    return quantize(str(source), out, QuantizeOptions(**given))


def decoded(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Every tensor under its name and in the layout of the source, quantized ones in float32."""
    with TileReader() as reader:
        found = {tensor.name: _dense(reader, tensor) for tensor in artifact.quantized}
        return found | {info.name: reader.read_tensor(info) for info in artifact.copied}


def _dense(reader: TileReader, tensor: StoredTensor) -> torch.Tensor:
    rows = dequantize_tensor(read_quantized(reader, tensor, 0, tensor.shape.rows))
    stored = rows.reshape(*tensor.leading, tensor.shape.cols)
    return stored.mT.contiguous() if tensor.format.transposed else stored


def dense_twin(kind: Kind, artifact: Path, folder: Path) -> Any:
    """transformers' own model, in its own code, of the decoded weights."""
    folder.mkdir()
    opened = open_artifact(artifact)
    config = dict(opened.checkpoint.config or {})
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(decoded(opened), folder / "model.safetensors", {"format": "pt"})
    return dense_model(kind, folder)


def dense_model(kind: Kind, folder: Path) -> Any:
    """The dense checkpoint in `folder`, complete, by transformers alone."""
    model, info = getattr(transformers, kind.model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def stored_bytes(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor of the files in `folder`."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (tensor.dtype, tensor.shape, data)
    return found


def step(model: Any, kind: Kind, targets: str = "all-linear") -> tuple[int, int]:
    """A step of IEC-LoRA, which has to lower the loss: adapters that learned, and all of them."""
    config = irq_convert.IecLoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = irq_convert.attach(model, config)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    batch = inputs(kind)
    optimizer = torch.optim.SGD(trained.values(), lr=0.02)
    loss = adapted(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    second = [p for name, p in trained.items() if ".lora_B." in name]
    learned = sum(p.grad is not None and bool(p.grad.any()) for p in second)
    optimizer.step()
    with torch.no_grad():
        assert float(adapted(**batch, labels=batch["input_ids"]).loss) < float(loss)
    return learned, len(second)
