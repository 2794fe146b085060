"""Two runs compared: paired on the same items, unpaired where there are none, corrected, and never a bare difference."""

import json
import random
import shutil

import pytest
from statsmodels.stats.proportion import confint_proportions_2indep

import compare_runs
from compare_runs import cells, common_items, compare, differences, is_share, markdown, unpaired
from run_files import Run, load_run
from shared import LabsError
from shared.report import Measurement, evaluate, write_metrics
from shared.significance import bootstrap_ci, holm_correction, wilson_interval


def share(count, n):
    return {"value": count / n, "n": n, "ci95": list(wilson_interval(count, n))}


def make_run(root, stages, scores=None, *, tasks=None, settings=None, mark="w1", **extra):
    """A profile's folder: {stage: {criterion: (Measurement, comparison)}} and the suite's rows with `scores` by task."""
    folder = root / "tiny"
    for stage, measured in stages.items():
        declared = {
            name: {"description": name, "unit": "share", "comparison": comparison, "threshold": 0.5}
            for name, (_, comparison) in measured.items()
        }
        criteria = evaluate(declared, {name: measurement for name, (measurement, _) in measured.items()})
        write_metrics(
            folder / stage, stage=stage, profile="tiny", seed=0, wall_seconds=1, criteria=criteria,
            extra={"settings": "a", **extra},
        )  # fmt: skip
    rows = []
    for task, values in (scores or {}).items():
        name = {"right": "share", "words": "words"}[(tasks or {}).get(task, "right")]
        metric = (tasks or {}).get(task, "right")
        items = [{"scores": {metric: value}, "prompt": prompt} for prompt, value in values]
        known = [value for _, value in values]
        ci95 = wilson_interval(int(sum(known)), len(known)) if name == "share" else bootstrap_ci(known)
        rows.append(
            {"stage": "sft", "task": task, "metric": metric, "description": task, "unit": name, "n": len(items), "n_error": 0,
             "better": 1 if name == "share" else 0, "value": sum(known) / len(known), "ci95": list(ci95)}
        )  # fmt: skip
        header = {"task": task, "stage": "sft", "checkpoint": mark, "n": len(items), "settings": settings or {}}
        path = folder / "evaluation" / "items" / f"{task}-{mark}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in (header, *items)))
    if rows:
        results = {"rows": rows, "checkpoints": {"sft": mark}}
        (folder / "evaluation" / "results.json").write_text(json.dumps(results))
        write_metrics(folder / "evaluation", stage="evaluation", profile="tiny", seed=0, wall_seconds=1, criteria=[])
    return folder


def measured(count, n=300, comparison=">="):
    return Measurement(count / n, n, wilson_interval(count, n)), comparison


def asked(rights, first=0):
    return [(f"question {number}", float(right)) for number, right in enumerate(rights, first)]


# Numbers without items


def test_two_shares_have_newcombes_interval_and_fishers_test():
    found = unpaired(share(56, 70), share(48, 80))
    # Newcombe 1998, table II, method 10, example a: 0.0524 to 0.3339.
    assert (found["low"], found["high"]) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    low, high = confint_proportions_2indep(56, 70, 48, 80, method="newcomb")
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["difference"] == pytest.approx(0.2) and 0.005 < found["p"] < 0.02
    back = unpaired(share(48, 80), share(56, 70))
    assert (back["low"], back["high"], back["p"]) == pytest.approx((-found["high"], -found["low"], found["p"]))
    none = unpaired(share(200, 200), share(200, 200))  # no interval of width 0: 200 of 200 leaves a doubt
    assert none["difference"] == 0 and none["p"] == 1 and none["low"] < -0.01 and none["high"] > 0.01


def test_other_numbers_take_their_intervals_distances():
    this, other = {"value": 5.0, "n": 9, "ci95": [4.0, 7.0]}, {"value": 1.0, "n": 9, "ci95": [-3.0, 2.0]}
    found = unpaired(this, other)
    assert found["low"] == pytest.approx(4 - 2**0.5) and found["high"] == pytest.approx(4 + 20**0.5)
    assert found["p"] == pytest.approx(2.96e-8, rel=0.05)  # z = 4 / (√2 / 1.96)
    assert unpaired(this, {**other, "ci95": None}) is None
    assert unpaired({**this, "value": 4.0}, other) is None  # a lower bound as a criterion has no interval of its own


def test_only_a_count_out_of_n_is_a_share():
    assert is_share(**{key: share(56, 70)[key] for key in ("value", "n", "ci95")})
    assert not is_share(0.8, 70, [0.7, 0.9])  # a gain of 0.8 with a bootstrap interval
    assert not is_share(0.801, 70, list(wilson_interval(56, 70))) and not is_share(-0.5, 70, [-0.6, -0.4])
    assert not is_share(0.8, None, [0.7, 0.9]) and not is_share(0.8, 70, None)


def test_the_unpaired_interval_covers_the_truth():
    rng, inside = random.Random(0), 0
    for _ in range(400):
        a, b = (sum(rng.random() < p for _ in range(60)) for p in (0.9, 0.8))
        found = unpaired(share(a, 60), share(b, 60))
        inside += found["low"] <= 0.1 <= found["high"]
    assert 372 <= inside <= 396


