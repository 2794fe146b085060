"""From items to the table: each number with its interval, beside its parent's on the same items, with a paired test.

Shares have Wilson's interval, differences of shares Newcombe's paired one and McNemar's exact test; everything else the paired
bootstrap. All p values of the table are corrected together (Holm), or one row in twenty would be an "improvement" by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.pairwise import compare
from shared.significance import bootstrap_ci, holm_correction, mcnemar, paired_bootstrap, wilson_interval
from suite_plan import DUELS, PARENTS, TASKS
from suite_results import Result
from suite_tasks import Item, Metric

SIGNIFICANT = 0.05
Row = dict[str, Any]
Results = Mapping[tuple[str, str], Result]

# What the stages measured themselves on the same rows or rows of the same kind: stage, its criterion, stage, task, metric.
OWN = (
    ("base", "copy_accuracy", "base", "copying", "right"),
    ("base", "sum_accuracy", "base", "sums", "right"),
    ("sft", "values_right", "sft", "schema", "right"),
    ("sft", "schema_valid", "sft", "schema", "valid"),
    ("sft", "values_right_before", "base", "schema", "right"),
    ("dpo", "persona_win_rate", "dpo", "persona", "win_rate"),
    ("safedpo", "attack_success_before", "sft", "attacks", "success"),
    ("safedpo", "attack_success", "safedpo", "attacks", "success"),
    ("safedpo", "over_refusal", "safedpo", "lookalikes", "unanswered"),
    ("reward", "pair_accuracy", "reward", "pairs", "right"),
    ("midtrain", "sum_accuracy", "midtrain", "sums", "right"),
    ("cold_start", "accuracy", "cold_start", "reasoning", "flexible"),
    ("cold_start", "strict_format", "cold_start", "reasoning", "format"),
    ("grpo", "accuracy", "grpo", "reasoning", "flexible"),
    ("grpo", "strict_format", "grpo", "reasoning", "format"),
    ("tools", "exact_values", "tools", "calls_values", "exact"),
    ("tools", "exact_phrasings", "tools", "calls_phrasings", "exact"),
    ("tools", "irrelevance", "tools", "calls_irrelevance", "exact"),
    ("tools", "answers", "tools", "calls_answers", "exact"),
)


# ------------------------------------------------------------------------------------------------------------ one number


def paired_share_interval(after: Sequence[bool], before: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same items: Newcombe 1998 (Stat. Med. 17:2635), method 10.

    Made of the two Wilson intervals and their correlation, so it neither collapses where all items agree (the bootstrap
    would say that 200 of 200 twice leaves no doubt at all) nor leaves −1 to 1. Raises ValueError for lists that do not pair.
    """
    n = len(after)
    if n == 0 or n != len(before):
        raise ValueError("paired_share_interval needs two equally long, non-empty lists")
    pairs = [(bool(x), bool(y)) for x, y in zip(after, before, strict=True)]
    both, only_after = pairs.count((True, True)), pairs.count((True, False))
    only_before, neither = pairs.count((False, True)), pairs.count((False, False))
    p1, p2 = (both + only_after) / n, (both + only_before) / n
    (l1, u1), (l2, u2) = wilson_interval(both + only_after, n), wilson_interval(both + only_before, n)
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    excess = both * neither - only_after * only_before
    phi = 0.0 if margins == 0 else (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(margins)

    def width(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = p1 - p2
    return difference - width(p1 - l1, u2 - p2), difference + width(u1 - p1, p2 - l2)


def scores_of(items: Sequence[Item], metric: str) -> list[float | None]:
    """The metric of each item, None where the item has none."""
    return [item["scores"].get(metric) for item in items]


def _perplexity(losses: Sequence[float], weights: Sequence[float]) -> float:
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return math.exp(min(mean, 700.0))


def _estimate(metric: Metric, values: Sequence[float], weights: Sequence[float]) -> tuple[float, tuple[float, float]]:
    if metric.unit == "perplexity":
        import numpy

        loss, weight = numpy.asarray(values), numpy.asarray(weights)

        def statistic(index):
            chosen = numpy.asarray(index, dtype=int)
            return math.exp(min(float(numpy.average(loss[chosen], weights=weight[chosen])), 700.0))

        return _perplexity(values, weights), bootstrap_ci(range(len(values)), statistic, n_resamples=2000)
    mean = sum(values) / len(values)
    if metric.unit == "share":
        return mean, wilson_interval(round(sum(values)), len(values))
    return mean, bootstrap_ci(values)


def _difference(metric: Metric, after: Sequence[float], before: Sequence[float], weights: Sequence[float]) -> Row:
    """{"difference", "difference_ci95", "p"} of the same items after and before."""
    if metric.unit == "share":
        interval = paired_share_interval([x > 0.5 for x in after], [x > 0.5 for x in before])
        p = mcnemar([x > 0.5 for x in after], [x > 0.5 for x in before])
        return {"difference": (sum(after) - sum(before)) / len(after), "difference_ci95": list(interval), "p": p}
    paired = paired_bootstrap(after, before)
    if metric.unit != "perplexity":
        interval = [paired.low, paired.high]
        return {"difference": paired.difference, "difference_ci95": interval, "p": paired.p_value}
    import numpy

    first, second, weight = numpy.asarray(after), numpy.asarray(before), numpy.asarray(weights)

    def statistic(index):
        chosen = numpy.asarray(index, dtype=int)
        means = [float(numpy.average(side[chosen], weights=weight[chosen])) for side in (first, second)]
        return math.exp(min(means[0], 700.0)) - math.exp(min(means[1], 700.0))

    every = range(len(after))
    interval = bootstrap_ci(every, statistic, n_resamples=2000)
    return {"difference": statistic(every), "difference_ci95": list(interval), "p": paired.p_value}


# ------------------------------------------------------------------------------------------------------------- the table


def empty_row(stage: str, task: str, metric: Metric, role: str, state: str) -> Row:
    """A row without a number, which says why there is none."""
    return {
        "stage": stage, "task": task, "metric": metric.name, "description": metric.description, "unit": metric.unit,
        "better": metric.better, "role": role, "state": state, "n": 0, "n_error": 0, "n_empty": 0, "value": None,
        "ci95": None, "parent": PARENTS.get(stage), "parent_value": None, "difference": None, "difference_ci95": None,
        "p": None, "p_holm": None, "seconds": None,
    }  # fmt: skip


def row_of(result: Result, metric: Metric, parent: Result | None) -> Row:
    """One metric of one (stage, task), and what it was for the parent on the items that both have a score for."""
    planned = result.planned
    row = empty_row(planned.stage, planned.task, metric, planned.role, result.state)
    row["parent"] = None if parent is None else parent.planned.stage
    row["seconds"] = round(result.seconds, 2) if result.state == "measured" else None
    scores = scores_of(result.items, metric.name)
    weights = [float(item.get("tokens", 1)) for item in result.items]
    valid = [index for index, score in enumerate(scores) if score is not None and math.isfinite(score)]
    row["n_error"] = len(scores) - len(valid)
    row["n_empty"] = sum(bool(item.get("empty")) for item in result.items)
    if not valid:
        if result.state == "measured":
            row["state"] = f"not run: none of {len(scores)} items could be judged"
        return row
    row["n"] = len(valid)
    row["value"], interval = _estimate(metric, [scores[i] for i in valid], [weights[i] for i in valid])
    row["ci95"] = list(interval)
    if parent is None or parent.state != "measured" or len(parent.items) != len(result.items):
        return row
    others = scores_of(parent.items, metric.name)
    common = [index for index in valid if others[index] is not None and math.isfinite(others[index])]
    if common:
        before = [others[index] for index in common]
        weight = [weights[index] for index in common]
        row["parent_value"] = _estimate_value(metric, before, weight)
        row |= _difference(metric, [scores[index] for index in common], before, weight)
    return row


def _estimate_value(metric: Metric, values: Sequence[float], weights: Sequence[float]) -> float:
    return _perplexity(values, weights) if metric.unit == "perplexity" else sum(values) / len(values)


PERSONA = Metric("win_rate", "brief persona: wins against the parent, sides swapped", "win rate")


def duel_row(stage: str, own: Result | None, parent: Result | None) -> Row:
    """How often the stage's answers win over its parent's by lab 02's rubric; the difference is to a draw, 0.5."""
    from alignment_scores import persona_judge

    role = "learned" if stage == "dpo" else "watched"
    row = empty_row(stage, "persona", PERSONA, role, "measured")
    for side in (own, parent):
        if side is None or side.state != "measured":
            row["state"] = side.state if side else f"not run: no answers of {stage} and {DUELS[stage]} to compare"
            return row
    assert own is not None and parent is not None
    pairs = [(a, b) for a, b in zip(own.items, parent.items, strict=True) if "reply" in a and "reply" in b]
    row["n_error"] = len(own.items) - len(pairs)
    if not pairs:
        row["state"] = "not run: no question was answered by both"
        return row
    prompts = [a["prompt"] for a, _ in pairs]
    judge = persona_judge([{"prompt": a["prompt"], "value": a["value"]} for a, _ in pairs])
    found = compare(prompts, [a["reply"] for a, _ in pairs], [b["reply"] for _, b in pairs], judge)
    wins, losses = ([verdict == side for verdict in found.verdicts] for side in ("a", "b"))
    row |= {
        "n": found.n_valid, "value": found.win_rate, "ci95": list(found.ci95), "parent_value": 0.5,
        "difference": found.win_rate - 0.5, "difference_ci95": [end - 0.5 for end in found.ci95], "p": mcnemar(wins, losses),
    }  # fmt: skip
    return row


def build_table(results: Results, parents: Results | None = None, more: Sequence[Row] = ()) -> list[Row]:
    """Every row of the table: metrics of each measurement, duels, `more`; p values corrected together, and a verdict.

    Parents are looked up in `parents`, by default `results`; the negative control sets other results beside them.
    """
    parents = results if parents is None else parents
    rows: list[Row] = []
    for (stage, task), result in results.items():
        # The other side is asked in its own way: a base model is shown an example, a tuned one is not.
        beside = TASKS[task].beside
        other = results.get((stage, beside)) if beside else parents.get((PARENTS.get(stage, ""), task))
        if task == "contamination":  # of this stage's own rows: there is nothing to pair
            other = None
        rows += [row_of(result, metric, other) for metric in TASKS[task].metrics]
    rows += [duel_row(stage, results.get((stage, "questions")), parents.get((parent, "questions")))
             for stage, parent in DUELS.items()]  # fmt: skip
    rows += [dict(row) for row in more]
    tested = [row for row in rows if row["p"] is not None]
    for row, corrected in zip(tested, holm_correction([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    for row in rows:
        row["verdict"] = verdict_of(row)
    return rows


def verdict_of(row: Mapping[str, Any]) -> str:
    """ "better", "worse", "changed" (neither is good or bad), "no difference shown", or "" where nothing is compared."""
    if row["p_holm"] is None:
        return ""
    if row["p_holm"] >= SIGNIFICANT or not row["difference"]:
        return "no difference shown"
    return {1: "better", -1: "worse", 0: "changed"}[int(math.copysign(1, row["difference"])) * row["better"]]


def find(rows: Sequence[Row], stage: str, task: str, metric: str) -> Row | None:
    """The measured row of that name, or None."""
    for row in rows:
        if (row["stage"], row["task"], row["metric"]) == (stage, task, metric) and row["value"] is not None:
            return row
    return None


def agreement(rows: Sequence[Row], own: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """For each number that a stage measured itself: does it lie in the suite's interval? `own`: {stage: its metrics.json}."""
    found = []
    for stage, criterion, measured, task, metric in OWN:
        declared = [row for row in own.get(stage, {}).get("criteria", []) if row.get("name") == criterion]
        row = find(rows, measured, task, metric)
        if row is None or not declared or declared[0].get("value") is None:
            continue
        theirs = float(declared[0]["value"])
        low, high = row["ci95"]
        found.append(
            {"stage": stage, "criterion": criterion, "own": theirs, "own_n": declared[0].get("n"), "suite": row["value"],
             "ci95": [low, high], "n": row["n"], "agrees": low - 1e-9 <= theirs <= high + 1e-9}
        )  # fmt: skip
    return found
