"""How the demo model is built: the figures of a training run, its tokenizer, model and text.

The model is a plain LLaMA of some 0.9 million parameters with grouped-query attention and tied
embeddings. Its down projections have 352 inputs, which blocks of 64 do not divide, so that short
tail blocks occur in it as they do in large models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from irq_convert.jobs.demo.corpus import SEPARATOR, corpus, story

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# Words with the space before them, and a blank line, are whole units for the merges.
UNITS = r"\n+| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


@dataclass(frozen=True)
class Recipe:
    """Every figure that decides what a training run produces, beside the library versions."""

    steps: int = 2500
    seed: int = 1
    threads: int = 1
    batch: int = 16
    context: int = 256
    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    learning_rate: float = 6e-3
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine down to 2 %."""
        import math

        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE with `recipe.vocabulary` entries that puts the start token before a text.

    Any byte is in the alphabet, so every text can be encoded and comes back unchanged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = corpus(recipe.seed, 4000).split(SEPARATOR)
    tokenizer.train_from_iterator((piece + SEPARATOR for piece in text), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def make_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """A LlamaForCausalLM in fp32 with fresh weights, drawn from torch's generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
        initializer_range=0.04,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def training_tokens(recipe: Recipe, tokenizer: Tokenizer, count: int) -> list[int]:
    """At least `count` token ids of stories, six to a document between start and end tokens."""
    rng = random.Random(recipe.seed)
    ids: list[int] = []
    while len(ids) < count:
        documents = [SEPARATOR.join(story(rng) for _ in range(6)) for _ in range(500)]
        for encoding in tokenizer.encode_batch(documents):
            ids += [*encoding.ids, EOS_ID]
    return ids
