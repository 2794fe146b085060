"""The table's statistics and verdicts, with variants that must be caught; criteria, Markdown and the reward row."""

import json
import math
import random

import pytest

import suite_report
import suite_table
from shared.significance import wilson_interval
from suite_plan import Planned
from suite_report import losses, markdown, measurements, p_text, plot_differences, reward_row, samples
from suite_results import Result
from suite_table import agreement, build_table, duel_row, find, paired_share_interval, row_of
from suite_tasks import Metric

RIGHT = Metric("right", "right")


def result(stage, task, values, role="learned", metric="right", **extra):
    items = [{"scores": {} if v is None else {metric: float(v)}, **extra} for v in values]
    return Result(Planned(stage, task, role, {}), items, 1.0)


# ------------------------------------------------------------------------------------------------------- intervals


def unpaired(after, before):
    """Two independent Wilson intervals, subtracted: too wide where the items go together."""
    (l1, u1), (l2, u2) = (wilson_interval(sum(x), len(x)) for x in (after, before))
    return l1 - u2, u1 - l2


def wald(after, before):
    """Mean and 1.96 standard errors of the differences: no width where nothing differs."""
    d = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
    mean = sum(d) / len(d)
    error = math.sqrt(sum((x - mean) ** 2 for x in d)) / len(d)
    return mean - 1.96 * error, mean + 1.96 * error


def coverage(interval, p_both, p_after, p_before, n=60, draws=1500):
    """(share of draws whose interval holds the true difference, mean width) for correlated pairs."""
    rng = random.Random(0)
    kinds, weights = [(1, 1), (1, 0), (0, 1), (0, 0)], [p_both, p_after, p_before, 1 - p_both - p_after - p_before]
    hits = width = 0.0
    known = {}
    for _ in range(draws):
        drawn = rng.choices(kinds, weights, k=n)
        key = tuple(drawn.count(kind) for kind in kinds)
        if key not in known:
            known[key] = interval([bool(a) for a, _ in drawn], [bool(b) for _, b in drawn])
        low, high = known[key]
        hits += low <= p_after - p_before <= high
        width += high - low
    return hits / draws, width / draws


def test_the_paired_interval_covers_and_is_narrower_than_an_unpaired_one():
    for truth in ((0.5, 0.15, 0.05), (0.8, 0.08, 0.02), (0.1, 0.3, 0.1)):
        covered, width = coverage(paired_share_interval, *truth)
        assert 0.93 <= covered <= 0.985, (truth, covered)
        assert width < coverage(unpaired, *truth)[1]
    assert coverage(wald, 0.97, 0.02, 0.0)[0] < 0.9 < coverage(paired_share_interval, 0.97, 0.02, 0.0)[0]


def test_no_difference_seen_is_not_no_difference_known():
    low, high = paired_share_interval([True] * 200, [True] * 200)
    assert low < 0 < high and high - low < 0.06
    low, high = paired_share_interval([True] * 200, [False] * 200)
    assert 0.95 < low < 1 and high == pytest.approx(1, abs=0.01)
    a, b = [True] * 30 + [False] * 30, [True] * 20 + [False] * 40
    low, high = paired_share_interval(a, b)
    back = paired_share_interval(b, a)
    assert (back[0], back[1]) == pytest.approx((-high, -low))
    for bad in (([], []), ([True], [])):
        with pytest.raises(ValueError):
            paired_share_interval(*bad)


# ------------------------------------------------------------------------------------------------------- rows


def test_a_row_pairs_items_that_both_have_and_counts_the_rest():
    after = result("sft", "schema", [1, 1, 1, 0, None])
    before = result("base", "schema", [0, 0, None, 1, 1])
    row = row_of(after, RIGHT, before)
    assert (row["n"], row["n_error"], row["value"]) == (4, 1, 0.75)
    assert row["parent_value"] == pytest.approx(1 / 3) and row["difference"] == pytest.approx(1 / 3)
    assert row["ci95"] == list(wilson_interval(3, 4)) and row["parent"] == "base"


