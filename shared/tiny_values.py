"""The values that the micro-world is made of, divided into train and held-out, and the records and sentences made of them.

Used through `shared.tiny_world`, whose first lines say how the division is kept.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

SPLITS = ("train", "held_out")

# Short words keep the vocabulary small. The last fifth of each list, and at least three words, are held out.
NAMES = (
    "Ana Ben Cora Dan Eva Finn Gus Hana Ian Jana Kai Lea Max Nina Olaf Pia Ron Sara Tom Uma Vera Will Yara Zoe "
    "Abel Bela Carl Dora Emil Fay Gina Hugo Ida Jack Kira Lars Mona Nils Otto Rosa"
).split()
TOWNS = "Rome Lima Oslo Bonn Bern Kyiv Cork Nice Riga Graz Bath Porto Delhi Tunis Quito Paris Milan Leeds Tokyo Cairo".split()
THINGS = (
    "coins books pens cups hats keys maps nuts eggs pears plums figs beans rings bells lamps boats kites drums dolls "
    "stones cards shells boots spoons"
).split()
COLOURS = "red blue green black white grey pink brown gold teal tan lime".split()
JOBS = "baker pilot nurse clerk judge poet cook miner tutor guard smith coach".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
POOLS = {"name": NAMES, "town": TOWNS, "thing": THINGS, "colour": COLOURS, "job": JOBS, "day": DAYS}
LARGEST = 99


def is_held_out_number(number: int) -> bool:
    """One number in seven: 3, 10, 17 ... 94. Seven divides neither 10 nor 100, so every digit stays in training."""
    return number % 7 == 3


def is_held_out_sum(left: int, operator: str, right: int) -> bool:
    """One pair of operands in ten. `a + b` and `b + a` fall together, or the answer would be known from its mirror.

    A checksum divides the pairs without regard to their digits. A rule like (7·a + 3·b) % 10 would take all sums that end
    in one digit out of training, and the model would be blamed for never having seen it.
    """
    low, high = (left, right) if operator == "-" else sorted((left, right))
    return zlib.crc32(f"{low}{operator}{high}".encode()) % 10 == 0


def pool(kind: str, split: str) -> list[str]:
    """The words of one kind that belong to a split. Raises KeyError for an unknown kind, ValueError for a split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose one of {SPLITS}")
    words = POOLS[kind]
    border = len(words) - max(3, len(words) // 5)
    return words[:border] if split == "train" else words[border:]


def number(rng: random.Random, split: str, low: int = 2, high: int = LARGEST) -> int:
    """A number from low to high that belongs to the split."""
    while True:
        candidate = rng.randint(low, high)
        if is_held_out_number(candidate) == (split == "held_out"):
            return candidate


# ---------------------------------------------------------------------------------------------- records and sentences


@dataclass(frozen=True)
class RecordType:
    """A kind of record: which slots it has, how sentences tell it, how one asks for a slot in words."""

    name: str
    slots: dict[str, str]  # slot name in a schema -> kind of value ("number" or a key of POOLS)
    sentences: tuple[str, ...]  # the ways to tell a record that training may use
    held_out_sentences: tuple[str, ...]  # ways that it never sees
    questions: dict[str, str] = field(default_factory=dict)


RECORDS = (
    RecordType(
        "person",
        {"name": "name", "age": "number", "town": "town"},
        (
            "{name} is {age} years old and lives in {town}.",
            "{name} lives in {town} and is {age} years old.",
            "In {town} lives {name}, who is {age}.",
        ),
        ("The home of {name}, {age} years old, is in {town}.",),
        {"age": "How old is {name}?", "town": "Where does {name} live?"},
    ),
    RecordType(
        "stock",
        {"name": "name", "count": "number", "thing": "thing"},
        (
            "{name} has {count} {thing}.",
            "There are {count} {thing} in the bag of {name}.",
            "{name} owns {count} {thing}.",
        ),
        ("The bag of {name} has {count} {thing}.",),
        {"count": "How many {thing} does {name} have?", "thing": "What does {name} have?"},
    ),
    RecordType(
        "order",
        {"thing": "thing", "colour": "colour", "price": "number", "town": "town"},
        (
            "The {colour} {thing} from {town} cost {price}.",
            "In {town} the {colour} {thing} cost {price}.",
            "For {price} one can buy {colour} {thing} in {town}.",
        ),
        ("One can buy the {colour} {thing} from {town} for {price}.",),
        {"price": "How much do the {thing} cost?", "colour": "What colour are the {thing}?"},
    ),
    RecordType(
        "shift",
        {"name": "name", "job": "job", "day": "day"},
        (
            "{name} works as a {job} on {day}.",
            "On {day} {name} works as a {job}.",
            "The {job} on {day} is {name}.",
        ),
        ("The one who works on {day} as a {job} is {name}.",),
        {"job": "What is the job of {name}?", "day": "When does {name} work?"},
    ),
)


def value(rng: random.Random, kind: str, split: str) -> str | int:
    """A value of one kind ("number" or a key of POOLS) from a split."""
    return number(rng, split) if kind == "number" else rng.choice(pool(kind, split))


def record(rng: random.Random, kind: RecordType, split: str) -> dict[str, str | int]:
    """Random values for the slots of one record type, all from one split."""
    return {slot: value(rng, values, split) for slot, values in kind.slots.items()}


def mixed_record(rng: random.Random, kind: RecordType) -> dict[str, str | int]:
    """A record for pretraining: train values, and in every second record one held-out value among them."""
    values = record(rng, kind, "train")
    if rng.random() < 0.5:
        slot = rng.choice(list(kind.slots))
        values[slot] = value(rng, kind.slots[slot], "held_out")
    return values


def tell(rng: random.Random, kind: RecordType, values: dict, phrasing: str = "train") -> str:
    """The record as a sentence. `phrasing="held_out"` takes a sentence pattern that no training text uses."""
    return rng.choice(kind.sentences if phrasing == "train" else kind.held_out_sentences).format(**values)
