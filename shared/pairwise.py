"""Which of two answers is better: ask a judge in both orders, count, and give the win rate with its interval.

Judges, people and models alike, lean to one position (Zheng et al. 2023, arXiv 2306.05685) and to the longer answer
(Dubois et al. 2024, arXiv 2404.04475). The first is removed by asking twice, the second by `length_controlled_win_rate`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.significance import bootstrap_ci, wilson_interval
from shared.training import progress

Judge = Callable[[str, str, str], str | None]
VERDICTS = ("first", "second", "tie")
SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}
# With fewer items than this off the commonest score, resampling sees too few of them to tell how rare they are.
FEWEST_FOR_BOOTSTRAP = 10
RIDGE = 0.1  # on the slope only: as if it came from a normal distribution of variance 10
LARGEST_LOGIT = 20.0  # where every answer won: sigmoid(20) = 1 - 2e-9


@dataclass(frozen=True)
class PairwiseResult:
    """What a comparison found, from the side of answer a. `verdicts` holds one entry an item; None: not scored.

    wins + ties + losses = n_valid, and n_valid + n_error = the number of items. `n_inconsistent` of the ties are pairs
    on which the two orders disagreed. `win_rate` counts a tie as half and is nan where nothing was valid.
    """

    wins: int
    ties: int
    losses: int
    n_valid: int
    n_error: int
    n_inconsistent: int
    win_rate: float
    ci95: tuple[float, float]
    verdicts: list[str | None]

    @property
    def scores(self) -> list[float | None]:
        """1, 0.5 or 0 for each item, None for an item that was not scored."""
        return [None if verdict is None else SCORES[verdict] for verdict in self.verdicts]


def compare(prompts: Sequence[str], answers_a: Sequence[str], answers_b: Sequence[str], judge: Judge) -> PairwiseResult:
    """Judge every pair in both orders. `judge(prompt, first, second)` answers "first", "second", "tie" or None.

    Both orders for the same answer: a win. Anything else is a tie, and inconsistent unless both said "tie". None, another
    answer or an exception in either order is an error of the judge: counted, never scored. `ci95` is the interval of
    `win_rate`, see `win_rate_interval`. Raises ValueError for lists that are empty or not equally long.
    """
    if not len(prompts) == len(answers_a) == len(answers_b) or not len(prompts):
        raise ValueError(
            "compare needs equally long, non-empty lists, "
            f"not {len(prompts)} prompts, {len(answers_a)} answers a and {len(answers_b)} answers b"
        )
    verdicts: list[str | None] = []
    n_inconsistent = 0
    items = zip(prompts, answers_a, answers_b, strict=True)
    for prompt, answer_a, answer_b in progress(items, "judge", total=len(prompts)):
        one, other = _ask(judge, prompt, answer_a, answer_b), _ask(judge, prompt, answer_b, answer_a)
        if one is None or other is None:
            verdicts.append(None)
        elif (one, other) in (("first", "second"), ("second", "first")):
            verdicts.append("a" if one == "first" else "b")
        else:
            verdicts.append("tie")
            n_inconsistent += one != other or one != "tie"
    counts = Counter(verdicts)
    scores = [SCORES[verdict] for verdict in verdicts if verdict is not None]
    return PairwiseResult(
        wins=counts["a"],
        ties=counts["tie"],
        losses=counts["b"],
        n_valid=len(scores),
        n_error=counts[None],
        n_inconsistent=n_inconsistent,
        win_rate=sum(scores) / len(scores) if scores else math.nan,
        ci95=win_rate_interval(scores),
        verdicts=verdicts,
    )


def _ask(judge: Judge, prompt: str, first: str, second: str) -> str | None:
    try:
        answer = judge(prompt, first, second)
    except Exception:  # a judge may be a remote model: one failed call must not lose the other items
        return None
    return answer if isinstance(answer, str) and answer in VERDICTS else None


def win_rate_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores 1, 0.5 and 0; (nan, nan) where there are none.

    Without ties it is a share: Wilson's interval, so that 200 wins of 200 give (0.981, 1) and not (1, 1). With ties the
    bootstrap, which knows that they vary less than wins and losses; but where fewer than ten items are off the commonest
    score (all ties, or 199 wins and a tie), Wilson's again with each tie as half a win, which is never too narrow.
    """
    if not scores:
        return math.nan, math.nan
    doubled = round(2 * sum(scores))
    if doubled == 2 * scores.count(1.0) or _too_uniform(scores):
        # Half a win that is left over is rounded away from the middle of the interval.
        return wilson_interval(doubled // 2, len(scores))[0], wilson_interval((doubled + 1) // 2, len(scores))[1]
    return bootstrap_ci(scores)


def _too_uniform(scores: Sequence[float]) -> bool:
    return len(scores) - Counter(scores).most_common(1)[0][1] < FEWEST_FOR_BOOTSTRAP


def length_controlled_win_rate(
    scores: Sequence[float | None], lengths_a: Sequence[float], lengths_b: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The win rate that would be left if both answers were equally long, and its 95 % bootstrap interval.

    Logistic regression of the score (1, 0.5, 0; None is left out) on an intercept and tanh((length a − length b) / their
    standard deviation); the rate is sigmoid(intercept), where the second term is 0. That is the length control of
    AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without its terms for models and instructions. A small ridge keeps
    the slope finite where length decides everything; the intercept is not shrunk. Where the difference is the same for
    every item nothing can be told apart, and the rate is the raw one.

    Lengths in any one unit (characters, tokens). (nan, (nan, nan)) without a valid score. Raises ValueError for lists
    that are empty or not equally long, scores outside 0 to 1, lengths that are not finite.
    """
    import numpy

    if not len(scores) == len(lengths_a) == len(lengths_b) or not len(scores):
        raise ValueError("length_controlled_win_rate needs three equally long, non-empty lists")
    kept = [index for index, score in enumerate(scores) if score is not None]
    if not kept:
        return math.nan, (math.nan, math.nan)
    y = numpy.array([scores[index] for index in kept], dtype=float)
    difference = numpy.array([lengths_a[index] - lengths_b[index] for index in kept], dtype=float)
    if not ((0 <= y) & (y <= 1)).all() or not numpy.isfinite(difference).all():
        raise ValueError("length_controlled_win_rate needs scores from 0 to 1 and finite lengths")
    spread = difference.std()
    x = numpy.tanh(difference / spread) if spread > 0 else numpy.zeros_like(difference)

    def rate(indices) -> float:
        return _rate_at_equal_length(x[numpy.asarray(indices, dtype=int)], y[numpy.asarray(indices, dtype=int)])

    point = rate(range(len(y)))
    # A thousand resamples: each is a fit of its own.
    low, high = bootstrap_ci(range(len(y)), rate, n_resamples=1000) if len(y) > 1 else (point, point)
    if _too_uniform(y.tolist()):
        floor, ceiling = win_rate_interval(y.tolist())
        low, high = min(low, floor), max(high, ceiling)
    return point, (low, high)


def _rate_at_equal_length(x, y) -> float:
    """sigmoid(intercept) of the ridge regression of y on x: both numpy arrays (n,)."""
    import numpy
    from scipy.optimize import minimize
    from scipy.special import expit

    if not x.any():
        return float(y.mean())

    def loss(parameters):
        intercept, slope = parameters
        logits = intercept + slope * x
        residual = expit(logits) - y
        value = (numpy.logaddexp(0, logits) - y * logits).sum() + RIDGE / 2 * slope**2
        return value, numpy.array([residual.sum(), residual @ x + RIDGE * slope])

    options = {"ftol": 1e-12, "gtol": 1e-7}
    bounds = [(-LARGEST_LOGIT, LARGEST_LOGIT), (None, None)]
    return float(
        expit(minimize(loss, numpy.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds, options=options).x[0])
    )