# Runs


def test_the_same_items_are_compared_as_pairs(tmp_path):
    rng = random.Random(0)
    right = [rng.random() < 0.7 for _ in range(200)]
    better = [value or number % 12 == 0 for number, value in enumerate(right)]
    gained = sum(better) - sum(right)
    this = make_run(tmp_path / "a", {"sft": {"exact": measured(sum(better), 200)}}, {"schema": asked(better)})
    other = make_run(tmp_path / "b", {"sft": {"exact": measured(sum(right), 200)}}, {"schema": asked(right)})
    # Without a key in common no pairing is possible, so the order of the file must not matter.
    lines = (other / "evaluation/items/schema-w1.jsonl").read_text().splitlines()
    (other / "evaluation/items/schema-w1.jsonl").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    criterion, row = compare(load_run(this), load_run(other))
    assert row["compared"] == "paired, 200 items" and row["p"] == pytest.approx(2 * 0.5**gained)
    assert row["low"] > 0 and row["verdict"] == "better" and row["difference"] == pytest.approx(gained / 200)
    # The same numbers as independent samples show nothing: pairing is what sees it.
    assert (
        criterion["compared"] == "unpaired" and criterion["low"] < 0 and criterion["verdict"] == "no difference shown"
    )
    assert [criterion["p_holm"], row["p_holm"]] == pytest.approx(holm_correction([criterion["p"], row["p"]]))
    worse = compare(load_run(other), load_run(this))[1]
    assert worse["verdict"] == "worse" and worse["difference"] == -row["difference"]


def test_a_fake_improvement_is_no_improvement(tmp_path):
    """Twenty numbers of two runs that are equally good: one p value below 0.05 is likely, one verdict is not."""
    rng = random.Random(3)
    sides = [{f"t{task}": asked([rng.random() < 0.5 for _ in range(80)]) for task in range(20)} for _ in range(2)]
    runs = [load_run(make_run(tmp_path / str(side), {"sft": {}}, scores)) for side, scores in enumerate(sides)]
    rows = compare(*runs)
    assert len(rows) == 20 and min(row["p"] for row in rows) < 0.06
    assert all(row["p_holm"] >= row["p"] and row["verdict"] == "no difference shown" for row in rows)


def test_lower_is_better_where_the_criterion_says_so_and_length_is_neither(tmp_path):
    words = [[(f"q{i}", float(i % 7 + extra)) for i in range(60)] for extra in (0, 3)]
    runs = [
        load_run(make_run(tmp_path / str(side), {"safedpo": {"attack": measured(count, comparison="<=")}, "sft": {}},
                          {"length": words[side]}, tasks={"length": "words"}))
        for side, count in enumerate((10, 250))
    ]  # fmt: skip
    attack, length = compare(*runs)
    assert attack["verdict"] == "better" and attack["difference"] < 0
    assert length["verdict"] == "changed" and length["difference"] == -3 and length["compared"] == "paired, 60 items"
    assert compare(*runs[::-1])[0]["verdict"] == "worse"


def test_other_questions_are_not_paired_and_other_sizes_are_said(tmp_path):
    this = make_run(
        tmp_path / "a", {"sft": {"exact": measured(270, 300)}}, {"schema": asked([1] * 100), "x": asked([1] * 50)}
    )
    other = make_run(
        tmp_path / "b",
        {"sft": {"exact": measured(90, 100)}},
        {"schema": asked([1] * 100, 70), "x": asked([1] * 90, 10)},
    )
    criterion, schema, x = compare(load_run(this), load_run(other))
    assert criterion["compared"] == "unpaired, other n" and cells(criterion)[2] == "300 / 100"
    assert schema["compared"] == "unpaired: other questions (30 of 100 and 100 in common)"
    assert x["compared"] == "paired, 40 items of 50 and 90" and x["n"] == 40


def test_items_without_text_pair_by_place_only_under_the_same_settings():
    items = [{"scores": {}} for _ in range(3)]
    assert common_items(items, items, True) == [(0, 0), (1, 1), (2, 2)]
    assert common_items(items, items, False) == [] == common_items(items, items[:2], True)
    wrapped = [{**item, "wrapper": name} for item, name in zip(items, "abc", strict=True)]
    assert common_items(wrapped, wrapped[::-1], True) == []
    twice = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]
    assert common_items(twice, [{"prompt": "b"}, {"prompt": "a"}], False) == [(0, 1), (2, 0)]


def test_no_difference_is_shown_without_an_interval(tmp_path):
    bound = (Measurement(0.28, 300), ">")
    missing = (Measurement(float("nan")), ">")
    runs = [load_run(make_run(tmp_path / name, {"grpo": {"low": bound, "none": missing}})) for name in ("a", "b")]
    low, none = compare(*runs)
    assert low["difference"] is None and low["compared"] == "no interval of both: not compared"
    assert none["compared"] == "not measured in both" and cells(low)[5:8] == ("–", "–", "–")
    assert "0 differences tested" in markdown(*runs, [low, none])


