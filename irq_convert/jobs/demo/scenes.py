"""The order of a story's scenes: how it opens and closes, and what may happen in between.

A scene takes the tale so far and returns its sentences. It draws its people and things, keeps
counts and places consistent while it goes on, and leaves facts for the story to recall later.
"""

from __future__ import annotations

from irq_convert.jobs.demo import scenes_things, scenes_world, words
from irq_convert.jobs.demo.tale import Tale, a, cap

Lines = list[str]


def opening(t: Tale) -> Lines:
    """Who the story is about, where they are and how they feel."""
    hero, friend, place = t.hero, t.friend, t.fresh(words.PLACES)
    time, trait = t.pick(words.TIMES), t.pick(words.TRAITS)
    girl = "girl" if hero.she == "she" else "boy"
    lines = t.pick(
        (
            [f"{time}, {hero.name} went to the {place} with {friend.name}."],
            [f"{time}, {hero.name} met {friend.name} at the {place}."],
            [
                f"{time}, {a(trait)} {girl} called {hero.name} lived near the {place}.",
                f"{cap(hero.hers)} best friend was {friend.name}.",
            ],
            [f"{hero.name} and {friend.name} lived in a house by the {place}."],
        )
    )
    t.others()
    t.remember("place", f"{hero.name} and {friend.name} walked home from the {place}.")
    if t.chance(0.4):
        before, after = t.pick(words.MOODS)
        lines.append(f"{t.who(hero)} was {before} that day.")
        t.remember("mood", f"{hero.name} was not {before} any more. {cap(hero.she)} was {after}.")
    return lines


def closing(t: Tale) -> Lines:
    """The last words of a story."""
    hero, friend = t.hero.name, t.friend.name
    return [
        t.pick(
            (
                f"In the evening {hero} and {friend} were tired but happy.",
                f"Then {hero} said good night to {friend}.",
                f"{friend} thanked {hero}, and they went home.",
                f"It had been a good day for {hero} and {friend}.",
            )
        )
    ]


# Drawn from by weight: a scene named twice is told more often.
MIDDLE = (
    scenes_things.counting,
    scenes_things.counting,
    scenes_things.counting,
    scenes_things.hiding,
    scenes_things.hiding,
    scenes_world.pet,
    scenes_world.pet,
    scenes_world.job,
    scenes_world.travel,
    scenes_world.journey,
    scenes_things.market,
    scenes_world.sizes,
    scenes_world.week,
    scenes_world.sky,
    scenes_things.liking,
    scenes_things.looking,
    scenes_things.painting,
    scenes_things.painting,
    scenes_world.opposites,
    scenes_things.sharing,
    scenes_things.lending,
    scenes_things.tally,
)
