"""What vLLM loads of `export --to compressed-tensors`: every shape of it, tried.

    python tests/bench/compressed_tensors_vllm.py MODEL --environment ./vllm-env

quantizes MODEL with integer zero points to 2, 3 and 4 bits in groups of 32, 64 and 128, to a mix of
widths and a size to reach, and merges adapters; each export is loaded by a real engine of vLLM.
Where it loads, the greedy tokens of three prompts are compared with those of our own loader, each
in its context. Prints a table for docs/export.md. `--w4a8` leaves vLLM's products of 8-bit
activations on, which it takes by default on CPUs for widths of 4 bits.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.hf.causal_lm import load_tokenizer
from tests.bench.serve_artifacts import Artifacts, small_llama
from tests.bench.serve_check import PROMPTS, Case, compare
from tests.bench.serving import Engine

WIDTH = 300
"""Of a line: vLLM's errors are long."""
ZERO: dict[str, Any] = {"codebook": "int", "zero_point": "integer"}


@dataclass(frozen=True)
class Export:
    """An artifact to export, by its options; `merge`: with an adapter of a kind merged first."""

    name: str
    settings: dict[str, Any]
    export: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None


def exports() -> list[Export]:
    """Everything that is tried."""
    found = [
        Export(f"int{bits}-zero-{group}", {**ZERO, "bits": bits, "block_size": group})
        for bits in (4, 3, 2)
        for group in (32, 64, 128)
    ]
    found.append(Export("int4-zero-16", {**ZERO, "bits": 4, "block_size": 16}))
    found.append(Export("nf4-refit", {"codebook": "nf", "bits": 4}, {"refit": True}))
    mixed = {**ZERO, "bits": 4, "bits_for": (("down_proj", 3),)}
    found.append(Export("int4-zero-down3", mixed))
    qkv = {**ZERO, "bits": 4, "bits_for": (("k_proj", 2),)}
    found.append(Export("int4-zero-k2", qkv))
    kept = {**ZERO, "bits": 4, "keep": (r"layers\.0\.",)}
    found.append(Export("int4-zero-kept", kept))
    found.append(Export("int4-zero-v-kept", {**ZERO, "bits": 4, "keep": ("v_proj",)}))
    tables = {**ZERO, "bits": 4, "include_embeddings": True}
    found.append(Export("int4-zero-tables", tables))
    base = {**ZERO, "bits": 4}
    found.append(Export("int4-zero-again", base, {}, "plain"))
    found.append(Export("int4-zero-moved", base, {"refit": True}, "block"))
    return found


def folder(made: Artifacts, each: Export) -> tuple[Path, Path]:
    """The artifact and its export."""
    settings = dict(each.settings)
    if each.adapter is None:
        artifact = made.quantized(each.name, **settings)
    else:
        base = made.quantized("int4-zero-64", **settings)
        adapter = made.adapter(base, each.adapter)
        more = {} if each.adapter == "block" else {"min_survival": -1e9}
        artifact = made.merged(base, adapter, "irq", **more)
    return artifact, made.exported(artifact, **each.export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("serve-check"))
    parser.add_argument("--only", default="")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cores", default="0")
    parser.add_argument("--small", action="store_true", help="a random llama, MODEL's tokenizer")
    parser.add_argument("--w4a8", action="store_true")
    args = parser.parse_args()
    args.eager = True
    os.environ["VLLM_CPU_INT4_W4A8"] = str(int(args.w4a8))
    text = args.work / "text.txt"
    args.work.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join([*PROMPTS] * 200))
    model = small_llama(args.model, args.work / "small") if args.small else args.model
    made = Artifacts(model, text, args.work)
    tokenizer = load_tokenizer(args.model)
    prompts = [list(tokenizer(each)["input_ids"]) for each in PROMPTS]
    only = [each for each in args.only.split(",") if each]
    engine = Engine(args.environment, args.work / "packed.log", args.cores, alone=True)
    print(f"{'export':<18} {'tokens':>6} {'greedy':>6} {'log-prob.':>9}")
    for each in exports():
        if only and each.name not in only:
            continue
        try:
            artifact, packed = folder(made, each)
        except Exception as error:  # what the export refuses
            print(f"{each.name:<18} not exported: {error}", flush=True)
            continue
        case = Case(each.name, packed, reference=artifact)
        row = compare(engine, case, args, prompts)
        figures = f"{row.tokens:>6} {row.greedy:>6} {row.difference:>9.1e}"
        print(f"{each.name:<18} {row.error or figures}"[:WIDTH], flush=True)
    engine.close()


if __name__ == "__main__":
    main()
