"""Lab 05, models that judge models: ask in both orders, take length out, and check the judge before it is believed.

    python llm_judge.py compare pairs.jsonl --judge reward                       # offline: lab 02's reward model
    python llm_judge.py compare pairs.jsonl --judge openai --model MODEL         # key in OPENAI_API_KEY
    python llm_judge.py score answers.jsonl --judge vllm --model MODEL           # 1 to 5 on every criterion, with reasons
    python llm_judge.py trust preferences.jsonl --judge ollama --model MODEL     # agreement with people

A judge leans to one position, to length, to its own family's style (Zheng et al. 2023, arXiv 2306.05685; Dubois et al. 2024,
arXiv 2404.04475), and some of its replies are no verdict. `compare_answers` shows each of these beside the win rate and names
a better side only where the position-swapped and the length-controlled rate agree; `trust` asks for people's labels first.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model_judge import pair_questions
from shared import LabsError
from shared.pairwise import Judge, PairwiseResult, compare, length_controlled_win_rate
from shared.significance import bootstrap_ci, cohens_kappa, holm_correction, mcnemar

# "Moderate" agreement (Landis & Koch 1977). Two people reach about this on which of two chat answers is better.
LEAST_KAPPA = 0.4
FEWEST_LABELS = 30
MOST_ERRORS = 0.1  # a judge that fails on more than a tenth of the pairs judges another set than the one it was given
CLEARLY = 1.1  # the longer of two answers is this many times as long
ONE_SIDED = 0.95  # one side longer in more of the pairs than this: length and system cannot be told apart
Interval = tuple[float, float]


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Comparison:
    """Answers a against answers b. Rates are those of a, ties half; nan where nothing was valid.

    `consistency`: share of the valid pairs on which both orders agree. `unreadable`: share of all replies without a verdict;
    one such reply makes its pair an error. `longer_won`: share of the decided pairs that the longer answer won, `a_longer`:
    share of the pairs with clearly unequal lengths in which a is the longer; nan where there are none.
    """

    result: PairwiseResult
    length_controlled: float
    length_controlled_ci95: Interval
    consistency: float
    n_replies: int
    unreadable: float
    longer_won: float
    a_longer: float
    n_empty: int

    @property
    def better(self) -> str | None:
        """ "a" or "b" where the judge's verdicts carry that, else None; `why` says what stands against it."""
        return None if self._doubt() else "a" if self.result.win_rate > 0.5 else "b"

    @property
    def why(self) -> str:
        """One line: which side is better, or why this judge cannot say."""
        return self._doubt() or f"{self.better} is better, its length taken out too"

    def _doubt(self) -> str:
        result = self.result
        if not result.n_valid:
            return "no ranking: the judge gave no verdict at all"
        error_share = result.n_error / (result.n_error + result.n_valid)
        side = _side(result.ci95)
        if side is None:
            return f"no ranking: the interval of the win rate holds 50 %{self._inconsistent()}"
        if error_share > MOST_ERRORS:
            return (
                f"no ranking: {error_share:.0%} of the pairs got no verdict, and nobody knows how they would have gone"
            )
        longer = {"a": self.a_longer, "b": 1 - self.a_longer}[side]
        if longer > ONE_SIDED and self.longer_won > ONE_SIDED:
            return f"no ranking: {side} is nearly always the longer one, so that length and merit cannot be told apart"
        if _side(self.length_controlled_ci95) != side:
            return "no ranking: at equal length nothing is left of the difference"
        if self.longer_won > ONE_SIDED:
            return "no ranking: the longer answer won, whichever side wrote it; this judge may see nothing but length"
        return ""

    def _inconsistent(self) -> str:
        return " (the judge decides by position)" if self.consistency < 0.5 else ""

    def lines(self) -> list[str]:
        """The comparison as text: every rate with its n and its interval."""
        result = self.result
        return [
            f"win rate of a {_rate(result.win_rate, result.ci95)}, n={result.n_valid}: "
            f"{result.wins} wins, {result.ties} ties, {result.losses} losses",
            f"at equal length {_rate(self.length_controlled, self.length_controlled_ci95)}; "
            f"the longer answer won {self.longer_won:.1%} of the decided pairs",
            f"consistency {self.consistency:.1%}: {result.n_inconsistent} of {result.n_valid} pairs changed with the order",
            f"errors: {result.n_error} pairs not scored; {self.unreadable:.1%} of {self.n_replies} replies without a verdict; "
            f"{self.n_empty} empty answers",
            self.why,
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, with None for what is not a number."""
        return plain({**asdict(self), "better": self.better, "why": self.why})


def compare_answers(prompts: Sequence[str], a: Sequence[str], b: Sequence[str], judge: Judge) -> Comparison:
    """Judge every pair in both orders and look for the judge's biases. Lengths are in characters.

    A judge with `prepare` is asked all questions beforehand, several at a time. Raises LabsError where a remote judge is down
    (its replies so far are in its cache) and ValueError for lists that are empty or not equally long.
    """
    if not len(prompts) == len(a) == len(b) or not len(prompts):
        raise ValueError("compare_answers needs three equally long, non-empty lists")
    _prepare(judge, pair_questions(prompts, a, b))
    replies: list[str | None] = []

    def counted(prompt: str, first: str, second: str) -> str | None:
        replies.append(None)
        replies[-1] = judge(prompt, first, second)
        return replies[-1]

    result = compare(prompts, a, b, counted)
    lengths_a, lengths_b = [len(text) for text in a], [len(text) for text in b]
    rate, interval = length_controlled_win_rate(result.scores, lengths_a, lengths_b)
    signs = [(x > y) - (x < y) for x, y in zip(lengths_a, lengths_b, strict=True)]
    decided = [(verdict == "a") == (sign > 0) for verdict, sign in zip(result.verdicts, signs, strict=True)
               if verdict in ("a", "b") and sign]  # fmt: skip
    unequal = [x > y for x, y in zip(lengths_a, lengths_b, strict=True) if max(x, y) > CLEARLY * min(x, y)]
    return Comparison(
        result=result,
        length_controlled=rate,
        length_controlled_ci95=interval,
        consistency=1 - result.n_inconsistent / result.n_valid if result.n_valid else math.nan,
        n_replies=len(replies),
        unreadable=sum(reply not in ("first", "second", "tie") for reply in replies) / len(replies),
        longer_won=_mean(decided),
        a_longer=_mean(unequal),
        n_empty=sum(not text.strip() for text in [*a, *b]),
    )


@dataclass(frozen=True)
class Ranking:
    """Systems by their mean win rate against the others. `beats` holds (better, worse, Holm-corrected p) of certain pairs.

    `order` is None where the judge separates no two of them: a list would then be noise, or the judge's habits.
    """

    win_rates: dict[str, float]
    beats: list[tuple[str, str, float]]
    order: list[str] | None
    comparisons: dict[tuple[str, str], Comparison]


def rank(prompts: Sequence[str], systems: Mapping[str, Sequence[str]], judge: Judge, alpha: float = 0.05) -> Ranking:
    """Every system against every other: exact sign tests on wins and losses, Holm-corrected for their number.

    A pair counts as separated when its corrected p is below alpha and `Comparison.better` names the same side. Raises
    LabsError for fewer than two systems.
    """
    if len(systems) < 2:
        raise LabsError(f"a ranking needs two systems or more, not {len(systems)}")
    found = {(x, y): compare_answers(prompts, systems[x], systems[y], judge)
             for x, y in itertools.combinations(systems, 2)}  # fmt: skip
    verdicts = [one.result.verdicts for one in found.values()]
    p_values = holm_correction([mcnemar([v == "a" for v in each], [v == "b" for v in each]) for each in verdicts])
    beats = []
    for ((x, y), one), p in zip(found.items(), p_values, strict=True):
        if p < alpha and one.better:
            beats.append((x, y, p) if one.better == "a" else (y, x, p))
    rates = {}
    for name in systems:
        against = [one.result.win_rate if x == name else 1 - one.result.win_rate
                   for (x, y), one in found.items() if name in (x, y)]  # fmt: skip
        rates[name] = _mean([rate for rate in against if not math.isnan(rate)])
    order = sorted(systems, key=lambda name: -rates[name]) if beats else None
    return Ranking(rates, beats, order, found)


# ----------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Rubric scores of one system's answers. `means`: {criterion: (mean, interval)} over the n_valid answers.

    `rows`: an answer's {criterion: {"score", "reason"}}, None where the judge gave none. `constant`: every answer got the same
    scores, so that they tell nothing about any of them.
    """

    means: dict[str, tuple[float, Interval]]
    n_valid: int
    n_error: int
    n_empty: int
    constant: bool
    rows: list[dict[str, dict] | None]

    def lines(self) -> list[str]:
        """The scores as text."""
        text = [f"{name}: {mean:.2f} [{low:.2f}, {high:.2f}] of 5" for name, (mean, (low, high)) in self.means.items()]
        text.append(f"n={self.n_valid}; {self.n_error} answers not scored; {self.n_empty} empty answers")
        return [*text, "every answer got the same scores: they tell nothing"] if self.constant else text

    def to_json(self) -> dict[str, Any]:
        """Everything, with None for what is not a number."""
        return plain(asdict(self))


def score_answers(prompts: Sequence[str], answers: Sequence[str], judge) -> Scores:
    """Score every answer with `judge.score(prompt, answer)`; see `ModelJudge` and `ReferenceRubric`.

    Raises LabsError for a judge that does not score or is down, ValueError for lists that are empty or not equally long.
    """
    if len(prompts) != len(answers) or not len(prompts):
        raise ValueError("score_answers needs two equally long, non-empty lists")
    if not hasattr(judge, "score"):
        raise LabsError("this judge compares pairs and gives no scores: use `compare`, or --judge rubric")
    questions = list(zip(prompts, answers, strict=True))
    _prepare(judge, questions)
    rows = [judge.score(*question) for question in questions]
    valid = [row for row in rows if row is not None]
    means = {}
    for name in judge.criteria if valid else ():
        values = [row[name]["score"] for row in valid]
        means[name] = (_mean(values), bootstrap_ci(values))
    seen = {tuple(row[name]["score"] for name in judge.criteria) for row in valid}
    n_empty = sum(not answer.strip() for answer in answers)
    return Scores(means, len(valid), len(rows) - len(valid), n_empty, len(valid) > 1 and len(seen) == 1, rows)


# ------------------------------------------------------------------------------------------------------------ trust


@dataclass(frozen=True)
class Trust:
    """Agreement of a judge with people: Cohen's κ with its interval, and whether the judge may be believed.

    `agreement`: plain share of equal verdicts. n_valid, n_error, n_inconsistent as in `compare`.
    """

    kappa: float
    ci95: Interval
    agreement: float
    n_valid: int
    n_error: int
    n_inconsistent: int
    trusted: bool
    reason: str

    def lines(self) -> list[str]:
        """The agreement as text."""
        low, high = self.ci95
        return [
            f"κ with people {self.kappa:.3f} [{low:.3f}, {high:.3f}], n={self.n_valid}; same verdict {self.agreement:.1%}",
            f"errors: {self.n_error} pairs not scored; {self.n_inconsistent} changed with the order",
            f"{'trusted' if self.trusted else 'not trusted'}: {self.reason}",
        ]


def trust(
    judge: Judge, labelled: Sequence[Mapping[str, str]], least_kappa: float = LEAST_KAPPA, seed: int = 0
) -> Trust:
    """Hold a judge against people's labels: rows {"prompt", "first", "second", "label": "first", "second" or "tie"}.

    Trusted means: at least 30 labels, errors on at most a tenth, and the lower end of κ's interval at `least_kappa` or more.
    Half of the pairs are turned round first: where people's choice always stands first, chance alone would explain all
    agreement. Raises LabsError for no rows or a label that is none, and where the judge is down.
    """
    if not labelled:
        raise LabsError("no labelled pair to hold the judge against: `labs label` collects some")
    for number, row in enumerate(labelled, start=1):
        if row.get("label") not in ("first", "second", "tie"):
            raise LabsError(f"labelled pair {number}: label {row.get('label')!r} must be first, second or tie")
    rng = random.Random(seed)
    shuffled = rng.sample(list(labelled), len(labelled))
    sides = [row if number % 2 else _turned(row) for number, row in enumerate(shuffled)]
    found = compare_answers(*([row[name] for row in sides] for name in ("prompt", "first", "second")), judge).result
    names = {"a": "first", "b": "second", "tie": "tie"}
    ### BEGIN SOLUTION
    both = [(names[v], row["label"]) for v, row in zip(found.verdicts, sides, strict=True) if v is not None]
    if not both:
        return Trust(math.nan, (math.nan, math.nan), math.nan, 0, found.n_error, 0, False, "it gave no verdict at all")
    kappa = cohens_kappa(*zip(*both, strict=True))
    interval = bootstrap_ci(range(len(both)), lambda picked: _kappa_of(both, picked), n_resamples=1000, seed=seed)
    ### END SOLUTION
    agreement = _mean([judged == label for judged, label in both])
    error_share = found.n_error / len(sides)
    if len(both) < FEWEST_LABELS:
        trusted, reason = False, f"{len(both)} valid pairs are too few, at least {FEWEST_LABELS} are needed"
    elif error_share > MOST_ERRORS:
        trusted, reason = False, f"it gave no verdict on {error_share:.0%} of the pairs"
    elif interval[0] < least_kappa:
        trusted, reason = False, f"κ may be as low as {interval[0]:.2f}, and {least_kappa:g} is asked"
    else:
        trusted, reason = True, f"κ is at least {interval[0]:.2f}, and {least_kappa:g} is asked"
    return Trust(kappa, interval, agreement, len(both), found.n_error, found.n_inconsistent, trusted, reason)


def _turned(row: Mapping[str, str]) -> dict[str, str]:
    label = {"first": "second", "second": "first", "tie": "tie"}[row["label"]]
    return {"prompt": row["prompt"], "first": row["second"], "second": row["first"], "label": label}


def _kappa_of(both: Sequence[tuple[str, str]], picked: Sequence[float]) -> float:
    judged, labels = zip(*(both[int(index)] for index in picked), strict=True)
    return cohens_kappa(judged, labels)


# ---------------------------------------------------------------------------------------------------------- helpers


def _prepare(judge: Any, questions: list) -> None:
    prepare: Callable | None = getattr(judge, "prepare", None)
    if prepare:
        prepare(questions)


def _side(interval: Interval) -> str | None:
    return "a" if interval[0] > 0.5 else "b" if interval[1] < 0.5 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rate(rate: float, interval: Interval) -> str:
    return f"{rate:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    from judge_cli import main

    main()
