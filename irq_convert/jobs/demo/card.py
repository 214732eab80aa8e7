"""The model card of the demo model, filled in with the figures of the run that made it."""

from __future__ import annotations

from dataclasses import dataclass

from irq_convert.jobs.demo.corpus import HELDOUT_SEED, HELDOUT_STORIES
from irq_convert.jobs.demo.recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """What is known only after training; `linear` counts the weights of the decoder's linears."""

    parameters: int
    linear: int
    tokens: int
    minutes: float
    perplexity: float


TEMPLATE = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A very small story model

A LLaMA of {parameters:,} parameters, {share:.0%} of them in the decoder's linears. It writes little
stories in which counts, owners, places and colours should stay what they were. It ships with
irq-convert, to try quantization on without a download; it knows nothing but its stories.

| | |
|---|---|
| held-out perplexity | {perplexity:.4f} |
| layers, hidden, intermediate | {r.layers}, {r.hidden}, {r.intermediate} |
| attention heads, key-value heads | {r.heads}, {r.key_value_heads} |
| vocabulary, context | {r.vocabulary}, {r.context} |
| weights stored as | bf16, embeddings tied |

## Perplexity

Of the stored weights, computed in fp32, on `irq_convert.jobs.demo.corpus.heldout()`: {stories}
stories from seed {heldout:,}. The text is encoded as one stream with the start token in front and
cut into windows of {r.context} tokens without overlap; the first token of each is not predicted.

## Training

From random weights, on text from the seeded grammar in `irq_convert/jobs/demo/` (written for this
project, no data set): {tokens:,} tokens, each seen once. {r.steps} steps of {r.batch} windows of
{r.context} tokens, AdamW (0.9, 0.98), weight decay {r.weight_decay} on matrices, peak learning rate
{r.learning_rate} after {r.warmup} steps of warm-up, cosine decay to 2 %, gradient norm clipped at
{r.clip}, fp32, seed {r.seed}. It took {minutes:.0f} minutes on a CPU with {r.threads} thread(s).

    python -m irq_convert.jobs.demo.train --out DIR \\
        --steps {r.steps} --seed {r.seed} --threads {r.threads}

The tokenizer is a byte-level BPE trained on the same text: any text can be encoded.

## Licence

Apache-2.0, the weights and the text generator alike.
"""


def render(recipe: Recipe, facts: Facts) -> str:
    """The card as markdown with a metadata header."""
    return TEMPLATE.format(
        r=recipe,
        parameters=facts.parameters,
        share=facts.linear / facts.parameters,
        perplexity=facts.perplexity,
        stories=HELDOUT_STORIES,
        heldout=HELDOUT_SEED,
        tokens=facts.tokens,
        minutes=facts.minutes,
    )
