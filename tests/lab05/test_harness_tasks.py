"""The harness's tasks: its own filters and ours on the same completions, rows without a gold, and one real run."""

import json
import random

import pytest

import harness_rows
from harness_rows import gsm8k_scores, harness_flexible, harness_match, harness_strict, program_of, run_code
from harness_tasks import HUB_TASKS, LOCAL_TASKS, _results, check_tasks, run_harness
from shared import LabsError

GOLD = "He has 9 * 2 = <<9*2=18>>18 dollars.\n#### 18"
# Completion, then what the harness's two filters take from it (None: no answer), then why ours differs, if it does.
# Scores in the order strict-match, flexible-extract, ours-strict, ours-flexible.
SAME = "1111"
COMPLETIONS = [
    ("9 * 2 = 18\n#### 18", SAME),
    ("#### 18", SAME),
    ("#### 18.", SAME),
    ("#### $18", "0111"),  # the strict pattern knows no $
    ("#### 18 dollars", SAME),
    ("#### 1,8", "1100"),  # commas are dropped anywhere: 1,8 is 18 there
    ("####18", "0111"),  # it wants one space
    ("####  18", "0111"),
    ("#### 18.00", "0011"),  # compared as texts
    ("#### 018", "0011"),
    ("#### +18", "0111"),
    ("#### -18", "0000"),
    ("#### 17\nWait, no.\n#### 18", "0111"),  # the first mark counts there, the last here
    ("#### 17\n#### 18", "0100"),  # without a word of correction: two offers, no answer here
    ("#### 18\n#### 17", "1000"),
    ("#### 18\nThat took 3 steps.", "1011"),  # any number behind the mark is taken by the flexible pattern
    ("#### 18\n\nQuestion: what is 3 + 4?\n#### 7", "1011"),
    ("The answer is 18.", "0101"),
    ("The answer is 18", "0101"),
    ("The answer is $18.", "0101"),
    ("The answer is 18, since 9 * 2 = 18 and not 17", "0001"),
    ("The answer is 18 (for 3 people).", "0001"),
    ("So the answer is eighteen.", "0001"),
    ("\\boxed{18}", "0111"),
    ("The answer is \\boxed{18} after 2 steps", "0011"),
    ("<think>9 * 2 = 18</think> 18", "0111"),
    ("<think>9 * 2 = 18</think> 17", "0000"),
    ("<think>9 * 2 = 18", "0101"),
    ("<answer>18</answer>", "0111"),
    ("18", "0101"),
    ("17 then 18", "0101"),
    ("18 then 17", "0000"),
    ("18 or 20", "0000"),
    ("20 or 18", "0100"),  # the last of two offers is taken there; two offers are no answer here
    ("I have 18. ...", "0001"),  # a run of dots is a number there
    ("It costs 18 dollars, and that is all, $.", "0001"),
    ("", "0000"),
    ("no number at all", "0000"),
    ("####", "0000"),
    ("#### eighteen", "0011"),
    ("#### 18 / 1", "1011"),
    ("#### 18%", "1111"),
    ("#### 36/2", "0011"),
    ("9 * 2 = 18 eggs. She sells them.", "0101"),
    ("#### 18,", SAME),
    ("#### 18,000", "0000"),
    ("#### 1.8e1", "0011"),
]
READINGS = ("strict-match", "flexible-extract", "ours-strict", "ours-flexible")


