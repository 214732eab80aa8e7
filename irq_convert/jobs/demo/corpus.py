"""Little stories from a seeded grammar: the text the demo model was trained and is measured on.

A story has two main characters, some scenes in which things change hands, are put away, counted,
painted or compared, and an end that recalls what happened. Counts, owners, colours and places stay
consistent within a story; trades, animals and towns are the same in all of them. The generator is
pure Python and depends on nothing but the seed.
"""

from __future__ import annotations

import random

from irq_convert.jobs.demo import scenes
from irq_convert.jobs.demo.tale import Tale

SEPARATOR = "\n\n"
HELDOUT_SEED = 7_000_003
HELDOUT_STORIES = 150


def story(rng: random.Random) -> str:
    """One story, a single paragraph of some 60 to 150 words, drawn from `rng`."""
    tale = Tale(rng)
    lines = scenes.opening(tale)
    told: set[str] = set()
    for _ in range(rng.randint(3, 5)):
        scene = tale.pick([scene for scene in scenes.MIDDLE if scene.__name__ not in told])
        told.add(scene.__name__)
        lines += scene(tale)
    facts = sorted(tale.recalls)
    for key in rng.sample(facts, min(len(facts), rng.randint(2, 4))):
        lines.append(tale.pick(tale.recalls[key]))
    lines += scenes.closing(tale)
    return " ".join(lines)


def corpus(seed: int, stories: int) -> str:
    """`stories` stories from `seed`, separated by a blank line; the same text for the same seed."""
    rng = random.Random(seed)
    return SEPARATOR.join(story(rng) for _ in range(stories))


def heldout() -> str:
    """The text that perplexity is measured on, about 90 KB, from a seed not trained on."""
    return corpus(HELDOUT_SEED, HELDOUT_STORIES)
