"""What storing a moved tau costs: a block-pooled adapter merged with each dtype of tau.

Run `python tests/bench/tau_cost.py`. The demo model is quantized with each codebook, a block-pooled
adapter is trained on it for a few steps, and merged by moving tau. Printed is the largest
difference of a logit between the result and base plus adapter, relative to the largest logit, with
the bits a weight, and whether codes and scales are the same bytes before and after.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from irq_convert.cli.console import quiet_libraries
from irq_convert.core.codebook import CODEBOOKS

RECIPE: dict[str, Any] = {
    "rank": 16,
    "steps": 12,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "sequence_length": 128,
    "max_grad_norm": 1.0,
    "dropout": 0.0,
}


def same_bytes(before: Path, after: Path) -> bool:
    """Whether codes, scales and their grids are equal."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    kept = [name for name in old if name.endswith(("weight", "_scale", "_scale_grid"))]
    return all(torch.equal(old[name], new[name]) for name in kept)


def measure(folder: Path, codebook: str) -> list[str]:
    """One row of the table."""
    from irq_convert.artifact.adapter_kinds import AdapterKind
    from irq_convert.core.spec import QuantSpec
    from irq_convert.jobs.demo import MODEL_DIR
    from irq_convert.jobs.demo.corpus import HELDOUT_SEED, corpus
    from irq_convert.jobs.finetune.finetune import finetune
    from irq_convert.jobs.finetune.options import FinetuneOptions
    from irq_convert.jobs.merge.merge import merge
    from irq_convert.jobs.merge.options import Dtype, MergeOptions, MergeTo, TauDtype
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize

    base, adapter, data = folder / codebook, folder / f"{codebook}-adapter", folder / "text.txt"
    data.write_text(corpus(HELDOUT_SEED + 1, 60), encoding="utf-8")
    quantize(str(MODEL_DIR), base, QuantizeOptions(QuantSpec(codebook)))
    finetune(base, data, adapter, FinetuneOptions(lora=AdapterKind.BLOCK, **RECIPE))
    row, same = [codebook], True
    for tau in TauDtype:
        out = folder / f"{codebook}-{tau.value}"
        report = merge(base, adapter, out, MergeOptions(to=MergeTo.IRQ, tau=tau))
        row.append(f"{report.logits.difference:.1e} ({report.bits_per_weight:.2f})")
        same &= same_bytes(base, out)
    options = MergeOptions(to=MergeTo.DENSE, dtype=Dtype.FLOAT32)
    dense = merge(base, adapter, folder / f"{codebook}-dense", options)
    return [*row, f"{dense.logits.difference:.1e}", f"{dense.logits.effect:.2f}", str(same)]


def main() -> None:
    """All codebooks."""
    quiet_libraries(threads=1)
    table = Table()
    columns = (
        "tau float32",
        "float16",
        "uint8",
        "--to dense, fp32",
        "adapter's effect",
        "same bytes",
    )
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    with tempfile.TemporaryDirectory() as folder:
        for codebook in CODEBOOKS:
            table.add_row(*measure(Path(folder), codebook))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