def harness_verdicts():
    """[(strict, flexible)] of the completions by the harness's own filters and metric, as its gsm8k.yaml sets them."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    from pathlib import Path

    import yaml
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import build_filter_ensemble

    settings = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    ignore = settings["metric_list"][0]
    options = {name: ignore[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    found = []
    for each in settings["filter_list"]:
        parts = [[f["function"], {k: v for k, v in f.items() if k != "function"} or None] for f in each["filter"]]
        requests = [Instance("generate_until", {}, (), 0, resps=[text]) for text, _ in COMPLETIONS]
        build_filter_ensemble(each["name"], parts).apply(requests)
        taken = [request.filtered_resps[each["name"]] for request in requests]
        scores = [exact_match_hf_evaluate(predictions=[t], references=[GOLD], **options)["exact_match"] for t in taken]
        found.append((taken, [bool(score) for score in scores]))
    return found


def test_harness_strict_and_flexible_are_the_harness_to_the_letter():
    for function, (taken, scores) in zip((harness_strict, harness_flexible), harness_verdicts(), strict=True):
        assert [function(text) for text, _ in COMPLETIONS] == taken
        assert [harness_match(function(text), GOLD) for text, _ in COMPLETIONS] == scores
        assert 5 < sum(scores) < len(scores) - 5


def test_a_wrong_variant_of_the_patterns_would_be_seen():
    (_, strict), (_, flexible) = harness_verdicts()
    last_mark = [harness_match((harness_rows.STRICT.findall(t) or ["[invalid]"])[-1], GOLD) for t, _ in COMPLETIONS]
    assert last_mark != strict
    first = ["".join((harness_rows.FLEXIBLE.findall(t) or [("", "")])[0]) for t, _ in COMPLETIONS]
    assert [harness_match(text, GOLD) for text in first] != flexible


@pytest.mark.parametrize("text, expected", COMPLETIONS, ids=[text[:30] or "empty" for text, _ in COMPLETIONS])
def test_every_reading_of_every_completion(text, expected):
    scores = gsm8k_scores(text, GOLD)
    assert "".join(str(int(scores[name])) for name in READINGS) == expected


def test_gold_with_commas_and_dollars():
    assert harness_match("1234", "so\n#### 1,234") and harness_match("$1,234.", "#### 1234")
    assert not harness_match("1234.0", "#### 1,234")


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A LABS_DATA_DIR to write JSON lines into."""
    folder = tmp_path / "data"
    monkeypatch.setenv("LABS_DATA_DIR", str(folder))
    monkeypatch.delenv("LABS_ALLOW_HUB", raising=False)

    def write(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(__import__("gzip").compress(content) if name.endswith(".gz") else content)

    return write


def test_rows_without_an_answer_are_named_and_counted(mirror):
    rows = [{"question": "What is 9 * 2?", "answer": GOLD}] * 3
    bad = [
        {"question": "What?", "answer": "no mark"},
        {"question": "What?", "answer": "#### "},
        {"question": " ", "answer": GOLD},
    ]
    mirror("gsm8k/test.jsonl", [*rows, *bad])
    mirror("gsm8k/train.jsonl", rows)
    parts = harness_rows.gsm8k()
    assert len(parts["test"]) == 3 and len(parts["train"]) == 3
    left = harness_rows.LEFT_OUT["labs_gsm8k"]
    assert sum(left.values()) == 3 and any("no gold" in reason for reason in left)
    assert any("'question' is empty" in reason for reason in left)
    assert harness_rows.SOURCES["labs_gsm8k"] == "mirror"
    (strict, *_) = _results("labs_gsm8k", [_sample(0, "#### 18", 1.0)])
    assert strict.left_out == dict(left) and "rows left out" in strict.line()
    mirror("gsm8k/test.jsonl", bad)
    with pytest.raises(LabsError, match="no row that can be asked"):
        harness_rows.gsm8k()


def test_choices_without_an_answer_are_counted(mirror):
    good = {"question": "q", "type": "t", "choices": list("abcd"), "answer": 1}
    mirror("mmlu_stem/test.jsonl", [good, {**good, "answer": 4}, {**good, "choices": ["a", "b", "", "d"]}])
    assert len(harness_rows.mmlu_stem()["test"]) == 1
    assert sum(harness_rows.LEFT_OUT["labs_mmlu_stem"].values()) == 2


def _sample(doc_id, reply, score):
    return {
        "doc_id": doc_id, "filter": "strict-match", "metrics": ["exact_match"], "exact_match": score,
        "resps": [[reply]], "target": GOLD,
    }  # fmt: skip


def test_results_are_in_the_order_of_the_rows():
    found = _results("labs_gsm8k", [_sample(1, "The answer is 18.", 0.0), _sample(0, "#### 18", 1.0)])
    by_name = {result.metric: result for result in found}
    assert by_name["strict-match"].scores == [1.0, 0.0] == by_name["ours-strict"].scores
    assert by_name["ours-flexible"].scores == [1.0, 1.0] and by_name["ours-flexible"].n == 2
    assert by_name["strict-match"].ci95[0] > 0 and "of 2" in by_name["strict-match"].line()


# ---------------------------------------------------------------------------------------------------------------- code

STUB = 'def add(a, b):\n    """Sum."""\n'
DOC = {"prompt": STUB, "entry_point": "add", "tests": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"], "setup": ""}


@pytest.mark.parametrize(
    "completion, passed",
    [
        ("    return a + b\n", 1.0),
        ("    return a - b\n", 0.0),
        ("    pass\n", 0.0),
        ("", 0.0),
        ("```python\ndef add(a, b):\n    return b + a\n```", 1.0),
        ("    return a + b\n```\nThis adds.", 1.0),
        ("    import os\n    os._exit(0)\n", 0.0),
        ("    print('2 passed')\n", 0.0),
    ],
)
def test_code_is_judged_in_the_sandbox(completion, passed):
    assert run_code(DOC, [completion]) == {"pass": passed}


def test_program_of_keeps_the_stub():
    assert program_of(STUB, "    return 1\n", "add") == STUB + "    return 1\n"
    assert program_of(STUB, "```\nprint(1)\n```", "add").startswith(STUB)


# ----------------------------------------------------------------------------------------------------------- the run itself


@pytest.mark.parametrize(
    "tasks, said",
    [
        ([], "name at least one"), (["labs_gsm8"], "did you mean labs_gsm8k"), (["humaneval"], "take labs_humaneval"),
        (["mbpp_instruct"], "without a sandbox"),
    ],
)  # fmt: skip
def test_tasks_are_checked_before_anything_is_loaded(tasks, said):
    with pytest.raises(LabsError, match=said):
        check_tasks(tasks)
    with pytest.raises(LabsError, match="limit=0"):
        run_harness("nowhere", ["labs_gsm8k"], 0)


def test_task_files_never_ask_the_harness_to_run_code():
    from harness_tasks import TASK_FOLDER

    texts = {path.stem: path.read_text() for path in TASK_FOLDER.glob("*.yaml")}
    assert set(texts) == set(LOCAL_TASKS) == {"labs_gsm8k", "labs_mmlu_stem", "labs_humaneval"}
    assert not any("unsafe_code" in text or "code_eval" in text for text in texts.values())


@pytest.mark.slow
def test_hub_tasks_exist_in_the_harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    from lm_eval.tasks import TaskManager

    assert set(HUB_TASKS) <= set(TaskManager().all_tasks)


@pytest.mark.slow
def test_a_real_run_on_generated_rows(monkeypatch, tiny_base):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    from shared.models import load_model

    monkeypatch.delenv("LABS_DATA_DIR", raising=False)
    monkeypatch.delenv("LABS_ALLOW_HUB", raising=False)
    random.seed(0)
    loaded = load_model(tiny_base)
    results = {row.metric: row for row in run_harness(loaded, ["labs_gsm8k"], 4, num_fewshot=0, max_new_tokens=8)}
    assert set(results) == set(READINGS)
    assert all(row.n == 4 and len(row.scores) == 4 and row.source == "generated" for row in results.values())
    with pytest.raises(LabsError, match="LABS_DATA_DIR"):
        run_harness(loaded, ["labs_mmlu_stem"], 2)
