"""The tokenizer as GGUF holds it, of either kind that llama.cpp follows.

Everything is taken from the tokenizer that transformers makes of the folder, because that one gave
the model its tokens. "llama" is byte-fallback BPE with scores (SentencePiece), "gpt2" byte-level
BPE with merges and a rule for cutting text into words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.errors import UsageError
from irq_convert.jobs.export.gguf.pretokenizer import choose_rule
from irq_convert.jobs.export.gguf.spm_scores import merge_scores, spm_encoder
from irq_convert.jobs.export.gguf.tokenizer_samples import agreement
from irq_convert.remote_code import trusted

ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What goes under `tokenizer.ggml`.

    `model` is "llama" or "gpt2", `pre` the rule for words; `tokens` and `types` (`TokenType`) have
    one entry a row of the embeddings; `scores` are for "llama", `merges` ("left right") for "gpt2".
    `special` are token ids by role. `notes` are for a person.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None
    notes: tuple[str, ...] = field(default=())


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer in `folder` for embeddings of `rows` rows; rows without a token are padded.

    Raises `UsageError` when there is none, or none that llama.cpp would follow.
    """
    tokenizer = _load(folder)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw.get("model", {})
    if model.get("type") != "BPE":
        raise UsageError(
            f"{folder.name}: a tokenizer of type {model.get('type')}, and --to gguf writes BPE, "
            "byte-level or with byte fallback: use --to dense"
        )
    unknown = model.get("unk_token") or getattr(tokenizer, "unk_token", None)
    tokens, types, notes = _tokens(raw, rows, unknown, folder.name)
    special, more = _special(tokenizer, folder, types)
    notes += more
    with_bos, with_eos = _added(tokenizer)
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "add_bos": with_bos,
        "add_eos": with_eos,
        "chat_template": _template(tokenizer),
    }
    if model.get("byte_fallback"):
        return _sentencepiece(raw, common, notes)
    return _byte_level(raw, common, notes)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted()
        )
    except Exception as error:  # whatever a broken file or a missing class makes transformers raise
        detail = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{folder}: no tokenizer that transformers can load, and a GGUF file needs one: put "
            f"tokenizer.json and tokenizer_config.json there ({detail})"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{folder}: its tokenizer has no tokenizer.json form ({type(tokenizer).__name__}), "
            "which --to gguf reads: use --to dense"
        )
    return tokenizer


def _tokens(
    raw: Mapping[str, Any], rows: int, unknown: str | None, where: str
) -> tuple[list[str], list[int], list[str]]:
    """Text and type of every token, added ones spelled as in a prompt; and notes."""
    fallback = bool(raw["model"].get("byte_fallback"))
    texts: dict[int, str] = {number: text for text, number in raw["model"]["vocab"].items()}
    most = max(texts, default=-1)
    if most >= rows:
        raise UsageError(
            f"{where}: the tokenizer has token {most} ({texts[most]!r}), but the embeddings only "
            f"{rows} rows: llama.cpp needs a row for each; correct the tokenizer"
        )
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    if fallback:
        kinds |= {n: TokenType.BYTE for n, text in texts.items() if _is_byte(text)}
    for token in raw["added_tokens"]:
        number, text = token["id"], token["content"]
        control = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        kinds[number] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        if fallback and text == unknown:
            kinds[number] = TokenType.UNKNOWN
        texts[number] = text if control else text.replace("\u2581", " ")
    lost = ", ".join(repr(texts[number]) for number in sorted(texts) if number >= rows)
    notes = [f"left out, having no row in the embeddings: token {lost}"] if lost else []
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [int(kinds.get(number, TokenType.UNUSED)) for number in range(rows)]
    return tokens, types, notes


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _special(
    tokenizer: PreTrainedTokenizerBase, folder: Path, types: list[int]
) -> tuple[dict[str, int], list[str]]:
    """Token ids by role: the tokenizer's, else config.json's; and where generation also stops."""
    config = read_json_object(folder / "config.json")
    special = {}
    for role in ROLES:
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is None:
            number = config.get(f"{role}_token_id")
        if type(number) is int and 0 <= number < len(types):
            special[role] = number
    path = folder / "generation_config.json"
    found = read_json_object(path).get("eos_token_id") if path.is_file() else None
    stops = found if isinstance(found, list) else []
    tokens = [each for each in stops if type(each) is int and 0 <= each < len(types)]
    # llama.cpp knows control tokens that end a turn by their text; others have one key.
    others = [
        number
        for number in tokens
        if number != special.get("eos") and types[number] != TokenType.CONTROL
    ]
    if others:
        special["eot"] = others[0]
    where = "of generation_config.json"
    notes = [f"left out, being no token: {each!r} {where}" for each in stops if each not in tokens]
    if others[1:]:
        more = ", ".join(map(str, others[1:]))
        notes.append(f"llama.cpp will not stop at tokens {more} {where}")
    return special, notes


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding puts the first and the last special token around a text."""
    ids = list(tokenizer("a").input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bool(ids) and ids[0] == bos, len(ids) > 1 and ids[-1] == eos


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _sentencepiece(raw: dict[str, Any], common: dict[str, Any], notes: list[str]) -> Vocabulary:
    scores = merge_scores(raw, len(common["tokens"]))
    steps = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    prefix = '"Prepend"' in steps or '"always"' in steps or '"first"' in steps
    encode = spm_encoder(common["tokens"], common["types"], scores, prefix)
    found = agreement(raw, encode, common["tokens"])
    if not found.plain:
        raise UsageError(
            f"tokenizer: llama.cpp would cut text into other tokens than tokenizer.json (for "
            f"example {found.example!r}): use --to dense"
        )
    if found.different:
        notes = [*notes, f"llama.cpp {found.words()}"]
    return Vocabulary(
        "llama", "default", scores=scores, add_space_prefix=prefix, notes=tuple(notes), **common
    )


def _byte_level(raw: dict[str, Any], common: dict[str, Any], notes: list[str]) -> Vocabulary:
    rule, note = choose_rule(raw, common["tokens"])
    pairs = raw["model"]["merges"]
    # One string a pair; a space in a token is written as byte-level BPE writes it.
    merges = [
        " ".join(part.replace(" ", "\u0120") for part in pair) if isinstance(pair, list) else pair
        for pair in pairs
    ]
    if note is not None:
        notes = [*notes, note]
    return Vocabulary("gpt2", rule, merges=merges, notes=tuple(notes), **common)