def test_nan_is_an_error_and_nothing_valid_is_not_a_zero():
    row = row_of(result("sft", "schema", [float("nan"), None]), RIGHT, None)
    assert row["value"] is None and row["n_error"] == 2 and row["state"].startswith("not run")
    assert row_of(result("sft", "schema", [1, 0]), RIGHT, result("base", "schema", [1]))["difference"] is None


def test_the_perplexity_weighs_tokens_and_compares_on_the_same_texts():
    metric = Metric("loss", "perplexity", "perplexity", -1)
    items = [{"scores": {"loss": math.log(2)}, "tokens": 30}, {"scores": {"loss": math.log(8)}, "tokens": 10}] * 10
    other = [{"scores": {"loss": item["scores"]["loss"] + 0.5}, "tokens": item["tokens"]} for item in items]
    row = row_of(
        Result(Planned("sft", "texts", "watched", {}), items), metric, Result(Planned("base", "texts", "", {}), other)
    )
    assert row["value"] == pytest.approx(2 ** (30 / 40) * 8 ** (10 / 40))
    assert row["parent_value"] == pytest.approx(row["value"] * math.exp(0.5))
    assert row["difference"] == pytest.approx(row["value"] - row["parent_value"]) and row["difference_ci95"][1] < 0
    assert row["p"] < 0.01


def test_all_p_values_are_corrected_together_and_a_fake_improvement_is_refused():
    rng = random.Random(1)
    base = [float(rng.random() < 0.5) for _ in range(200)]
    lucky = [1.0 - x if i in range(0, 200, 14) and not x else x for i, x in enumerate(base)]
    results = {("base", "schema"): result("base", "schema", base), ("sft", "schema"): result("sft", "schema", lucky)}
    results |= {("base", "sums"): result("base", "sums", base), ("midtrain", "sums"): result("midtrain", "sums", base)}
    rows = build_table(results)
    tested = [row for row in rows if row["p"] is not None]
    assert len(tested) > 1 and all(row["p_holm"] >= row["p"] for row in tested)
    row = find(rows, "sft", "schema", "right")
    assert row["difference"] > 0 and row["verdict"] == ("better" if row["p_holm"] < 0.05 else "no difference shown")
    assert find(rows, "midtrain", "sums", "right")["verdict"] == "no difference shown"


@pytest.mark.parametrize(
    ("difference", "better", "verdict"),
    [
        (0.5, 1, "better"),
        (-0.5, 1, "worse"),
        (0.5, -1, "worse"),
        (-0.5, -1, "better"),
        (0.5, 0, "changed"),
        (0, 1, "no difference shown"),
    ],
)
def test_verdicts_know_which_way_is_good(difference, better, verdict):
    assert suite_table.verdict_of({"p_holm": 0.001, "difference": difference, "better": better}) == verdict
    assert suite_table.verdict_of({"p_holm": 0.06, "difference": difference, "better": better}) == "no difference shown"
    assert suite_table.verdict_of({"p_holm": None, "difference": None, "better": better}) == ""


def questions(stage, replies):
    items = [{"scores": {"right": 1.0}, "prompt": f"q{i}", "reply": r, "value": "Cairo"} for i, r in enumerate(replies)]
    return Result(Planned(stage, "questions", "kept", {}), items)


def test_a_duel_is_won_by_right_and_brief_and_a_model_draws_with_itself():
    long, short = ["Well, as far as I can tell, it is Cairo."] * 20, ["Cairo."] * 20
    row = duel_row("dpo", questions("dpo", short), questions("sft", long))
    assert row["value"] == 1 and row["p"] < 0.001 and row["difference_ci95"][0] > 0.3
    row = duel_row("dpo", questions("dpo", long), questions("sft", long))
    assert row["value"] == 0.5 and row["p"] == 1
    row = duel_row("dpo", questions("dpo", ["Oslo."] * 20), questions("sft", long))
    assert row["value"] == 0, "brief and wrong must lose"
    assert duel_row("dpo", questions("dpo", short), None)["state"].startswith("not run")


