"""How good the labels are: agreement beyond chance, attention checks, habits of each labeler, and which model wins.

All functions take a `LabelStore`, or the rows of its `preferences()`: live labels, in terms of response_a and response_b.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from label_files import by_example, training_rows, verdict
from label_store import LabelStore
from shared import LabsError
from shared.pairwise import win_rate_interval
from shared.significance import cohens_kappa, krippendorff_alpha, wilson_interval

Labels = LabelStore | Sequence[Mapping[str, Any]]


class Share(NamedTuple):
    """`count` of `n`, with Wilson's 95 % interval; the share is None where n is 0."""

    count: int
    n: int

    @property
    def share(self) -> float | None:
        return self.count / self.n if self.n else None

    def __str__(self) -> str:
        if not self.n:
            return "none"
        low, high = wilson_interval(self.count, self.n)
        return f"{self.share:.0%} of {self.n} [{low:.0%}, {high:.0%}]"


class Agreement(NamedTuple):
    """Examples with two or more labels; Krippendorff's alpha over all raters (None without such examples); and for each
    pair of raters Cohen's kappa with the number of examples both labelled."""

    n: int
    alpha: float | None
    kappas: dict[tuple[str, str], tuple[float, int]]


class Labeler(NamedTuple):
    """One person's work. `checks`: attention checks passed. `left`: answers for the left side among those for a side;
    far from a half says that the side decides. `agrees`: equal labels among those that others gave to the same examples.
    """

    name: str
    labels: int
    skips: int
    checks: Share
    left: Share
    agrees: Share
    median_seconds: float


class WinRate(NamedTuple):
    """Model `winner`'s wins over `loser`, one verdict an example; anything but a win or a loss counts half."""

    winner: str
    loser: str
    wins: int
    ties: int
    losses: int
    rate: float
    ci95: tuple[float, float]

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses


def _rows(labels: Labels) -> Sequence[Mapping[str, Any]]:
    return labels.preferences() if isinstance(labels, LabelStore) else labels


def _overlap(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, str]]:
    """{example: {labeler: label}} where two or more people gave a label; a skip is none."""
    groups = {}
    for example_id, labels in by_example(rows).items():
        given = {row["labeler"]: row["preferred"] for row in labels if row["preferred"] != "skip"}
        if len(given) > 1:
            groups[example_id] = given
    return groups


def agreement(labels: Labels) -> Agreement:
    """Agreement on the examples that several people labelled."""
    items = list(_overlap(_rows(labels)).values())
    names = sorted({name for item in items for name in item})
    if not items:
        return Agreement(0, None, {})
    kappas = {}
    for pair in itertools.combinations(names, 2):
        both = [item for item in items if set(pair) <= set(item)]
        if both:
            kappas[pair] = cohens_kappa(*([item[name] for item in both] for name in pair)), len(both)
    alpha = krippendorff_alpha([[item.get(name) for item in items] for name in names])
    return Agreement(len(items), alpha, kappas)


def disagreements(labels: Labels) -> list[dict[str, Any]]:
    """Examples whose raters disagree: example_id, prompt, labels by rater, and the majority ("votes tied": none yet)."""
    rows, found = _rows(labels), []
    groups = by_example(rows)
    for example_id, given in _overlap(rows).items():
        if len(set(given.values())) > 1:
            prompt = groups[example_id][0]["prompt"]
            row = {"example_id": example_id, "prompt": prompt, "labels": given}
            found.append({**row, "majority": verdict(groups[example_id])})
    return found


def labeler_quality(labels: Labels) -> list[Labeler]:
    """The quality of each labeler's work, by name."""
    rows, found = _rows(labels), []
    overlap = _overlap(rows)
    for name in sorted({row["labeler"] for row in rows}):
        mine = [row for row in rows if row["labeler"] == name]
        checks = [row["preferred"] == row["gold"] for row in mine if row["gold"] and row["preferred"] != "skip"]
        sided = [row["preferred"] == row["left_was"] for row in mine if row["preferred"] in ("a", "b")]
        equal = [
            label == given[name]
            for given in overlap.values()
            if name in given
            for other, label in given.items()
            if other != name
        ]
        found.append(
            Labeler(
                name,
                len(mine),
                sum(row["preferred"] == "skip" for row in mine),
                Share(sum(checks), len(checks)),
                Share(sum(sided), len(sided)),
                Share(sum(equal), len(equal)),
                statistics.median(row["seconds"] for row in mine),
            )
        )
    return found


def win_rates(labels: Labels) -> list[WinRate]:
    """For each two models that were compared, the first one's win rate. Examples that everybody skipped do not count."""
    compared: dict[tuple[str, str], list[float]] = {}
    for given in by_example(_rows(labels)).values():
        models, said = (given[0]["model_a"], given[0]["model_b"]), verdict(given)
        if None in models or models[0] == models[1] or said == "skip":
            continue
        score = {"a": 1.0, "b": 0.0}.get(said, 0.5)
        if models[::-1] in compared:  # imported the other way round
            models, score = models[::-1], 1 - score
        compared.setdefault(models, []).append(score)
    return [_win_rate(*models, scores) for models, scores in compared.items()]


def win_rate(labels: Labels, model_a: str, model_b: str) -> WinRate:
    """How often `model_a` was preferred to `model_b`, whichever of them was imported as response_a.

    One verdict an example (the majority of its labels); a tie, both bad and tied votes count half; skips do not count.
    `ci95` is `shared.pairwise.win_rate_interval`. Raises LabsError when nobody has labelled a pair of the two.
    """
    found = win_rates(labels)
    for result in found:
        if (result.winner, result.loser) == (model_a, model_b):
            return result
        if (result.loser, result.winner) == (model_a, model_b):
            wins, losses = result.losses, result.wins
            return _win_rate(model_a, model_b, [1.0] * wins + [0.5] * result.ties + [0.0] * losses)
    known = ", ".join(f"{each.winner} and {each.loser}" for each in found) or "none yet"
    raise LabsError(f"no label compares {model_a} with {model_b}; compared are: {known}")


def _win_rate(winner: str, loser: str, scores: Sequence[float]) -> WinRate:
    return WinRate(
        winner,
        loser,
        wins=scores.count(1.0),
        ties=scores.count(0.5),
        losses=scores.count(0.0),
        rate=statistics.fmean(scores),
        ci95=win_rate_interval(scores),
    )


def export_rows(store: LabelStore) -> tuple[list[dict[str, Any]], Counter]:
    """(DPO triplets of everything that was preferred, how many examples were left out and why).

    See `label_files.training_rows`; attention checks and examples without a label are counted here, labelled or not.
    """
    preferences, counts = store.preferences(), store.counts()
    rows, left_out = training_rows(preferences)
    left_out["attention check"] = counts["checks"]
    left_out["not labelled yet"] = counts["examples"] - counts["checks"] - len(by_example(preferences))
    return rows, +left_out
