"""Scenes in which things are counted, hidden, lost, lent, painted, shared and bought."""

from __future__ import annotations

from irq_convert.jobs.demo import words
from irq_convert.jobs.demo.tale import Tale, a, amount, listing
from irq_convert.jobs.demo.words import NUMBERS, Noun, Person

Lines = list[str]


def counting(t: Tale) -> Lines:
    """Things are gained, given away and lost, and the number left is right."""
    owner, other = t.pair()
    thing, colour = t.fresh(words.THINGS), t.fresh(words.COLOURS)
    have, given = t.number(2, 9), 0
    verb = t.pick(("had", "found", "bought", "picked up"))
    lines = [f"{t.who(owner)} {verb} {amount(have, colour, thing)}."]
    for _ in range(t.number(1, 3)):
        step = t.number(1, 3)
        event = t.pick(("give", "lose", "find"))
        if event == "find" and have + step <= 12:
            lines.append(f"{t.who(owner)} found {NUMBERS[step]} more.")
            have, result = have + step, "That made"
        elif event == "give" and have >= step:
            lines.append(f"{t.who(owner)} gave {NUMBERS[step]} to {other.name}.")
            have, given, result = have - step, given + step, "That left"
        elif event == "lose" and have >= step:
            lost = "ate" if thing.food else t.pick(("lost", "dropped"))
            lines.append(f"{t.who(owner)} {lost} {NUMBERS[step]} of them.")
            have, result = have - step, "That left"
        else:
            continue
        if t.chance(0.7):
            left = amount(have, colour, thing)
            lines.append(t.pick((f"Now {owner.name} had {left}.", f"{result} {left}.")))
    _remember_count(t, owner, other, (have, colour, thing), given)
    return lines


def _remember_count(
    t: Tale, owner: Person, other: Person, left: tuple[int, str, Noun], given: int
) -> None:
    have, colour, thing = left
    question = f"how many {colour} {thing.many} do you have"
    t.remember(
        "count",
        f"{owner.name} still had {amount(have, colour, thing)}.",
        t.asked(question, NUMBERS[have] if have else "none", other, owner),
    )
    if given:
        t.remember(
            "given",
            f"{other.name} had {amount(given, colour, thing)} from {owner.name}.",
            t.asked(question, NUMBERS[given], owner, other),
        )


def hiding(t: Tale) -> Lines:
    """Something is put away, perhaps moved, and is found where it was put last."""
    keeper, other = t.pair()
    thing, colour = t.fresh(words.BELONGINGS), t.fresh(words.COLOURS)
    material, box = t.fresh(words.MATERIALS), t.fresh(words.CONTAINERS)
    spot = t.fresh(words.SPOTS)
    lines = [
        f"{t.who(keeper)} put the {colour} {thing} in the {material} {box}.",
        f"The {box} stood {spot}.",
    ]
    t.others()
    if t.chance(0.4):
        new, kind = t.fresh(words.CONTAINERS), t.fresh(words.MATERIALS)
        lines.append(
            f"Later {other.name} took the {thing} out of the {box} and hid it in the {kind} {new}."
        )
        material, box = kind, new
    t.remember(
        "hidden",
        f"The {colour} {thing} was still in the {material} {box}.",
        f"{keeper.name} looked in the {material} {box} and found the {colour} {thing}.",
        t.asked(f"where is the {colour} {thing}", f"it is in the {material} {box}", keeper, other),
    )
    return lines


def looking(t: Tale) -> Lines:
    """Something is lost, looked for in several spots and found in the last of them."""
    loser, helper = t.pair()
    thing, colour = t.fresh(words.BELONGINGS), t.fresh(words.COLOURS)
    spots = [t.fresh(words.SPOTS) for _ in range(t.number(2, 3))]
    lines = [f"{t.who(loser)} had lost {loser.hers} {colour} {thing}."]
    finder = t.pick((loser, helper))
    lines.append(f"{t.who(finder)} looked {listing(spots)}.")
    lines.append(f"The {colour} {thing} was {spots[-1]}.")
    t.others()
    t.remember(
        "lost",
        f"{loser.name} thanked {helper.name} for the {colour} {thing}.",
        t.asked(f"where was my {colour} {thing}", f"it was {spots[-1]}", loser, helper),
    )
    return lines