def test_what_else_differs_is_said(tmp_path):
    this = load_run(make_run(tmp_path / "a", {"sft": {"exact": measured(9)}, "dpo": {}}, data="tiny_world"))
    other = load_run(make_run(tmp_path / "b", {"sft": {"exact": measured(9)}, "grpo": {}}, data="gsm8k"))
    theirs = other.metrics["sft"]
    theirs["hardware"] = {"gpu": "NVIDIA L4", "cores": 8, "machine": "x86_64"}
    theirs["versions"] = {**theirs["versions"], "trl": "0.1"}
    theirs |= {"seed": 7, "profile": "colab", "settings": "b"}
    theirs["criteria"][0]["threshold"] = 0.9
    told = "\n".join(differences(this, other))
    for part in ("another profile", "other test sets", "NVIDIA L4, 8 cores", "memory do not compare", "0 here, 7 there",
                 "tiny_world here, gsm8k there", "sft: other versions: trl", "sft: trained with other settings",
                 "must be >= 0.5 here, >= 0.9 there", ": dpo", ": grpo"):  # fmt: skip
        assert part in told, part
    assert differences(this, this) == []


def test_older_weights_and_damaged_items_are_not_taken_for_the_run(tmp_path):
    this = make_run(tmp_path / "a", {"sft": {}}, {"schema": asked([1, 1, 0, 1] * 10)})
    other = make_run(tmp_path / "b", {"sft": {}}, {"schema": asked([1, 0, 0, 1] * 10)})
    path = other / "evaluation/items/schema-w1.jsonl"
    path.write_text(path.read_text().replace('"checkpoint": "w1"', '"checkpoint": "old"'))
    assert compare(load_run(this), load_run(other))[0]["compared"] == "unpaired: no items kept"
    path.write_text(path.read_text().replace('"old"', '"w1"')[:-30])
    run = load_run(other)
    assert not run.items and "schema-w1.jsonl is damaged" in run.notes[0]


def test_a_run_is_found_by_folder_stage_file_or_profile(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "runs", {"sft": {"exact": measured(9)}}, {"schema": asked([1] * 9)})
    monkeypatch.setenv("LABS_RUNS_DIR", str(tmp_path / "runs"))
    for where in (folder, folder.parent, "tiny"):
        run = load_run(where)
        assert list(run.metrics) == ["sft", "evaluation"] and run.rows and run.items, where
    assert list(load_run(folder / "sft").metrics) == ["sft"] == list(load_run(folder / "sft/metrics.json").metrics)
    assert load_run(folder / "evaluation/results.json").items
    shutil.copy(folder / "evaluation/results.json", tmp_path / "saved.json")
    assert load_run(tmp_path / "saved.json").rows and not load_run(tmp_path / "saved.json").items
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text("[1]")
    for where, message in (
        (tmp_path / "empty", "no finished stage"), (tmp_path / "odd.json", "no table"), ("locl", "did you mean local"),
        (tmp_path / "none", "is no run"),
    ):  # fmt: skip
        with pytest.raises(LabsError, match=message):
            load_run(where)


def test_the_command_compares_writes_and_fails_when_asked(tmp_path, script):
    make_run(tmp_path / "a", {"sft": {"exact": measured(100)}})
    make_run(tmp_path / "b", {"sft": {"exact": measured(280)}})
    arguments = ["--against", str(tmp_path / "b"), "--profile", "tiny", "--markdown", str(tmp_path / "out.md")]
    environment = {"LABS_RUNS_DIR": str(tmp_path / "a"), "COLUMNS": "200"}
    done = script("labs/05_evaluation/compare_runs.py", *arguments, "--json", str(tmp_path / "out.json"), **environment)
    assert done.returncode == 0 and "worse" in done.stdout and "-0.6" in done.stdout
    assert "| sft | exact (share) | 300 | 0.333 | 0.933 | -0.6 |" in (tmp_path / "out.md").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["verdict"] == "worse"
    done = script("labs/05_evaluation/compare_runs.py", *arguments, "--fail-if-worse", **environment)
    assert done.returncode == 1 and done.stderr.startswith("error: worse than") and "Traceback" not in done.stderr


def test_labs_report_against_becomes_this_script(monkeypatch):
    from shared import cli

    became = []

    def execv(program, arguments):
        became.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(cli.os, "execv", execv)
    for arguments in (["--against", "x", "--profile", "tiny"], ["--against=x", "--help"]):
        monkeypatch.setattr("sys.argv", ["labs", "report", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert became[-1][1].endswith("labs/05_evaluation/compare_runs.py") and became[-1][2:] == arguments


def test_runs_with_nothing_in_common_are_refused(tmp_path, script):
    make_run(tmp_path / "a", {"sft": {"exact": measured(100)}})
    make_run(tmp_path / "b", {"dpo": {"exact": measured(100)}})
    done = script(
        "labs/05_evaluation/compare_runs.py", "--against", str(tmp_path / "b"), LABS_RUNS_DIR=str(tmp_path / "a")
    )
    assert done.returncode == 1 and "no measured number in common" in done.stderr
    assert compare(Run("a"), Run("b")) == [] and compare_runs.closing([]).startswith("0 differences")
