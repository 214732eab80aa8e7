"""Trains the demo model from nothing and writes it as a Hugging Face folder.

`python -m irq_convert.jobs.demo.train --out DIR` makes the folder that ships in `model/`. It runs
on the CPU and takes some twenty minutes on one core. The same figures, library versions and number
of threads give the same folder.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.demo import card
from irq_convert.jobs.demo.corpus import HELDOUT_SEED, SEPARATOR, heldout
from irq_convert.jobs.demo.recipe import BOS, EOS, EOS_ID, Recipe, make_model, make_tokenizer
from irq_convert.jobs.demo.recipe import training_tokens as make_tokens

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedModel


def perplexity(model: PreTrainedModel, ids: list[int], context: int) -> float:
    """Perplexity of `ids` as one packed stream, cut into windows of `context` without overlap.

    The mean negative log-likelihood is over all predictions inside windows (a window's first token
    is not predicted), in the model's own dtype with the logarithm in fp32.
    """
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[start : start + context]])
            if window.shape[1] < 2:
                continue
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            total, count = total + float(loss), count + window.shape[1] - 1
    return math.exp(total / count)


def batches(recipe: Recipe, tokenizer: Tokenizer) -> torch.Tensor:
    """Training windows `[steps, batch, context + 1]` int64 in random order, each seen once."""
    import torch

    windows = recipe.steps * recipe.batch
    ids = make_tokens(recipe, tokenizer, windows * recipe.context + 1)
    stream = torch.tensor(ids[: windows * recipe.context + 1])
    cut = stream.unfold(0, recipe.context + 1, recipe.context)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(recipe.seed))
    return cut[order].view(recipe.steps, recipe.batch, recipe.context + 1)


def optimise(model: LlamaForCausalLM, data: torch.Tensor, recipe: Recipe) -> None:
    """AdamW over `data`, one row of batches a step; weights change in place."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    model.train()
    begun, mean = time.monotonic(), math.nan
    for step, rows in enumerate(data):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise IrqError(f"the loss is {value} at step {step}: lower the learning rate")
        mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
        if step % 100 == 99 or step + 1 == len(data):
            seconds = time.monotonic() - begun
            print(f"step {step + 1}/{len(data)}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
    model.eval()


def write(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, context: int) -> None:
    """Writes configuration, bf16 weights and tokenizer into `folder`."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    blank_line = tokenizer.token_to_id("\u010a" * len(SEPARATOR))
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[EOS_ID] if blank_line is None else [EOS_ID, blank_line],
        pad_token_id=EOS_ID,
        max_new_tokens=context - 16,
    )
    model.bfloat16().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    # The same tokenizer in a third of the bytes.
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def train(recipe: Recipe, out: Path) -> float:
    """Trains by `recipe`, writes the folder `out` whole or not at all, returns held-out perplexity.

    The perplexity is that of the stored bf16 weights, computed in fp32. Raises UsageError when
    `out` holds something already or when the seed is the one of the held-out text.
    """
    if recipe.seed == HELDOUT_SEED:
        raise UsageError(f"seed {recipe.seed} makes the held-out text: choose another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: name another folder with --out")
    import torch

    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    begun = time.monotonic()
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer.get_vocab_size())
    data = batches(recipe, tokenizer)
    optimise(model, data, recipe)
    model.bfloat16().float()
    text = heldout()
    measured = perplexity(model, tokenizer.encode(text).ids, recipe.context)
    print(f"held-out perplexity {measured:.4f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        write(folder, model, tokenizer, recipe.context)
        facts = card.Facts(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(m.weight.numel() for m in model.model.modules() if _is_linear(m)),
            tokens=recipe.steps * recipe.batch * recipe.context,
            minutes=(time.monotonic() - begun) / 60,
            perplexity=measured,
        )
        (folder / "README.md").write_text(card.render(recipe, facts), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return measured


def _is_linear(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m irq_convert.jobs.demo.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=default.threads)
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    try:
        train(Recipe(steps=given.steps, seed=given.seed, threads=given.threads), given.out)
    except IrqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
