"""The state of one story while it is being told: its people, its last subject, its facts.

A `Tale` hands out people, things and colours that are not used yet, turns a repeated subject into
a pronoun, and remembers facts in the words in which they may be recalled later.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from irq_convert.jobs.demo import words
from irq_convert.jobs.demo.words import Noun, Person

T = TypeVar("T")


def cap(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(parts: Sequence[str]) -> str:
    """One or more parts as "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def amount(number: int, colour: str, thing: Noun) -> str:
    """A counted noun such as "two red apples", "one red apple" or "no red apples"."""
    return f"{words.NUMBERS[number]} {colour} {thing.one if number == 1 else thing.many}"


class Tale:
    """One story in the making, drawn from `rng`; nothing else decides what happens in it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.recalls: dict[str, list[str]] = {}
        self._used: set[object] = set()
        self._subject: Person | None = None
        self.hero = self.person()
        self.friend = self.person()

    def pick(self, options: Sequence[T]) -> T:
        """Any one of `options`."""
        return self.rng.choice(options)

    def fresh(self, options: Sequence[T]) -> T:
        """One of `options` that this story has not used; all of them again once they run out."""
        unused = [option for option in options if option not in self._used]
        choice = self.rng.choice(unused or options)
        self._used.add(choice)
        return choice

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def person(self, female: bool | None = None) -> Person:
        """A new character with an unused name."""
        if female is None:
            female = self.chance(0.5)
        if female:
            return Person(self.fresh(words.GIRLS), "she", "her", "her")
        return Person(self.fresh(words.BOYS), "he", "him", "his")

    def pair(self) -> tuple[Person, Person]:
        """The two main characters in either order."""
        return (self.hero, self.friend) if self.chance(0.6) else (self.friend, self.hero)

    def who(self, person: Person) -> str:
        """`person` as the subject of the next sentence: often a pronoun when just spoken of."""
        same = self._subject is person
        self._subject = person
        return cap(person.she) if same and self.chance(0.75) else person.name

    def others(self) -> None:
        """Says that the last sentence had another subject, so that no pronoun follows it."""
        self._subject = None

    def remember(self, key: str, *sentences: str) -> None:
        """Keeps a fact, in one or more wordings; a newer fact under the same key replaces it."""
        self.recalls[key] = list(sentences)

    def asked(self, question: str, answer: str, by: Person, of: Person) -> str:
        """A question and its answer as direct speech."""
        return f'"{cap(question)}?" asked {by.name}. "{cap(answer)}," said {of.name}.'
