"""The side-swapping protocol against every pair of answers, and length control against what it must remove."""

import itertools
import math
import subprocess
import sys

import numpy
import pytest

from shared import pairwise
from shared.pairwise import compare, length_controlled_win_rate
from shared.significance import bootstrap_ci, wilson_interval


def longer(prompt, first, second):
    """A judge without a favourite side."""
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def scripted(table):
    """A judge that answers (prompt, order) from a table of (answer to a-b, answer to b-a)."""
    return lambda prompt, first, second: table[int(prompt)][0 if first == "A" else 1]


def run(table):
    n = len(table)
    return compare([str(i) for i in range(n)], ["A"] * n, ["B"] * n, scripted(table))


def test_every_combination_of_the_two_orders():
    expected = {
        ("first", "second"): ("a", False),
        ("second", "first"): ("b", False),
        ("tie", "tie"): ("tie", False),
        ("first", "first"): ("tie", True),
        ("second", "second"): ("tie", True),
        ("first", "tie"): ("tie", True),
        ("tie", "second"): ("tie", True),
        ("second", "tie"): ("tie", True),
        ("tie", "first"): ("tie", True),
    }
    for pair in itertools.product(("first", "second", "tie", None, "FIRST", "a", 1, ["first"], ""), repeat=2):
        result = run([pair])
        known = all(isinstance(answer, str) and answer in pairwise.VERDICTS for answer in pair)
        verdict, inconsistent = expected[pair] if known else (None, False)
        assert result.verdicts == [verdict], pair
        assert (result.n_valid, result.n_error) == ((1, 0) if known else (0, 1)), pair
        assert result.n_inconsistent == inconsistent, pair


def test_counts_add_up_and_ties_count_half():
    table = [("first", "second")] * 3 + [("second", "first")] + [("tie", "tie"), ("first", "first"), (None, "first")]
    result = run(table)
    assert (result.wins, result.ties, result.losses) == (3, 2, 1)
    assert (result.n_valid, result.n_error, result.n_inconsistent) == (6, 1, 1)
    assert result.win_rate == pytest.approx((3 + 1) / 6)
    assert result.verdicts == ["a", "a", "a", "b", "tie", "tie", None]
    assert result.scores == [1.0, 1.0, 1.0, 0.0, 0.5, 0.5, None]
    with pytest.raises(AttributeError):
        result.wins = 4


def test_the_judge_sees_both_orders_of_every_pair():
    seen = []

    def judge(*question):
        seen.append(question)
        return "tie"

    compare(["p", "q"], ["a1", "a2"], ["b1", "b2"], judge)
    assert sorted(seen) == [("p", "a1", "b1"), ("p", "b1", "a1"), ("q", "a2", "b2"), ("q", "b2", "a2")]


def test_swapping_the_sides_mirrors_the_result():
    a, b = ["xx", "x", "xxx", "x"], ["x", "xx", "x", "x"]
    one, other = compare(a, a, b, longer), compare(a, b, a, longer)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins) == (2, 1, 1)
    assert one.win_rate == pytest.approx(1 - other.win_rate) and one.n_inconsistent == 0


def test_a_judge_who_looks_at_the_position_only_decides_nothing():
    result = compare(["p"] * 20, ["good"] * 20, ["bad"] * 20, lambda prompt, first, second: "first")
    assert (result.wins, result.losses, result.n_inconsistent, result.win_rate) == (0, 0, 20, 0.5)
    one_order = [longer("p", "good", "bad")] * 20  # the variant that a single order would report
    assert one_order.count("first") == 20


def test_an_exception_is_an_error_of_the_judge_but_an_interrupt_is_not():
    def judge(prompt, first, second):
        if prompt == "bad" and first == "b":
            raise TimeoutError("no answer")
        if prompt == "stop":
            raise KeyboardInterrupt
        return "first" if first == "a" else "second"

    result = compare(["x", "bad", "y"], ["a"] * 3, ["b"] * 3, judge)
    assert result.verdicts == ["a", None, "a"] and result.n_error == 1 and result.win_rate == 1.0
    with pytest.raises(KeyboardInterrupt):
        compare(["x", "stop"], ["a"] * 2, ["b"] * 2, judge)


def test_nothing_valid_has_no_rate():
    result = compare(["p"], ["a"], ["b"], lambda *_: None)
    assert math.isnan(result.win_rate) and all(map(math.isnan, result.ci95))
    assert (result.n_valid, result.n_error) == (0, 1)


@pytest.mark.parametrize("lists", [([], [], []), (["p"], ["a"], []), (["p"], ["a", "a"], ["b"]), ([], ["a"], ["b"])])
def test_lists_that_do_not_fit(lists):
    with pytest.raises(ValueError, match="equally long"):
        compare(*lists, longer)


def test_intervals():
    wins = pairwise.win_rate_interval([1.0] * 200)
    assert wins == wilson_interval(200, 200) and 0.97 < wins[0] < 1 == wins[1]
    assert pairwise.win_rate_interval([1.0] * 150 + [0.0] * 50) == wilson_interval(150, 200)
    mixed = [1.0] * 100 + [0.5] * 60 + [0.0] * 40
    assert pairwise.win_rate_interval(mixed) == bootstrap_ci(mixed)
    # Ties carry less variance: the interval is narrower than that of a share with the same mean.
    assert numpy.ptp(bootstrap_ci(mixed)) < 0.95 * numpy.ptp(wilson_interval(130, 200))
    low, high = pairwise.win_rate_interval([0.5] * 50)
    assert low < 0.45 and high > 0.55  # the bootstrap alone would say (0.5, 0.5)
    low, high = pairwise.win_rate_interval([1.0] * 199 + [0.5])
    assert low < bootstrap_ci([1.0] * 199 + [0.5])[0] and high == 1.0
    low, high = pairwise.win_rate_interval([0.0] * 199 + [0.5])
    assert low == 0.0 and 0.01 < high < 0.04


