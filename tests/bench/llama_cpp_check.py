"""Runs an exported GGUF file in llama.cpp and compares it with the artifact it came from.

    irq-convert quantize MODEL ARTIFACT --codebook int4 --block-size 32
    irq-convert export ARTIFACT FOLDER --to gguf
    python tests/bench/llama_cpp_check.py ARTIFACT FOLDER/NAME.gguf --python VENV/bin/python

VENV is another virtual environment with llama-cpp-python, whose source package brings llama.cpp
along and builds it (some 25 minutes on two slow cores):

    python -m venv VENV
    VENV/bin/pip install numpy scikit-build-core cmake ninja jinja2 diskcache typing-extensions
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF" VENV/bin/pip install --no-build-isolation \
        --no-deps --no-binary llama-cpp-python llama-cpp-python

For each prompt it compares the tokens, the greedy text, and all logits over that text; llama.cpp's
cache of keys and values is kept in float32. With Q4_1 and Q8_0 llama.cpp rounds activations to 8
bits before it multiplies, which is nearly all of the difference of logits. To see what is left,
export an nf artifact with --fallback f32, or convert the artifact's dense export (--to dense
--dtype float32) with llama.cpp's own convert_hf_to_gguf.py --outtype f32, and give that file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily found a red ball in the park.",
    "The dog was sad. He did not know",
)


def run_llama_cpp(file: str, prompts: list[str], samples: list[str], tokens: int, out: str) -> None:
    """In the other environment: tokens, greedy continuation and logits of every position."""
    import llama_cpp
    import numpy as np

    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        file, n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=f32, type_v=f32
    )
    found: dict[str, Any] = {}
    for number, prompt in enumerate(prompts):
        ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
        start = len(ids)
        model.reset()
        model.eval(ids)
        for _ in range(tokens):
            best = int(np.argmax(model.scores[len(ids) - 1]))
            if llama_cpp.llama_vocab_is_eog(model._model.vocab, best):
                break
            ids.append(best)
            model.eval([best])
        found[f"ids{number}"] = np.array(ids)
        found[f"start{number}"] = np.array(start)
        found[f"logits{number}"] = np.array(model.scores[: len(ids)])
    for number, text in enumerate(samples):
        found[f"sample{number}"] = np.array(model.tokenize(text.encode(), special=False))
    np.savez(out, **found)


def compare(artifact: Path, file: Path, python: str, tokens: int) -> list[dict[str, Any]]:
    """One row a prompt: whether tokens and text are equal, and how far the logits are apart.

    A last row says for how many plain and odd sample texts the tokens differ.
    """
    import tempfile

    import numpy as np
    import torch
    from transformers import AutoTokenizer

    import irq_convert
    from irq_convert.jobs.export.gguf.tokenizer_samples import ODD, PLAIN

    model = irq_convert.load(artifact, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "seen.npz")
        request = json.dumps([str(file), list(PROMPTS), [*PLAIN, *ODD], tokens, out])
        subprocess.run([python, __file__, "--run", request], check=True)
        seen = dict(np.load(out))
    rows = []
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ours = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
            stops = model.generation_config.eos_token_id
            if int(ours[-1]) in (stops if isinstance(stops, list) else [stops]):
                ours = ours[:-1]
            theirs = torch.from_numpy(seen[f"ids{number}"])
            logits = model(theirs[None]).logits[0]
        gap = (logits - torch.from_numpy(seen[f"logits{number}"])).abs()
        rows.append(
            {
                "prompt": prompt,
                "same_tokens": theirs[: int(seen[f"start{number}"])].tolist() == ids[0].tolist(),
                "same_text": theirs.tolist() == ours.tolist(),
                "tokens": len(theirs),
                "largest": float(gap.max()),
                "mean": float(gap.mean()),
                "scale": float(logits.abs().max()),
                "text": tokenizer.decode(theirs, skip_special_tokens=True)[:70],
            }
        )
    wrong = [
        seen[f"sample{number}"].tolist() != tokenizer(text).input_ids
        for number, text in enumerate((*PLAIN, *ODD))
    ]
    plain, odd = sum(wrong[: len(PLAIN)]), sum(wrong[len(PLAIN) :])
    return [*rows, {"plain": f"{plain} of {len(PLAIN)}", "odd": f"{odd} of {len(ODD)}"}]


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_llama_cpp(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--python", required=True, help="of the environment with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=80)
    args = parser.parse_args()
    for row in compare(args.artifact, args.file, args.python, args.tokens):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