def test_own_numbers_outside_the_interval_are_found():
    rows = build_table({("sft", "schema"): result("sft", "schema", [1] * 95 + [0] * 5)})
    for own, agrees in ((0.95, True), (0.9, True), (0.99, False), (0.5, False)):
        found = agreement(rows, {"sft": {"criteria": [{"name": "values_right", "value": own, "n": 300}]}})
        assert [row["agrees"] for row in found] == [agrees]
    assert agreement(rows, {"sft": {"criteria": [{"name": "values_right", "value": None}]}}) == []


# ------------------------------------------------------------------------------------------------- criteria and outputs


def write_log(folder, rewards):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i, "elapsed_seconds": i, "reward/mean": value} for i, value in enumerate(rewards)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_reward_row_reads_the_log(tmp_path):
    noise = random.Random(0)
    rising = [0.1 + i / 50 + noise.random() / 100 for i in range(40)]
    row = reward_row("hacked", write_log(tmp_path / "a", rising))
    assert row["n"] == 16 and 0.55 < row["difference"] < 0.75 and row["difference_ci95"][0] > 0.4 and row["p"] < 1e-4
    flat = reward_row("hacked", write_log(tmp_path / "b", [0.3 + noise.random() / 100 for _ in range(40)]))
    assert flat["p"] > 0.01
    still = reward_row("hacked", write_log(tmp_path / "c", [0.5] * 40))
    assert still["value"] == still["parent_value"] == 0.5 and still["difference"] is None and still["p"] is None
    assert reward_row("hacked", write_log(tmp_path / "d", [0.5] * 4))["state"].startswith("not run")
    assert reward_row("hacked", tmp_path / "nowhere")["value"] is None


def test_the_largest_loss_is_of_what_was_to_be_kept_and_knows_direction():
    results = {
        ("sft", "schema"): result("sft", "schema", [1] * 100, "learned"),
        ("dpo", "schema"): result("dpo", "schema", [1] * 80 + [0] * 20, "kept"),
        ("tools", "schema"): result("tools", "schema", [0] * 100, "watched"),
    }
    rows = build_table(results)
    assert [row["stage"] for row in losses(rows)] == ["dpo"]
    found = measurements(None, rows, results, [])
    assert found["largest_loss"].value == pytest.approx(0.2)
    assert found["largest_loss"].ci95[0] < 0.2 < found["largest_loss"].ci95[1]
    assert "copies" not in found
    results["sft", "contamination"] = result("sft", "contamination", [1, 0, 0, 0], "watched", "copy")
    results["dpo", "contamination"] = result("dpo", "contamination", [0, 0, 0, 0], "watched", "copy")
    assert measurements(None, build_table(results), results, [])["copies"].value == 0.25
    assert found["coverage"].value == 1 and found["judged"].n == 300 and "agreement" not in found


def test_the_markdown_says_why_there_is_no_number_and_never_prints_a_bare_difference(tmp_path):
    gone = Result(Planned("grpo", "sums", "watched", {}), state="not run: grpo | has not been run")
    results = {
        ("base", "schema"): result("base", "schema", [0] * 20 + [None]),
        ("sft", "schema"): result("sft", "schema", [1] * 20 + [None]),
        ("grpo", "sums"): gone,
    }
    rows = build_table(results)
    text = markdown(rows, [])
    assert "not run: grpo \\| has not been run" in text and "(+1 not judged)" in text
    for row in rows:
        assert (row["difference"] is None) == (row["difference_ci95"] is None) == (row["p"] is None)
    assert p_text(0.00001) == "< 0.0001" and p_text(0.0312) == "0.031" and p_text(None) == "–"
    plot_differences(rows, tmp_path / "plots" / "d.png")
    assert (tmp_path / "plots" / "d.png").stat().st_size > 1000
    plot_differences([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_samples_hold_no_harmful_text():
    items = [{"scores": {"success": 1.0}, "sha256": "ab", "opening": "Sur", "characters": 400, "wrapper": "x"}] * 9
    shown = samples({("sft", "attacks"): Result(Planned("sft", "attacks", "before", {}), items)})
    assert len(shown) == suite_report.SAMPLES and not {"prompt", "reply", "expected"} & set(shown[0])
