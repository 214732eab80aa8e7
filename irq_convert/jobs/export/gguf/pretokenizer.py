"""Which of llama.cpp's rules for cutting text into words a byte-level tokenizer follows.

llama.cpp knows the rules by name (`tokenizer.ggml.pre`) and refuses others. Its own converter
recognizes published tokenizers by a hash of what they make of one text. Here the rule itself is
compared, so that a tokenizer trained anew with a known rule is recognized too; failing that, the
tokens that each rule leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irq_convert.errors import UsageError
from irq_convert.jobs.export.gguf.tokenizer_samples import Agreement, agreement, changed

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, _byte_level(False)]


@dataclass(frozen=True)
class Rule:
    """A rule by llama.cpp's name: the steps of tokenizer.json that do the same, and whether words
    that are tokens are taken whole."""

    name: str
    steps: list[dict[str, Any]]
    ignore_merges: bool = False


RULES = (
    Rule("llama-bpe", _split(_LETTERS + r"\p{N}{1,3}" + _REST), ignore_merges=True),
    Rule("qwen2", _split(_LETTERS + r"\p{N}" + _REST)),
    Rule("tekken", _split(_TEKKEN), ignore_merges=True),
    Rule("dbrx", _split(_LETTERS + r"\p{N}{1,3}" + _REST)),
    Rule("gpt-2", [_byte_level(True)]),
    Rule("smollm", [{"type": "Digits", "individual_digits": True}, _byte_level(True)]),
)


def choose_rule(raw: Mapping[str, Any], tokens: Sequence[str]) -> tuple[str, str | None]:
    """The name of the rule that tokenizer.json `raw` follows, and a note where it is not the same.

    A rule is taken when it is spelled alike, else the one that gives equal tokens on most samples,
    if on all plain ones. Raises `UsageError` when there is none.
    """
    steps, whole = _steps(raw), bool(raw["model"].get("ignore_merges"))
    for rule in RULES:
        if steps == [_essence(step) for step in rule.steps] and whole == rule.ignore_merges:
            return rule.name, None
    found: list[tuple[Agreement, Rule]] = []
    for rule in RULES:
        encode = changed(
            raw,
            pre_tokenizer={"type": "Sequence", "pretokenizers": rule.steps},
            model={"ignore_merges": rule.ignore_merges},
        )
        found.append((agreement(raw, encode, tokens), rule))
    best, rule = min(
        found,
        key=lambda pair: (not pair[0].plain, pair[0].different, pair[1].ignore_merges != whole),
    )
    if not best.plain:
        raise UsageError(
            f"tokenizer.json cuts text into words by a rule that llama.cpp does not have (nearest: "
            f"{rule.name}, different for {best.example!r}), so no GGUF file can hold it: use --to "
            "dense"
        )
    if not best.different:
        return rule.name, None
    return rule.name, f"tokenizer: llama.cpp's rule {rule.name!r} comes nearest; it {best.words()}"


def _steps(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = raw.get("pre_tokenizer") or {}
    steps = own.get("pretokenizers", [own]) if own.get("type") == "Sequence" else [own]
    return [_essence(step) for step in steps]


def _essence(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what does not decide tokens."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
