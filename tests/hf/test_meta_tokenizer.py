"""Meta's tokenizer.model as a fast tokenizer: the ids that Meta's own code gives."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from irq_convert.errors import IrqError
from irq_convert.hf.meta_tokenizer import is_tiktoken, tokenizer_files
from tests.folders import assert_one_line

TEXT = ["Once upon a time there was a cat.", "The cat  saw a dog, and the dog saw the cat!"] * 20
CONFIG = {"vocab_size": 700, "max_position_embeddings": 4096}


def train_pieces(path: Path, size: int = 340) -> Path:
    """A SentencePiece model with the settings of LLaMA's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def load(folder: Path, files: dict[str, bytes]) -> Any:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """SentencePiece's own processor, and the fast tokenizer made of its file."""
    folder = tmp_path_factory.mktemp("pieces")
    path = train_pieces(folder / "tokenizer.model")
    fast = load(folder / "fast", tokenizer_files(path, CONFIG))
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), fast


@settings(max_examples=150)
@given(st.text(st.sampled_from("The catdogsw .,!\n\té本0123"), max_size=40))
def test_ids_are_those_of_sentencepiece(pieces: tuple[Any, Any], text: str) -> None:
    model, fast = pieces
    ids = fast(text)["input_ids"]
    assert ids == [model.bos_id(), *model.encode(text)]
    assert fast.decode(ids, skip_special_tokens=True) == text


def test_the_settings(pieces: tuple[Any, Any]) -> None:
    _, fast = pieces
    assert (fast.bos_token, fast.eos_token, fast.unk_token) == ("<s>", "</s>", "<unk>")
    assert (fast.bos_token_id, fast.eos_token_id) == (1, 2)
    assert fast.model_max_length == 4096


def write_ranks(path: Path) -> dict[bytes, int]:
    """Ranks as tiktoken lists them: all bytes, then some pairs."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"the", b" c", b"at", b" cat", b"\n\n"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines))
    return ranks


@pytest.mark.parametrize("later", [False, True])
def test_ranks_of_llama_3(tmp_path: Path, later: bool) -> None:
    path = tmp_path / "tokenizer.model"
    ranks = write_ranks(path)
    assert is_tiktoken(path)
    config = CONFIG | ({"rope_scaling": {}} if later else {})
    fast = load(tmp_path / "fast", tokenizer_files(path, config))
    begin = len(ranks)
    assert fast("the cat")["input_ids"] == [begin, ranks[b"the"], ranks[b" cat"]]
    assert fast.decode(fast("é 本\n\n")["input_ids"], skip_special_tokens=True) == "é 本\n\n"
    assert len(fast) == begin + 256
    assert fast.convert_tokens_to_ids("<|eot_id|>") == begin + 9
    assert fast.convert_tokens_to_ids("<|python_tag|>") == (begin + 10 if later else None)
    last = "<|reserved_special_token_247|>" if later else "<|reserved_special_token_250|>"
    assert fast.convert_tokens_to_ids(last) == begin + 255
    assert (fast.bos_token, fast.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(IrqError) as caught:
        tokenizer_files(path, CONFIG)
    assert_one_line(str(caught.value), str(path), "no tokenizer of Meta's")
    train_pieces(path)
    with pytest.raises(IrqError, match="340 tokens, the model 300 embeddings"):
        tokenizer_files(path, CONFIG | {"vocab_size": 300})
