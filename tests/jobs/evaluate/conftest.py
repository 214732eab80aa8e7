"""A tiny random causal LM and a small tokenizer, made here and saved as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tiny_model

WORDS = "the cat sat on a mat and one day it saw some big red dogs who ran far into tall woods"
POSITIONS = 32
NOISE = 0.03


def story(seed: int, words: int = 400) -> str:
    """Words drawn at random, with line ends, from the few that the tokenizer was trained on."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = WORDS.split()
    picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    return "".join(vocabulary[p] + ("\n" if i % 9 == 8 else " ") for i, p in enumerate(picks))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 300 tokens that puts `<s>` at the start of a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS] * 3, trainer)
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def make_model(seed: int, noise: float = 0.0, vocabulary: int = 300) -> Any:
    """Two small Llama layers with weights large enough for predictions far from uniform.

    `noise` moves every weight a little: a neighbour of the same model, as quantizing gives.
    """
    model = tiny_model(
        seed=seed,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.5,
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return model


def save(folder: Path, model: PreTrainedModel, tokenizer: bool = True) -> Path:
    """Write a model folder, with the tokenizer or without."""
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), make_model(0))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("other"), make_model(0, noise=NOISE))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(story(7), encoding="utf-8")
    return path