def lending(t: Tale) -> Lines:
    """Something is lent and comes back to the one it belongs to."""
    lender, borrower = t.pair()
    thing, colour = t.fresh(words.BELONGINGS), t.fresh(words.COLOURS)
    lines = [f"{t.who(lender)} lent {lender.hers} {colour} {thing} to {borrower.name}."]
    t.remember(
        "lent",
        f"{borrower.name} gave the {colour} {thing} back to {lender.name}.",
        t.asked(f"whose {colour} {thing} is this", f"it is {lender.name}'s", lender, borrower),
    )
    return lines


def painting(t: Tale) -> Lines:
    """Several things get a colour each, and keep it."""
    count = t.number(2, 3)
    things = [t.fresh(words.OBJECTS) for _ in range(count)]
    colours = [t.fresh(words.COLOURS) for _ in range(count)]
    coats = [f"the {x} {colour}" for x, colour in zip(things, colours, strict=True)]
    painter, other = t.pair()
    lines = [f"{t.who(painter)} painted {listing(coats)}."]
    i = t.number(0, count - 1)
    t.remember(
        "paint",
        f"They sat down by the {colours[i]} {things[i]}.",
        f"The {things[i]} was now {colours[i]}.",
        t.asked(f"what colour is the {things[i]}", colours[i], other, painter),
    )
    return lines


def liking(t: Tale) -> Lines:
    """Someone likes one food more than another and chooses it."""
    person, other = t.pair()
    foods = [thing for thing in words.THINGS if thing.food]
    best, second = t.fresh(foods), t.fresh(foods)
    lines = [f"{t.who(person)} liked {best.many} more than {second.many}."]
    shown = [a(best.one), a(second.one)]
    t.rng.shuffle(shown)
    lines.append(f"{t.who(other)} held out {listing(shown)}.")
    lines.append(f"{t.who(person)} took the {best.one}.")
    t.remember(
        "liking",
        t.asked(f"do you like {best.many} or {second.many} more", best.many, other, person),
    )
    return lines


def sharing(t: Tale) -> Lines:
    """An even number of things shared fairly between two."""
    half, thing = t.number(1, 6), t.fresh(words.THINGS)
    finder, other = t.pair()
    lines = [
        f"{t.who(finder)} shared {NUMBERS[2 * half]} {thing.many} with {other.name}.",
        f"Each of them got {NUMBERS[half]}.",
    ]
    t.others()
    return lines


def tally(t: Tale) -> Lines:
    """Things counted aloud, and how many there were."""
    thing, last = t.fresh(words.THINGS), t.number(3, 8)
    counter, _ = t.pair()
    lines = [
        f"{t.who(counter)} counted the {thing.many}: {', '.join(NUMBERS[1 : last + 1])}.",
        f"There were {NUMBERS[last]} {thing.many}.",
    ]
    t.others()
    return lines


def market(t: Tale) -> Lines:
    """Two prices and their sum."""
    buyer, _ = t.pair()
    first, second = t.fresh(words.THINGS), t.fresh(words.THINGS)
    low, high = t.number(2, 6), t.number(2, 6)
    lines = [
        f"At the market {a(first.one)} cost {NUMBERS[low]} coins and {a(second.one)} cost "
        f"{NUMBERS[high]} coins."
    ]
    t.others()
    if t.chance(0.6):
        lines.append(f"{t.who(buyer)} bought {a(first.one)} and {a(second.one)}.")
        lines.append(f"{t.who(buyer)} paid {NUMBERS[low + high]} coins.")
    else:
        cheap = first if low < high else second
        if low == high:
            lines.append("Both cost the same.")
        else:
            lines.append(f"The {cheap.one} was cheaper, so {buyer.name} bought the {cheap.one}.")
    return lines
