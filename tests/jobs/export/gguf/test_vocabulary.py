"""Tokenizers: the rule for words, scores, types and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf import TokenType

from irq_convert.errors import UsageError
from irq_convert.jobs.export.gguf.pretokenizer import RULES, choose_rule
from irq_convert.jobs.export.gguf.spm_scores import merge_scores, spm_encoder
from irq_convert.jobs.export.gguf.tokenizer_samples import ODD, PLAIN, agreement
from irq_convert.jobs.export.gguf.vocabulary import read_vocabulary
from tests.paths import ABSENT, DEMO, SHARED

MODELS = SHARED / "models"

CORPUS = [*PLAIN, *ODD] * 3


def train(split: str | None, ignore_merges: bool = False) -> dict[str, Any]:
    """tokenizer.json of byte-level BPE trained on the samples, words cut by `split`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        whole = pre_tokenizers.Sequence([cut, whole])
    tokenizer.pre_tokenizer = whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
    )
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    return raw


def tokens_of(raw: dict[str, Any]) -> list[str]:
    return sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)


@pytest.mark.parametrize(
    "rule", [r for r in RULES if "pattern" in r.steps[0]], ids=lambda r: r.name
)
def test_known_rules_are_recognized(rule: Any) -> None:
    raw = train(rule.steps[0]["pattern"]["Regex"], rule.ignore_merges)
    assert choose_rule(raw, tokens_of(raw)) == (rule.name, None)


def test_gpt2_and_another_spelling_of_it() -> None:
    raw = train(None)
    assert choose_rule(raw, tokens_of(raw)) == ("gpt-2", None)
    spelled = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    raw = train(spelled)
    assert choose_rule(raw, tokens_of(raw)) == ("gpt-2", None)


def test_a_rule_of_nobody_is_refused() -> None:
    raw = train(r"[aeiou]+|[^aeiou]+")
    with pytest.raises(UsageError, match="by a rule that llama"):
        choose_rule(raw, tokens_of(raw))


def test_end_tokens_that_are_none_are_left_out(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    settings = {"eos_token_id": [1, 5000, -1, "2", 348, 349]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = read_vocabulary(tmp_path, 1030)
    assert found.special == {"bos": 0, "eos": 1, "pad": 1, "eot": 348}
    where = "of generation_config.json"
    told = [f"left out, being no token: {each} {where}" for each in ("5000", "-1", "'2'")]
    assert [n for n in found.notes if where in n] == [
        *told,
        f"llama.cpp will not stop at tokens 349 {where}",
    ]


def test_the_demo_model_is_near_enough() -> None:
    found = read_vocabulary(DEMO, 1030)
    assert (found.model, found.pre) == ("gpt2", "qwen2")
    assert "ordinary text into the same tokens" in found.notes[0]
    assert found.special == {"bos": 0, "eos": 1, "pad": 1, "eot": 348}
    assert found.add_bos
    assert not found.add_eos
    assert found.types[:2] == [TokenType.CONTROL] * 2
    assert found.types[2:1024] == [TokenType.NORMAL] * 1022
    assert found.types[1024:] == [TokenType.UNUSED] * 6
    assert found.merges is not None
    assert len(found.merges) == 766
    raw = json.loads((DEMO / "tokenizer.json").read_text())
    assert found.tokens[:1024] == tokens_of(raw)


def test_more_tokens_than_rows() -> None:
    with pytest.raises(UsageError, match="has token 1023"):
        read_vocabulary(DEMO, 1000)


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_no_tokenizer(tmp_path: Path, damage: str) -> None:
    shutil.copy(DEMO / "config.json", tmp_path)
    if damage == "broken":
        (tmp_path / "tokenizer.json").write_text("{")
        shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        read_vocabulary(tmp_path, 1024)
    assert "\n" not in str(caught.value)


def test_added_tokens_and_template(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    raw = json.loads((DEMO / "tokenizer.json").read_text())
    for number, text, special in ((1024, "<|turn|>", False), (1025, "<tool>", False)):
        raw["added_tokens"].append(
            {**raw["added_tokens"][0], "id": number, "content": text, "special": special}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = read_vocabulary(tmp_path, 1026)
    assert found.tokens[1024:] == ["<|turn|>", "<tool>"]
    assert found.types[1024:] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    assert found.chat_template == "{{ messages[0].content }}"


stories = pytest.mark.skipif(not MODELS.is_dir(), reason=ABSENT)


@stories
@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_scores_order_as_sentencepiece(name: str) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = spm.SentencePieceProcessor(str(MODELS / name / "tokenizer.model"))
    raw = json.loads((MODELS / name / "tokenizer.json").read_text())
    count = model.vocab_size()
    scores = merge_scores(raw, count)
    made = {"".join(pair) for pair in raw["model"]["merges"]}
    ours = sorted((n for n in range(count) if model.IdToPiece(n) in made), key=lambda n: -scores[n])
    theirs = sorted(ours, key=lambda n: -model.GetScore(n))
    assert ours == theirs


@stories
def test_a_sentencepiece_vocabulary() -> None:
    found = read_vocabulary(MODELS / "stories260K", 512)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert found.types[:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert not found.notes
    assert found.merges is None


@stories
def test_scores_that_lead_elsewhere_are_seen() -> None:
    raw = json.loads((MODELS / "stories260K" / "tokenizer.json").read_text())
    found = read_vocabulary(MODELS / "stories260K", 512)
    assert found.scores is not None
    good = spm_encoder(found.tokens, found.types, found.scores, True)
    assert agreement(raw, good, found.tokens).different == 0
    flat = spm_encoder(found.tokens, found.types, [-1000.0] * 512, True)
    assert not agreement(raw, flat, found.tokens).plain


@stories
def test_the_class_of_llama_2_gives_the_same(tmp_path: Path) -> None:
    source = MODELS / "stories260K"
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_vocabulary(tmp_path, 512) == read_vocabulary(source, 512)
