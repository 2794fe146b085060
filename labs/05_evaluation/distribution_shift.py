"""The same problems with one thing changed: new names, new numbers, or new phrasing. What was learnt, the task or its surface?

    python distribution_shift.py                                  # show some problems, each beside its shifts
    python distribution_shift.py --model grpo --n 200             # ask a stage's checkpoint, or a folder's

Row i of a shift is row i of the plain test (lab 03's held-out problems) with that one thing changed, so that the difference
is measured on pairs (McNemar), as in GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229). Every answer is computed again
from the changed story; none is copied.

    names     somebody who occurs nowhere in the world, not even in what the base model read
    numbers   100 to 999 in place of 0 to 99, in every number told and in every result on the way
    phrasing  sentences that no word problem has, made of words that the world knows

A shift of numbers asks for a longer sum than any that was trained on: it measures whether arithmetic was learnt as a
procedure. A model that fails there has not been shown to reason badly in other ways.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from shared import LabsError, tiny_world
from shared.profiles import nearest

KINDS = ("names", "numbers", "phrasing")
LEVELS = (1, 2, 3)

# None of them is in the world's lists or begins another name there.
NEW_NAMES = (
    "Theo Ruth Wanda Owen Iris Hugh Jude Enid Liam Mabel Noah Thea Ralf Edith Omar Lucy Fritz Agnes Yuri Paula".split()
)
SMALLEST, LARGEST = 100, 999

HAS = "{name} has {have} {thing}."
ASKS = "How many {thing} does {name} have now?"
# Each in words that the tiny world's model has read, but never in a word problem, nor in this order.
NEW_HAS = ("There are {have} {thing} in the bag of {name}.", "The bag of {name} has {have} {thing}.")
NEW_GAINS = ("{name} buys {k} {thing} now.", "{name} finds {k} {thing} in {town}.", "On {day} {name} gets {k} {thing}.")
NEW_LOSSES = (
    "{name} gives {k} {thing} away now.",
    "{name} loses {k} {thing} in {town}.",
    "On {day} {name} sells {k} {thing}.",
)
NEW_ASKS = ("How many {thing} are in the bag of {name} now?", "What is the count of the {thing} that {name} has now?")


# ------------------------------------------------------------------------------------------------------------ one story
@dataclass(frozen=True)
class Story:
    """A word problem taken apart: who has how many of what, and the changes: (which sentence, +1 or -1, how many)."""

    name: str
    thing: str
    have: int
    changes: tuple[tuple[int, int, int], ...]

    def results(self) -> list[int]:
        """What is there after each change."""
        totals = [self.have]
        for _, sign, k in self.changes:
            totals.append(totals[-1] + sign * k)
        return totals[1:]

    def told(self) -> tuple[str, list[str], str]:
        """(first sentence, a sentence for each change, question) in the sentences of training."""
        changes = [
            (tiny_world.GAINS if sign > 0 else tiny_world.LOSSES)[which].format(name=self.name, k=k)
            for which, sign, k in self.changes
        ]
        return HAS.format(**vars(self)), changes, ASKS.format(**vars(self))

    def rephrased(self, rng: random.Random) -> tuple[str, list[str], str]:
        """The same in sentences that training never uses."""
        words = {"name": self.name, "thing": self.thing, "have": self.have}
        changes = []
        for _, sign, k in self.changes:
            place = {"town": rng.choice(tiny_world.TOWNS), "day": rng.choice(tiny_world.DAYS)}
            changes.append(rng.choice(NEW_GAINS if sign > 0 else NEW_LOSSES).format(**words, **place, k=k))
        return rng.choice(NEW_HAS).format(**words), changes, rng.choice(NEW_ASKS).format(**words)


def _pattern(template: str) -> re.Pattern:
    """A template as a pattern: words where names stand, digits where numbers do."""
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"\{(have|k)\}", r"(?P<\1>\\d+)", text)
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", text))


_HAS, _ASKS = _pattern(HAS), _pattern(ASKS)
_CHANGES = [
    (which, sign, _pattern(template))
    for sign, templates in ((1, tiny_world.GAINS), (-1, tiny_world.LOSSES))
    for which, template in enumerate(templates)
]


def read_story(question: str) -> Story:
    """A tiny-world word problem, taken apart. Raises LabsError for a text that is not one."""
    first, *sentences, asked = [*re.split(r"(?<=[.?])\s+", question.strip()), ""]
    if sentences:
        *sentences, asked = sentences
    begun, ended = _HAS.fullmatch(first), _ASKS.fullmatch(asked)
    found = [
        [(which, sign, int(match["k"])) for which, sign, pattern in _CHANGES if (match := pattern.fullmatch(sentence))]
        for sentence in sentences
    ]
    if not begun or not ended or not sentences or not all(len(each) == 1 for each in found):
        raise LabsError(
            f"not a word problem of the tiny world: {question[:80]!r}; shift rows of gsm8k_data_prep tiny_world"
        )
    return Story(begun["name"], begun["thing"], int(begun["have"]), tuple(each[0] for each in found))


# --------------------------------------------------------------------------------------------------------------- the shifts
def _renamed(story: Story, rng: random.Random) -> Story:
    return replace(story, name=rng.choice(NEW_NAMES))


def _renumbered(story: Story, rng: random.Random) -> Story | None:
    """Other numbers for the same signs: every number told and every result from SMALLEST to LARGEST. None without room."""
    # Backwards: between which totals the rest of the story has room, as each change is at least SMALLEST.
    low, high = [SMALLEST], [LARGEST]
    for _, sign, _ in reversed(story.changes):
        low.append(max(SMALLEST, low[-1] - sign * SMALLEST))
        high.append(min(LARGEST, high[-1] - sign * SMALLEST))
    if low[-1] > high[-1]:
        return None
    have = total = rng.randint(low.pop(), high.pop())
    changes = []
    for which, sign, _ in story.changes:
        lowest, highest = low.pop(), high.pop()
        room = highest - total if sign > 0 else total - lowest
        k = rng.randint(SMALLEST, room)
        total += sign * k
        changes.append((which, sign, k))
    return replace(story, have=have, changes=tuple(changes))


def shift_rows(rows: Sequence[Mapping[str, Any]], kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Lab 03's tiny-world test rows with one thing changed, in their order, in the same form.

    A row's change depends on `seed` and the row's own question, not on its neighbours. Raises LabsError for an unknown kind,
    for rows that are no tiny-world problems and for stories of more changes than numbers up to 999 have room for.
    """
    from reasoning_rows import as_prompt

    if kind not in KINDS:
        raise LabsError(f"unknown shift {kind!r}: {nearest(kind, KINDS)}")
    shifted = []
    for row in rows:
        rng = random.Random(f"shift {kind} {seed} {row['question']}")
        story = read_story(row["question"])
        if kind == "names":
            story = _renamed(story, rng)
        elif kind == "numbers":
            renumbered = _renumbered(story, rng)
            if renumbered is None:
                raise LabsError(f"{row['id']} has too many changes for numbers up to {LARGEST}: take fewer steps")
            story = renumbered
        first, changes, asked = story.rephrased(rng) if kind == "phrasing" else story.told()
        question = " ".join([first, *changes, asked])
        ### BEGIN SOLUTION
        totals = [story.have, *story.results()]
        steps = [
            f"{before} {'+' if sign > 0 else '-'} {k} = {after}"
            for before, (_, sign, k), after in zip(totals, story.changes, totals[1:], strict=False)
        ]
        ### END SOLUTION
        events = [change.removeprefix(f"{story.name} ").removesuffix(".") for change in changes]
        shifted.append(
            {
                **row,
                "id": f"{row['id']}/{kind}",
                "prompt": as_prompt(question, ""),
                "question": question,
                "answer": str(totals[-1]),
                "solution": tiny_world.worked_steps({"events": events, "steps": steps}),
            }
        )
    return shifted


