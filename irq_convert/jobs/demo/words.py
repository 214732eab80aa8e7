"""The word lists of the demo's stories: people, things, places, and the fixed facts of their world.

Everything here was written for this project. Some lists are free choices (names, colours), others
are facts that never change from story to story (what a duck says, what a smith uses, which town
lies north of which), so that a model has to keep them in its weights.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """A character: a name and the pronouns that go with it."""

    name: str
    she: str
    her: str
    hers: str  # the possessive before a noun: "her", "his"


@dataclass(frozen=True)
class Noun:
    """A countable thing in both numbers; `food` says whether it can be eaten."""

    one: str
    many: str
    food: bool = False


@dataclass(frozen=True)
class Animal:
    """An animal and what is always true of it; `size` orders the animals from small to large."""

    kind: str
    size: int
    sound: str
    food: str
    home: str


@dataclass(frozen=True)
class Job:
    """A trade: what one who has it does all day, with what, and where."""

    title: str
    work: str
    tool: str
    place: str


@dataclass(frozen=True)
class Town:
    """A town of the stories' island, what it is known for, and what lies north of it."""

    name: str
    known_for: str
    north: str


def _each(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _each(
    "Mia Anna Clara Dora Ella Freya Greta Hanna Ida Julia Lena Maud Nora Olive Petra Rosa "
    "Sonia Tilda Vera Wilma"
)
BOYS = _each(
    "Tom Adam Ben Carl David Emil Felix Gus Hugo Ivan Jonas Karl Leo Max Nils Oscar "
    "Paul Robin Simon Victor"
)
PET_NAMES = _each("Pepper Button Clover Biscuit Ginger Shadow Whisper Pebble Acorn Thistle")

COLOURS = _each("red blue green yellow white black brown grey pink orange purple silver")

THINGS = (
    Noun("apple", "apples", food=True),
    Noun("pear", "pears", food=True),
    Noun("plum", "plums", food=True),
    Noun("berry", "berries", food=True),
    Noun("cherry", "cherries", food=True),
    Noun("onion", "onions", food=True),
    Noun("cake", "cakes", food=True),
    Noun("egg", "eggs", food=True),
    Noun("button", "buttons"),
    Noun("ribbon", "ribbons"),
    Noun("candle", "candles"),
    Noun("stone", "stones"),
    Noun("shell", "shells"),
    Noun("feather", "feathers"),
    Noun("marble", "marbles"),
    Noun("flower", "flowers"),
    Noun("leaf", "leaves"),
    Noun("cup", "cups"),
    Noun("brick", "bricks"),
    Noun("bead", "beads"),
    Noun("sock", "socks"),
    Noun("pencil", "pencils"),
    Noun("bottle", "bottles"),
    Noun("ball", "balls"),
)
BELONGINGS = _each(
    "key hat kite coat scarf book lamp drum ring boot whistle glove spoon map bell mirror"
)
OBJECTS = _each("door gate boat fence chair wagon barn table bench roof")
CONTAINERS = _each("box basket bag drawer bucket jar chest sack")
MATERIALS = _each("wooden iron old little round heavy")
SPOTS = (
    "under the bed",
    "behind the door",
    "on the shelf",
    "next to the stove",
    "under the table",
    "behind the curtain",
    "beside the well",
    "on the stairs",
    "in the garden",
    "in the kitchen",
)

PLACES = _each(
    "bridge mill tower lake forest harbour meadow castle school hill island village "
    "orchard beach church cave"
)

ANIMALS = (
    Animal("mouse", 1, "squeaked", "cheese", "a hole in the wall"),
    Animal("frog", 2, "croaked", "flies", "the pond"),
    Animal("hen", 3, "clucked", "corn", "the coop"),
    Animal("duck", 4, "quacked", "bread", "the pond"),
    Animal("cat", 5, "purred", "fish", "a basket by the fire"),
    Animal("fox", 6, "yelped", "rabbits", "a den under the hill"),
    Animal("dog", 7, "barked", "bones", "the kennel"),
    Animal("sheep", 8, "bleated", "clover", "the fold"),
    Animal("pig", 9, "grunted", "turnips", "the sty"),
    Animal("donkey", 10, "brayed", "thistles", "the shed"),
    Animal("cow", 11, "mooed", "grass", "the barn"),
    Animal("horse", 12, "neighed", "hay", "the stable"),
)

JOBS = (
    Job("baker", "baked bread", "an oven", "the bakery"),
    Job("smith", "shaped iron", "a hammer", "the forge"),
    Job("tailor", "sewed coats", "a needle", "the shop"),
    Job("fisher", "caught fish", "a net", "the harbour"),
    Job("farmer", "ploughed the fields", "a plough", "the farm"),
    Job("painter", "painted pictures", "a brush", "the studio"),
    Job("miller", "ground flour", "a millstone", "the mill"),
    Job("teacher", "taught children", "a blackboard", "the school"),
    Job("gardener", "planted roses", "a spade", "the garden"),
    Job("carpenter", "built chairs", "a saw", "the workshop"),
    Job("doctor", "healed the sick", "medicine", "the hospital"),
    Job("shepherd", "watched the sheep", "a whistle", "the meadow"),
)
RELATIVES = (
    ("mother", True),
    ("aunt", True),
    ("sister", True),
    ("grandmother", True),
    ("father", False),
    ("uncle", False),
    ("brother", False),
    ("grandfather", False),
)

TOWNS = (
    Town("Brill", "cheese", "Dorn"),
    Town("Dorn", "clocks", "Esker"),
    Town("Esker", "wool", "Farrow"),
    Town("Farrow", "honey", "Gresh"),
    Town("Gresh", "salt", "the sea"),
    Town("Hallow", "glass", "Brill"),
    Town("Inver", "boats", "Hallow"),
    Town("Jorvan", "apples", "Inver"),
    Town("Kestle", "paper", "Jorvan"),
    Town("Lorne", "music", "Kestle"),
)

NUMBERS = _each("no one two three four five six seven eight nine ten eleven twelve")
DAYS = _each("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
CHORES = (
    "washed the floor",
    "baked a cake",
    "mended the roof",
    "swept the yard",
    "wrote a letter",
    "cut the grass",
    "read a book",
    "cleaned the windows",
    "went fishing",
    "sang in the choir",
)
OPPOSITES = (
    ("hot", "cold"),
    ("heavy", "light"),
    ("big", "small"),
    ("clean", "dirty"),
    ("wet", "dry"),
    ("new", "old"),
    ("cheap", "dear"),
    ("strong", "weak"),
    ("smooth", "rough"),
    ("plain", "pretty"),
)
TRAITS = _each("kind clever brave shy careful cheerful curious honest patient quiet")
SKIES = (
    ("It began to rain", "opened", "umbrella"),
    ("It began to snow", "put on", "gloves"),
    ("The sun was hot", "looked for", "straw hat"),
    ("The wind blew hard", "held on to", "cap"),
    ("It grew dark", "lit", "lantern"),
    ("The path was muddy", "put on", "boots"),
)
TIMES = (
    "One cold morning",
    "One warm evening",
    "One day in spring",
    "One day in summer",
    "One day in autumn",
    "One day in winter",
    "Long ago",
    "Early one morning",
    "Late one afternoon",
)
# How a story's mood at the beginning is resolved at the end.
MOODS = (
    ("sad", "cheerful again"),
    ("tired", "full of life"),
    ("lonely", "among friends"),
    ("hungry", "full"),
    ("worried", "calm"),
    ("bored", "full of ideas"),
)
