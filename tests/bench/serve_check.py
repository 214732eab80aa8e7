"""vLLM serves artifacts: greedy text and log-probabilities beside those of our own loader.

    sh tests/bench/vllm_environment.sh ./vllm-env
    python tests/bench/serve_check.py MODEL --environment ./vllm-env [--only nf3,lora] [--server]

quantizes MODEL to each codebook, merges an adapter into one artifact and folds it into a plain
LoRA, and generates greedily from each with a real engine of vLLM. The same tokens then go through
`irq_convert.load`: of each token, in its context, the log-probability there, and whether it is
greedy there, too. Both compute in `--dtype`. `--server` starts `vllm serve` and asks it as a client
of OpenAI's interface does. Prints a table; exits with 1 where a token differs in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import irq_convert
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.hf.causal_lm import load_tokenizer
from tests.bench.serve_artifacts import Artifacts
from tests.bench.serve_server import ask_server
from tests.bench.serving import Engine

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The three most important things to know about the sea are",
    "One day, Tom and his dog went to the park. They saw",
)
BASE = "nf4"
"""Codebook of the artifact that the adapter is trained on."""
CLOSE = 0.02
"""Log-probabilities of a token in float32 may differ by this much in all."""


@dataclass(frozen=True)
class Row:
    """One artifact: tokens that were generated, how many are greedy with us, and the largest
    difference of a log-probability. `rest` is the gap in ours where a token was another one's."""

    case: str
    tokens: int
    greedy: int
    difference: float
    rest: float
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """What is served, with a plain LoRA on top, and what is loaded to compare with it."""

    name: str
    served: Path
    adapter: Path | None = None
    reference: Path | None = None
    dense: Path | None = None
    ranks: int = 1


def cases(made: Artifacts, only: list[str]) -> list[Case]:
    """All cases, those of `only` where it names some; artifacts are made here."""
    found: list[Case] = []

    def wanted(name: str) -> bool:
        return not only or name in only

    found += [Case(name, made.codebook(name)) for name in CODEBOOKS if wanted(name)]
    if wanted("tables"):
        tables = made.quantized("nf4-tables", bits=4, include_embeddings=True)
        found.append(Case("tables", tables))
    if wanted("mixed"):
        rules = (("down_proj", 4), ("k_proj", 2))
        found.append(Case("mixed", made.quantized("nf3-mixed", bits=3, bits_for=rules)))
    if wanted("kept"):
        keep = ("v_proj", r"layers\.0\.")
        found.append(Case("kept", made.quantized("nf3-kept", bits=3, keep=keep)))
    if wanted("experts"):
        found.append(Case("experts", made.mixture()))
    if wanted("ranks"):
        small = made.quantized("nf3-16", bits=3, block_size=16)
        found.append(Case("ranks", small, ranks=made.ranks))
    if any(map(wanted, ("merged", "lora"))):
        base = made.codebook(BASE)
        adapter = made.adapter(base, "block")
        if wanted("merged"):
            found.append(Case("merged", made.merged(base, adapter, "irq")))
        if wanted("lora"):
            plain = made.merged(base, adapter, "adapter")
            dense = made.merged(base, adapter, "dense", dtype="float32")
            found.append(Case("lora", base, plain, dense=dense))
    return found


def compare(engine: Engine, case: Case, args: argparse.Namespace, prompts: list[list[int]]) -> Row:
    """Generate with vLLM and go over the same tokens with our loader."""
    settings: dict[str, Any] = {"dtype": args.dtype, "enforce_eager": args.eager}
    if case.adapter is not None:
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    if case.ranks > 1:
        settings |= {"tensor_parallel_size": case.ranks}
    found = engine.once(case.served, prompts, args.tokens, case.adapter, **settings)
    if found.get("error"):
        return Row(case.name, 0, 0, float("nan"), 0.0, 0.0, found["error"])
    model = ours(case, getattr(torch, args.dtype))
    greedy, tokens, worst, rest = 0, 0, 0.0, 0.0
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        ids = answer["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        logs = logits.log_softmax(-1)
        own = logs.gather(1, torch.tensor(ids)[:, None])[:, 0]
        greedy += int((logits.argmax(-1) == torch.tensor(ids)).sum())
        rest = max(rest, float((logs.max(-1).values - own).max()))
        worst = max(worst, float((own - torch.tensor(answer["logprobs"])).abs().max()))
        tokens += len(ids)
    del model
    gc.collect()
    return Row(case.name, tokens, greedy, worst, rest, found["loaded"])


def ours(case: Case, dtype: torch.dtype) -> Any:
    """The model to compare with, by our loader; a merged dense one by transformers'."""
    if case.dense is None:
        return irq_convert.load(case.reference or case.served, dtype=dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(case.dense, dtype=dtype)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="to train the adapter on")
    parser.add_argument("--work", type=Path, default=Path("serve-check"))
    parser.add_argument("--only", default="")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cores", default="0")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.text or args.work / "text.txt"
    if args.text is None:
        text.write_text("\n".join([*PROMPTS] * 200))
    made = Artifacts(args.model, text, args.work)
    tokenizer = load_tokenizer(args.model)
    prompts = [list(tokenizer(each)["input_ids"]) for each in PROMPTS]
    rows = []
    alone = Engine(args.environment, args.work / "check.log", args.cores, alone=True)
    print(f"{'case':<14} {'tokens':>6} {'greedy':>6} {'largest difference':>18} {'load':>7}")
    for case in cases(made, [each for each in args.only.split(",") if each]):
        if case.ranks == 1:
            row = compare(alone, case, args, prompts)
        else:
            cores = "|".join([args.cores] * case.ranks)
            with Engine(args.environment, args.work / "ranks.log", cores) as several:
                row = compare(several, case, args, prompts)
        rows.append(row)
        if row.error:
            print(f"{row.case:<14} {row.error}", flush=True)
            continue
        print(
            f"{row.case:<14} {row.tokens:>6} {row.greedy:>6} {row.difference:>18.1e} "
            f"{row.seconds:>5.0f} s",
            flush=True,
        )
    alone.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    if args.server:
        ask_server(
            args.environment, made.codebook("nf3"), args.work / "server.log", PROMPTS[0], args.eager
        )
    bad = [r for r in rows if r.error or r.greedy < r.tokens or r.difference > CLOSE]
    return int(bool(bad) and args.dtype == "float32")


if __name__ == "__main__":
    raise SystemExit(main())
