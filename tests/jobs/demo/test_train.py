"""The training script from end to end on a few steps, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from irq_convert.errors import UsageError
from irq_convert.jobs.demo import train
from irq_convert.jobs.demo.corpus import HELDOUT_SEED, corpus
from irq_convert.jobs.demo.recipe import EOS_ID, Recipe, make_tokenizer, training_tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(Recipe())


@pytest.mark.parametrize("text", ["Mia had two plums.\n\n", "Zoë: 12 € + «x»\t\r\n\x00", "", "  "])
def test_tokenizer_returns_any_text_unchanged(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_words_whole(tokenizer: Tokenizer) -> None:
    text = corpus(21, 200)
    words = len(text.split())
    assert words < len(tokenizer.encode(text).ids) < 1.6 * words


@pytest.mark.slow
def test_batches_cut_one_stream_without_repeating(tokenizer: Tokenizer) -> None:
    recipe = Recipe(steps=3, batch=4, context=32)
    data = train.batches(recipe, tokenizer)
    assert data.shape == (3, 4, 33)
    stream = training_tokens(recipe, tokenizer, 12 * 32 + 1)[: 12 * 32 + 1]
    cut = {tuple(stream[i : i + 33]) for i in range(0, 12 * 32, 32)}
    assert {tuple(row) for row in data.view(-1, 33).tolist()} == cut


def test_documents_end_with_the_end_token(tokenizer: Tokenizer) -> None:
    ids = training_tokens(Recipe(), tokenizer, 1)
    assert ids[-1] == EOS_ID
    assert ids.count(EOS_ID) == ids.count(0) == 500


def test_rate_warms_up_and_decays() -> None:
    recipe = Recipe(steps=1000, warmup=100, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(1000)]
    assert max(rates) == rates[99] == pytest.approx(1.0)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)


class _Uniform(torch.nn.Module):
    """Gives every one of 8 tokens the same chance."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 8)})


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    for length in (2, 7, 8, 9, 17):
        assert train.perplexity(_Uniform(), [1] * length, 8) == pytest.approx(8.0)


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        train.train(Recipe(steps=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


def test_refuses_to_train_on_the_heldout_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="held-out"):
        train.train(Recipe(steps=1, seed=HELDOUT_SEED), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_command_line_reports_misuse_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    command = [sys.executable, "-m", "irq_convert.jobs.demo.train", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path} exists")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("demo")
    for name in ("one", "two"):
        code = train.main(["--out", str(folder / name), "--steps", "6", "--threads", "1"])
        assert code == 0
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_a_short_run_loads_and_has_learned(trained: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(corpus(31, 6)).input_ids
    assert train.perplexity(model, ids, 256) < 0.9 * model.config.vocab_size
    assert model.generate(torch.tensor([ids[:4]]), max_new_tokens=3, min_new_tokens=3).shape == (
        1,
        7,
    )
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(trained: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in trained)
    assert one.keys() == two.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in one.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = [[path.read_bytes() for path in sorted(f.glob("tok*"))] for f in trained]
    assert files[0] == files[1]
