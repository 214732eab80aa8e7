"""The stories: the same for a seed, different between seeds, and true to their own facts."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys

from irq_convert.jobs.demo import corpus, words


def test_same_seed_same_text_in_another_process() -> None:
    program = (
        "import sys; from irq_convert.jobs.demo.corpus import corpus; print(corpus(11, 40), end='')"
    )
    expected = corpus.corpus(11, 40).encode()
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(expected).digest()


def test_seeds_differ_and_share_no_story() -> None:
    one, other = (set(corpus.corpus(seed, 300).split(corpus.SEPARATOR)) for seed in (1, 2))
    assert len(one) == len(other) == 300
    assert not one & other


def test_a_longer_corpus_begins_with_the_shorter_one() -> None:
    assert corpus.corpus(3, 20).startswith(corpus.corpus(3, 10) + corpus.SEPARATOR)


def test_story_follows_the_generator_it_is_given() -> None:
    rng = random.Random(5)
    assert corpus.SEPARATOR.join([corpus.story(rng), corpus.story(rng)]) == corpus.corpus(5, 2)


def test_vocabulary_and_length() -> None:
    text = corpus.corpus(4, 2000)
    vocabulary = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
    assert 400 <= len(vocabulary) <= 700
    assert 60_000 <= len(corpus.heldout().encode()) <= 120_000
    assert text.isascii()


def test_heldout_is_the_text_of_its_own_seed() -> None:
    text = corpus.heldout()
    assert text == corpus.corpus(corpus.HELDOUT_SEED, corpus.HELDOUT_STORIES)
    assert not set(text.split(corpus.SEPARATOR)) & set(
        corpus.corpus(1, 3000).split(corpus.SEPARATOR)
    )


def test_counts_follow_from_the_events() -> None:
    """Replays gains and losses from the text alone and compares with every stated count."""
    stories = corpus.corpus(6, 1500).split(corpus.SEPARATOR)
    assert sum(_replay(text) for text in stories) > 500


def _replay(text: str) -> int:
    checked, have = 0, -1
    for sentence in text.split(". "):
        start = re.match(r"(?:\w+) (?:had|found|bought|picked up) (\w+) \w+ \w+$", sentence)
        event = re.match(
            r"\w+ (found|gave|ate|lost|dropped) (\w+) (?:more|to \w+|of them)$", sentence
        )
        stated = re.match(r"(?:Now \w+ had|That made|That left) (\w+) \w+ \w+$", sentence)
        if start and start[1] in words.NUMBERS:
            have = words.NUMBERS.index(start[1])
        elif event and event[2] in words.NUMBERS and have >= 0:
            step = words.NUMBERS.index(event[2])
            have += step if event[1] == "found" else -step
        elif stated and have >= 0:
            assert words.NUMBERS[have] == stated[1], (text, sentence)
            checked += 1
    return checked


def test_facts_of_the_world_never_change() -> None:
    text = corpus.corpus(8, 3000)
    for town in words.TOWNS:
        said = set(re.findall(rf"{town.name} is known for its (\w+)\.", text))
        assert said == {town.known_for}
    order = {animal.kind: animal.size for animal in words.ANIMALS}
    compared = re.findall(r"The (\w+) was bigger than the (\w+)\.", text)
    assert len(compared) > 100
    assert all(order[large] > order[small] for large, small in compared)