def test_the_interval_covers_the_true_rate():
    rng = numpy.random.default_rng(0)
    for shares in ([0.6, 0.3, 0.1], [0.97, 0.02, 0.01], [0.05, 0.9, 0.05]):
        truth = shares[0] + shares[1] / 2
        samples = [rng.choice([1.0, 0.5, 0.0], p=shares, size=200).tolist() for _ in range(150)]
        intervals = [pairwise.win_rate_interval(sample) for sample in samples]
        assert sum(low <= truth <= high for low, high in intervals) >= 0.9 * len(samples), shares


def sigmoid(z):
    return 1 / (1 + numpy.exp(-z))


def lengths_and_scores(intercept, slope, n=4000, seed=0, shift=0.0):
    rng = numpy.random.default_rng(seed)
    difference = rng.normal(shift, 40, n)
    p = sigmoid(intercept + slope * numpy.tanh(difference / difference.std()))
    return (rng.random(n) < p).astype(float).tolist(), (200 + difference).tolist(), [200.0] * n


@pytest.mark.parametrize("intercept, slope", [(0.0, 2.0), (1.0, 2.0), (-0.7, -1.5), (0.4, 0.0)])
def test_length_control_finds_the_rate_at_equal_length(intercept, slope, monkeypatch):
    monkeypatch.setattr(pairwise, "bootstrap_ci", lambda *_, **__: (0.0, 1.0))  # the interval has its own test
    scores, a, b = lengths_and_scores(intercept, slope, shift=50)  # a is mostly longer
    rate, _ = length_controlled_win_rate(scores, a, b)
    assert rate == pytest.approx(sigmoid(intercept), abs=0.05)
    if slope:
        assert abs(numpy.mean(scores) - sigmoid(intercept)) > 0.1  # the raw rate is far off
    mirrored, _ = length_controlled_win_rate([1 - score for score in scores], b, a)
    assert mirrored == pytest.approx(1 - rate, abs=1e-4)


def test_a_centred_difference_would_be_caught():
    """With the mean difference taken off, sigmoid(intercept) is the rate at the mean difference: the raw one, nearly."""
    scores, a, b = lengths_and_scores(0.0, 2.0, n=2000, shift=50)
    difference = numpy.subtract(a, b)
    x = numpy.tanh((difference - difference.mean()) / difference.std())
    assert abs(pairwise._rate_at_equal_length(x, numpy.array(scores)) - 0.5) > 0.15


@pytest.mark.parametrize("gap", [0, 30])
@pytest.mark.parametrize("shares", [(130, 40, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200), (199, 1, 0)])
def test_equal_differences_leave_the_raw_rate(gap, shares):
    scores = [1.0] * shares[0] + [0.5] * shares[1] + [0.0] * shares[2]
    rate, (low, high) = length_controlled_win_rate(scores, [50 + gap] * 200, [50] * 200)
    assert rate == pytest.approx(numpy.mean(scores), abs=1e-6)
    assert low <= rate <= high and high - low > 0.01


def test_it_equals_the_libraries_logistic_regression():
    from statsmodels.api import GLM, families

    rng = numpy.random.default_rng(3)
    scores = rng.choice([1.0, 0.5, 0.0], p=[0.5, 0.3, 0.2], size=5000)
    a, b = rng.integers(20, 400, 5000), rng.integers(20, 300, 5000)
    x = numpy.tanh((a - b) / (a - b).std())
    fit = GLM(scores, numpy.column_stack([numpy.ones(5000), x]), family=families.Binomial()).fit()
    assert pairwise._rate_at_equal_length(x, scores) == pytest.approx(sigmoid(fit.params[0]), abs=1e-4)


def test_separation_stays_finite_and_errors_are_left_out():
    a, b = [10.0 * i for i in range(40)], [200.0] * 40
    scores = [float(x > y) for x, y in zip(a, b, strict=True)]
    rate, (low, high) = length_controlled_win_rate([None, *scores], [1e9, *a], [0, *b])
    assert 0.2 < rate < 0.8 and 0 <= low <= rate <= high <= 1  # length explains all: nothing is left
    all_wins, (low, high) = length_controlled_win_rate([1.0] * 40, a, b)
    assert all_wins > 0.999 and 0.85 < low < 0.95 and high == 1.0
    nothing, interval = length_controlled_win_rate([None], [1], [1])
    assert math.isnan(nothing) and all(map(math.isnan, interval))


def test_the_bootstrap_interval_covers_and_narrows():
    scores, a, b = lengths_and_scores(0.5, 1.5, n=100, seed=1)
    rate, (low, high) = length_controlled_win_rate(scores, a, b)
    assert low < rate < high and low < sigmoid(0.5) < high
    assert length_controlled_win_rate(scores, a, b) == (rate, (low, high))  # seeded
    scores, a, b = lengths_and_scores(0.5, 1.5, n=900, seed=1)
    _, (narrow_low, narrow_high) = length_controlled_win_rate(scores, a, b)
    assert narrow_high - narrow_low < 0.5 * (high - low)


@pytest.mark.parametrize(
    "arguments",
    [([], [], []), ([1.0], [1, 2], [1]), ([1.5], [1], [1]), ([1.0], [math.nan], [1]), ([math.nan], [1], [1])],
)
def test_length_control_refuses_what_it_cannot_use(arguments):
    with pytest.raises(ValueError):
        length_controlled_win_rate(*arguments)


def test_importing_it_loads_nothing_heavy():
    program = "import shared.pairwise, sys; print([m for m in ('numpy', 'scipy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
