"""What peers make of the same model, text and tokens, as dense folders to judge beside ours.

    python tests/bench/peers.py gptqmodel MODEL OUT --text C4 --bits 3
    python tests/bench/peers.py autoround MODEL OUT --text C4 --bits 3 --iterations 200
    python tests/bench/calibrated.py MODEL --text C4 --judge OTHER --beside gptqmodel=OUT

Each in an environment of its own, with torch pinned as in constraints.txt: gptqmodel==7.7.0, or
auto-round==0.16.1. OUT holds the decoded weights in float32. Group 64, asymmetric; the first tokens
of the text in windows, as many as are asked for. GPTQModel as strong as it gets on a CPU: error
grid, group-aware order, float scales. On two cores its start fails, since a pool of two loaders
wants two workers: set "model_loader:cpu" to 1 in its __init__.py. One thread unless
OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    asked = _parse()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    ids = tokenizer(asked.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    count = asked.tokens // asked.window
    if len(ids) < asked.tokens:
        raise SystemExit(f"{asked.text} has {len(ids)} tokens, {asked.tokens} were asked for")
    windows = torch.tensor(ids[: count * asked.window]).view(count, asked.window)
    seconds, weights = PEERS[asked.peer](asked, tokenizer, windows)
    _save_dense(asked, tokenizer, weights)
    print(f"{asked.peer} {asked.bits} bits, {windows.numel():,} tokens: {seconds:.0f} s")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--fast", action="store_true", help="GPTQModel without its error grid")
    return parser.parse_args()


def _gptqmodel(asked: argparse.Namespace, tokenizer: Any, windows: torch.Tensor) -> Any:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=asked.bits, group_size=64, mse=0.0 if asked.fast else 2.4, act_group_aware=True,
        desc_act=False, sym=False, damp_percent=0.05,
    )  # fmt: skip
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    model = GPTQModel.load(asked.model, config, device="cpu")
    begun = time.perf_counter()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        backend = getattr(BACKEND, "GPTQ_TORCH", None) or BACKEND.TORCH
        packed = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model
        # Decoded by the package itself; stored [in, out].
        weights = {
            f"{name}.weight": module.dequantize_weight().T.float()
            for name, module in packed.named_modules()
            if hasattr(module, "dequantize_weight")
        }
    return seconds, weights


def _autoround(asked: argparse.Namespace, tokenizer: Any, windows: torch.Tensor) -> Any:
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    rounder = AutoRound(
        model, tokenizer, bits=asked.bits, group_size=64, sym=False, iters=asked.iterations,
        nsamples=len(windows), seqlen=asked.window, batch_size=4,
        dataset=[row[None] for row in windows], device="cpu", amp=False,
    )  # fmt: skip
    begun = time.perf_counter()
    rounder.quantize()
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        rounder.save_quantized(folder, format="fake")
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return seconds, made.state_dict()


PEERS = {"gptqmodel": _gptqmodel, "autoround": _autoround}


def _save_dense(
    asked: argparse.Namespace, tokenizer: Any, weights: dict[str, torch.Tensor]
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    own = dense.state_dict()
    changed = [name for name in weights if not torch.equal(weights[name].float(), own[name])]
    if not changed:
        raise SystemExit(f"{asked.peer} changed no weight")
    dense.load_state_dict(weights, strict=False)
    dense.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
