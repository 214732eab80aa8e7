"""Tokens a second in vLLM: artifacts beside the dense model and compressed-tensors, side by side.

    python tests/bench/serve.py MODEL --environment ./vllm-env [--cores 0] [--batches 1,8]

One engine of vLLM a model, all loaded at once, asked in turn; medians over rounds, and the ratio to
the dense model of the same round. Prompts are short and 64 tokens are generated from each, so that
nearly all of the time is decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.hf.causal_lm import load_tokenizer
from tests.bench.serve_artifacts import Artifacts
from tests.bench.serving import Engine

PROMPT = "Once upon a time there was a little girl who"
DENSE = "dense"


def models(made: Artifacts, names: list[str]) -> dict[str, Path]:
    """Folders to serve by their names in the table."""
    found = {DENSE: made.model}
    for name in names:
        if name == "compressed-tensors":
            base = made.quantized("int4-zero", codebook="int", bits=4, zero_point="integer")
            found[name] = made.exported(base)
        else:
            found[name] = made.codebook(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("serve-check"))
    parser.add_argument("--names", default="compressed-tensors,nf4,nf3,nf2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cores", default="0")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    made = Artifacts(args.model, args.work / "text.txt", args.work)
    ids = list(load_tokenizer(args.model)(PROMPT)["input_ids"])
    batches = [int(each) for each in args.batches.split(",")]
    rates: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        engines = {}
        for name, folder in models(made, args.names.split(",")).items():
            log = args.work / f"serve-{name}.log"
            engines[name] = stack.enter_context(Engine(args.environment, log, args.cores))
            found = engines[name].load(folder, dtype=args.dtype, enforce_eager=args.eager)
            if found.get("error"):
                raise SystemExit(f"{name}: {found['error']}")
        for batch in batches:
            for number in range(args.rounds + 1):  # the first warms up
                for name, engine in engines.items():
                    found = engine.generate([ids] * batch, args.tokens)
                    if number:
                        rate = batch * args.tokens / found["seconds"]
                        rates.setdefault((name, batch), []).append(rate)
    print(f"{'model':<20} {'prompts':>7} {'tokens/s':>9} {'of dense':>9}")
    for (name, batch), own in rates.items():
        ratio = median(a / b for a, b in zip(own, rates[DENSE, batch], strict=True))
        print(f"{name:<20} {batch:>7} {median(own):>9.1f} {ratio:>9.2f}")
    if args.json:
        rows = [{"model": n, "prompts": b, "rates": own} for (n, b), own in rates.items()]
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
