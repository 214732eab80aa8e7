"""Texts on which two tokenizers are compared before one is written in place of the other.

"Plain" samples are ordinary prose and every word of the vocabulary in it; "odd" ones runs of
spaces, tabs, other scripts, symbols. What differs on plain text is refused, on odd text reported.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]
MOST = 8_000
"""Tokens of a vocabulary that samples are made of: enough of the largest to see a difference."""
PLAIN = (
    "Once upon a time, there was a little dog named Rex. It wasn't big.",
    "He said: \"Hello! Who's there?\" Nobody answered; they're asleep, I think.",
    "In 1984 about 3,500 people (or 12.5%) lived there, and 7 of them had 1000000 coins.",
    "First line.\nSecond line - with a dash.\n\nA new paragraph begins here. The end.",
    "The cafe's owner, Mr. O'Neil, can't read e-mails: he'll call you at 10:30 tomorrow.",
)
ODD = (
    "two  spaces   three    four\t a tab\t\ttwo \r\n windows\r\n\r\nlines \n \n \n\n\n end  ",
    "def f(x):\n    return [x**2 for x in y if x != 3]  # comment\n\n\n\nclass A_b: pass",
    "I'VE TOLD 'im: WE'RE DONE!!! ...really??? ---- ==== '''''' \"\"\"\"",
    "Ça été naïve à Zürich, Straße; привет мир, Ελληνικά; 我想在这里工作, こんにちは 한국어",
    "3.14159 x3y4 v2.0-rc1 00123 1\u00b2 \u00bd \u2163 100\u20ac #tag @me a/b\\c a_b__c $x^{2}$",
    "\U0001f680 \U0001f9d1\u200d\U0001f33e\ufe0f ok\u2764\ufe0f \u00a0nbsp\u3000wide",
)


@dataclass(frozen=True)
class Agreement:
    """How two tokenizers agree: on all plain samples or not, and on how many of all `samples`.

    `example` is a text on which they differ, a plain one where there is one.
    """

    plain: bool
    different: int
    samples: int
    example: str | None

    def words(self) -> str:
        """Half a sentence about the odd samples."""
        return (
            f"cuts ordinary text into the same tokens, but {self.different} of {self.samples} "
            f"samples of odd text differently, for example {self.example!r}"
        )


def agreement(raw: Mapping[str, Any], encode: Encode, tokens: Sequence[str]) -> Agreement:
    """Compare `encode` with the tokenizer.json `raw`, no special tokens around the texts."""
    own = Tokenizer.from_str(json.dumps(raw))
    plain, odd = make_samples(own, tokens)
    wrong = []
    for texts in (plain, odd):
        expected = own.encode_batch(texts, add_special_tokens=False)
        wrong.append([t for t, e in zip(texts, expected, strict=True) if encode(t) != e.ids])
    every = wrong[0] + wrong[1]
    return Agreement(not wrong[0], len(every), len(plain) + len(odd), every[0] if every else None)


def make_samples(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Plain and odd samples; the words are what `tokenizer` makes of single tokens."""
    numbers = range(0, len(tokens), max(1, len(tokens) // MOST))
    added = tokenizer.get_added_tokens_decoder()
    texts = tokenizer.decode_batch([[number] for number in numbers if number not in added])
    words = sorted({text.strip() for text in texts if text.strip().isprintable()} - {""})
    letters = [word for word in words if word.isascii() and word.isalpha()]
    plain = [*PLAIN]
    plain += [" ".join(letters[at : at + 8]) + "." for at in range(0, len(letters), 8)]
    odd = [*ODD]
    odd += [" ".join(words[at : at + 8]) for at in range(0, len(words), 8)]
    odd += ["  ".join(words[at : at + 8]) for at in range(0, len(words), 32)]
    odd += ["".join(words[at : at + 4]) for at in range(0, len(words), 16)]
    return plain, odd


def changed(raw: Mapping[str, Any], **parts: Any) -> Encode:
    """The encoder of `raw` with some parts of tokenizer.json replaced; "model" parts merge."""
    other = copy.deepcopy(dict(raw))
    other["model"] |= parts.pop("model", {})
    tokenizer = Tokenizer.from_str(json.dumps(other | parts))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
