"""Scenes about animals, trades, towns, days and the weather: what is the same in every story."""

from __future__ import annotations

from irq_convert.jobs.demo import words
from irq_convert.jobs.demo.tale import Tale, a, listing

Lines = list[str]


def pet(t: Tale) -> Lines:
    """An animal with a name, and what such an animal always says and eats."""
    owner, other = t.pair()
    animal, name = t.fresh(words.ANIMALS), t.fresh(words.PET_NAMES)
    lines = [f"{t.who(owner)} had {a(animal.kind)} called {name}."]
    facts = [
        f"{name} {animal.sound} when {other.name} came near.",
        f"{name} liked to eat {animal.food}.",
        f"At night {name} slept in {animal.home}.",
    ]
    t.rng.shuffle(facts)
    lines += facts[: t.number(1, 3)]
    t.others()
    t.remember(
        "pet",
        f"{name} the {animal.kind} {animal.sound} loudly.",
        t.asked(f"what is your {animal.kind} called", name, other, owner),
        t.asked(f"what does {name} eat", animal.food, other, owner),
    )
    return lines


def job(t: Tale) -> Lines:
    """A relative with a trade and everything that belongs to it."""
    child, other = t.pair()
    kin, female = t.pick(words.RELATIVES)
    worker, trade = t.person(female), t.fresh(words.JOBS)
    lines = [f"{child.name}'s {kin} {worker.name} was {a(trade.title)}."]
    t.others()
    facts = [
        f"Every day {worker.name} {trade.work}.",
        f"{worker.name} worked at {trade.place} with {trade.tool}.",
    ]
    lines += facts[: t.number(1, 2)]
    t.remember(
        "job",
        f"They saw {worker.name} the {trade.title}, who {trade.work}.",
        t.asked(f"what does your {kin} need at work", trade.tool, other, child),
        t.asked(f"where does {worker.name} work", f"at {trade.place}", other, child),
    )
    return lines


def travel(t: Tale) -> Lines:
    """A trip to a town of the island, with what is always true of it."""
    traveller, other = t.pair()
    town = t.fresh(words.TOWNS)
    t.others()
    lines = [f"{traveller.name} and {other.name} took the road to {town.name}."]
    lines.append(
        t.pick(
            (f"{town.name} is known for its {town.known_for}.", f"North of it lies {town.north}.")
        )
    )
    bought = t.chance(0.6)
    if bought:
        lines.append(f"In {town.name} {traveller.name} bought some {town.known_for}.")
    t.remember(
        "town",
        f"They told everyone about the {town.known_for} of {town.name}.",
        t.asked(f"what is {town.name} known for", f"its {town.known_for}", other, traveller),
        t.asked(f"what lies north of {town.name}", town.north, other, traveller),
    )
    return lines


def journey(t: Tale) -> Lines:
    """A way out past three places, and the same way back in the opposite order."""
    stops = [t.fresh(words.PLACES) for _ in range(3)]
    walker = t.hero.name if t.chance(0.5) else "they"
    t.others()
    return [
        f"First {walker} came to the {stops[0]}, then to the {stops[1]} "
        f"and at last to the {stops[2]}.",
        f"On the way back {walker} passed the {stops[2]}, then the {stops[1]} "
        f"and at last the {stops[0]}.",
    ]


def sizes(t: Tale) -> Lines:
    """Three animals compared; their order of size is the same in every story."""
    three = sorted((t.fresh(words.ANIMALS) for _ in range(3)), key=lambda animal: animal.size)
    small, middle, large = (animal.kind for animal in three)
    t.others()
    lines = [f"In the yard they saw {listing([a(x.kind) for x in t.rng.sample(three, 3)])}."]
    if t.chance(0.5):
        lines.append(f"The {large} was bigger than the {middle}.")
        lines.append(f"The {middle} was bigger than the {small}.")
    lines.append(
        t.pick((f"The {small} was the smallest.", f"The {large} was the biggest of the three."))
    )
    return lines


def week(t: Tale) -> Lines:
    """Days that follow one another, each with its chore."""
    worker, other = t.pair()
    start = t.number(0, 6)
    chores = [t.fresh(words.CHORES) for _ in range(t.number(2, 3))]
    days = [words.DAYS[(start + i) % 7] for i in range(len(chores))]
    lines = []
    for day, chore in zip(days, chores, strict=True):
        subject = t.who(worker)
        lines.append(f"On {day} {subject if subject == worker.name else worker.she} {chore}.")
    i = t.number(0, len(days) - 1)
    t.remember(
        "week",
        f"{other.name} was glad that {worker.name} {chores[i]} on {days[i]}.",
        f"{worker.name} told {other.name} how {worker.she} {chores[i]} on {days[i]}.",
    )
    return lines


def sky(t: Tale) -> Lines:
    """The weather and what one does about it."""
    cause, verb, thing = t.fresh(words.SKIES)
    person, other = t.pair()
    t.others()
    lines = [f"{cause}, so {person.name} {verb} {person.hers} {thing}."]
    if t.chance(0.4):
        lines.append(f"{other.name} had no {thing}, but {person.name} helped {other.her}.")
    return lines


def opposites(t: Tale) -> Lines:
    """Two things of which one has a property and the other its opposite."""
    pair = t.fresh(words.OPPOSITES)
    first, second = pair if t.chance(0.5) else pair[::-1]
    one, other = t.fresh(words.OBJECTS), t.fresh(words.CONTAINERS)
    t.others()
    return [
        t.pick(
            (
                f"The {one} was {first}, but the {other} was {second}.",
                f"The {other} was not {first}. It was {second}.",
            )
        )
    ]