def plain_problems(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lab 03's held-out problems, unshifted: with seed 0 the first `n` that its stages are judged on (levels 1, 2 and 3)."""
    from gsm8k_data_prep import tiny_problems

    return tiny_problems(seed, n, "test", LEVELS)


def shifted_problems(n: int, seed: int = 0, kind: str = "names") -> list[dict[str, Any]]:
    """`plain_problems(n, seed)` under one shift; row i of it is row i of those. Raises LabsError for an unknown kind."""
    return shift_rows(plain_problems(n, seed), kind, seed)


# ------------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class ShiftResult:
    """Flexible accuracy under a shift, beside the same rows unshifted."""

    kind: str
    n: int
    accuracy: float
    ci95: tuple[float, float]  # Wilson
    strict: float
    plain_accuracy: float
    difference: float  # shifted less plain, on the same rows
    difference_ci95: tuple[float, float]  # paired bootstrap
    p_value: float  # McNemar, exact
    right: list[bool]

    def line(self) -> str:
        low, high = self.ci95
        said = f"{self.kind:<9} {self.accuracy:.1%} of {self.n} right [{low:.1%}, {high:.1%}], strict {self.strict:.1%}"
        if self.kind == "plain":
            return said
        low, high = self.difference_ci95
        return f"{said}; change {self.difference:+.1%} [{low:+.1%}, {high:+.1%}], McNemar p = {self.p_value:.2g}"


def measure_shifts(
    ask: Callable[[Sequence[Mapping[str, Any]]], Sequence[str]],
    n: int = 200,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> list[ShiftResult]:
    """The accuracies, "plain" first. `ask` gives a reply to each problem, such as `lambda rows: ask(model, tokenizer, rows)`.

    Scored by lab 03's `judge`. An empty reply is a wrong answer. Raises LabsError where `ask` gives another number of replies.
    """
    from reasoning_stage import judge
    from shared.significance import mcnemar, paired_bootstrap, wilson_interval

    plain = plain_problems(n, seed)
    results: list[ShiftResult] = []
    for kind in ("plain", *kinds):
        rows = plain if kind == "plain" else shift_rows(plain, kind, seed)
        replies = list(ask(rows))
        if len(replies) != len(rows):
            raise LabsError(f"{len(replies)} replies to {len(rows)} problems ({kind}): give one for each")
        judged = judge(replies, rows)
        right = [bool(row.flexible) for row in judged]
        before = results[0].right if results else right
        paired = paired_bootstrap([float(x) for x in right], [float(x) for x in before])
        results.append(
            ShiftResult(
                kind=kind,
                n=n,
                accuracy=sum(right) / n,
                ci95=wilson_interval(sum(right), n),
                strict=sum(row.strict for row in judged) / n,
                plain_accuracy=sum(before) / n,
                difference=paired.difference,
                difference_ci95=(paired.low, paired.high),
                p_value=mcnemar(right, before),
                right=right,
            )
        )
    return results


# ------------------------------------------------------------------------------------------------------------ command line
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
def _command(
    model: Annotated[
        str | None, typer.Option(help="A stage (grpo), a folder or a hub id; without it, show problems.")
    ] = None,
    n: Annotated[int, typer.Option(help="So many problems of each kind.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Which problems and which changes.")] = 0,
    kinds: Annotated[str, typer.Option(help="Which shifts.")] = ",".join(KINDS),
    profile: Annotated[str | None, typer.Option(help="Whose checkpoint, where --model is a stage.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest reply.", min=1)] = 96,
    show: Annotated[int, typer.Option(help="Print so many problems with their shifts.", min=0)] = 2,
) -> None:
    chosen = [kind.strip() for kind in kinds.split(",")]
    parts = {"plain": plain_problems(n, seed), **{kind: shifted_problems(n, seed, kind) for kind in chosen}}
    for position in range(min(show, n)):
        for kind, rows in parts.items():
            typer.echo(f"[{kind}] {rows[position]['question']} → {rows[position]['answer']}")
        typer.echo("")
    if model is None:
        return
    from reasoning_stage import ask
    from shared.cli import locate_model
    from shared.models import load_model

    loaded, tokenizer = load_model(**locate_model(model, profile))
    for result in measure_shifts(lambda rows: ask(loaded, tokenizer, rows, max_new_tokens), n, seed, chosen):
        typer.echo(result.line())


if __name__ == "__main__":
    from shared.cli import run_app

    run_app(app)
