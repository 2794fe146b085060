"""The suite as a user runs it: plan, build offer, cache, resume, control, missing and damaged checkpoints, bad rows."""

import json
import shutil
import subprocess
import sys

import pytest

import eval_suite
import suite_plan
import suite_results
import suite_tasks
from shared import REPO_ROOT, LabsError
from shared.profiles import STAGES
from suite_plan import PARENTS, PLAN, TASKS, planned
from suite_results import Checkpoint, ItemStore, Result, find_checkpoint, inputs_mark
from suite_tasks import Metric, Subject, Task, ask_rows

SCRIPT = "labs/05_evaluation/eval_suite.py"
SMALL = ["evaluation.n_test=6", "evaluation.n_pass=2", "evaluation.pass_k=2", "evaluation.wandb=disabled"]


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    """These tests are about the tiny world."""
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)


@pytest.fixture
def counted(monkeypatch):
    """Tasks that ask no model but count who asked: what they score is the first digit of the weights."""
    asked = []

    def run(subject, settings):
        asked.append((subject.stage, settings.get("part", "")))
        return [{"scores": {metric: subject.model}, "prompt": "p", "reply": "r", "value": "v"} for metric in METRICS]

    METRICS = (
        "right",
        "valid",
        "flexible",
        "strict",
        "format",
        "words",
        "success",
        "degenerate",
        "unanswered",
        "exact",
    )
    fakes = {
        name: Task(name, run, tuple(Metric(m, m) for m in ("right", "success", "flexible")), ())
        for name, task in TASKS.items()
        if task.asks
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(TASKS, name, fake)
    monkeypatch.setattr(
        suite_plan, "PLAN", {"base": {"learned": ("sums",)}, "sft": {"learned": ("schema",), "watched": ("sums",)}}
    )
    monkeypatch.setattr(eval_suite, "measured_stages", lambda: ["base", "sft"])
    monkeypatch.setattr(
        eval_suite,
        "load_subject",
        lambda c: Subject(c.stage, float((c.folder / "model" / "x.safetensors").read_text()), None),
    )
    plan = suite_plan.planned
    monkeypatch.setattr(eval_suite, "planned", lambda config: [p for p in plan(config) if p.task != "contamination"])
    return asked


@pytest.fixture
def finished(runs):
    """Make a stage that counts as finished, with weights that are a number in a text file."""

    def place(stage, weights="1", criteria=()):
        folder = runs / "tiny" / stage
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "x.safetensors").write_text(weights)
        rest = {"profile": "tiny", "seed": 0, "wall_seconds": 1, "peak_memory_bytes": 1, "hardware": {}, "versions": {}}
        (folder / "metrics.json").write_text(json.dumps({"stage": stage, "criteria": list(criteria), **rest}))
        return folder

    return place


# ---------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_measures_every_stage_and_every_parent_on_the_same():
    config, _ = eval_suite.settings_of("tiny", SMALL)
    plan = planned(config)
    pairs = {(each.stage, each.task) for each in plan}
    assert len(pairs) == len(plan), "a measurement is planned twice"
    assert set(PLAN) == {"base", "sft", "dpo", "safedpo", "reward", "midtrain", "cold_start", "grpo", "hacked", "tools"}
    for stage, task in pairs:
        if TASKS[task].beside:
            assert (stage, TASKS[task].beside) in pairs
    for stage, roles in PLAN.items():
        for task in (task for tasks in roles.values() for task in tasks if not TASKS[task].beside):
            assert PARENTS.get(stage) is None or (PARENTS[stage], task) in pairs, (stage, task)
    order = [each.stage for each in plan]
    assert order == sorted(order, key=list(PLAN).index), "a model would be loaded twice"
    assert set(PARENTS) | set(PARENTS.values()) <= set(STAGES)


def test_a_model_that_knows_no_conversation_is_shown_an_example():
    config, _ = eval_suite.settings_of("tiny", SMALL)
    shots = {
        stage: suite_plan.settings_of("reasoning", stage, config)["shots"] for stage in ("base", "midtrain", "grpo")
    }
    assert shots["base"] == shots["midtrain"] > 0 == shots["grpo"]


@pytest.mark.parametrize(
    "override", ["evaluation.build=maybe", "evaluation.n_test=0", "evaluation.pass_k=1.5", "evaluation.nonsense=1"]
)
def test_settings_that_cannot_be_are_one_line(override):
    with pytest.raises(LabsError, match=override.split("=")[0].split(".")[1]):
        eval_suite.settings_of("tiny", [override])


def test_yes_and_no_may_be_written_as_yaml_reads_them():
    assert eval_suite.settings_of("tiny", ["evaluation.build=no"])[0].build == "no"
    assert eval_suite.settings_of("tiny", ["evaluation.build=true"])[0].build == "yes"


# ------------------------------------------------------------------------------------------- cache, resume, what changed


def test_what_is_known_is_not_measured_again_and_only_a_changed_checkpoint_is(runs, finished, counted, capsys):
    finished("base", "0"), finished("sft", "1")
    first = eval_suite.run("tiny", overrides=SMALL)
    assert sorted(counted) == [("base", ""), ("base", ""), ("sft", ""), ("sft", "")] and first["measured_now"] == 4
    counted.clear()
    capsys.readouterr()
    assert eval_suite.run("tiny", overrides=SMALL) == first and "nothing has changed" in capsys.readouterr().out
    assert not counted
    (runs / "tiny" / "evaluation" / "metrics.json").unlink()
    again = eval_suite.run("tiny", overrides=SMALL)
    assert not counted and again["from_cache"] == 4
    finished("sft", "0.5")
    changed = eval_suite.run("tiny", overrides=SMALL)
    assert counted == [("sft", ""), ("sft", "")] and changed["measured_now"] == 2
    counted.clear()
    eval_suite.run("tiny", overrides=SMALL, restart=True)
    assert len(counted) == 4


def test_another_size_or_rule_is_measured_anew(runs, finished, counted, monkeypatch):
    finished("base", "0"), finished("sft", "1")
    eval_suite.run("tiny", overrides=SMALL)
    counted.clear()
    eval_suite.run("tiny", overrides=[*SMALL, "evaluation.n_test=7"])
    assert len(counted) == 4
    counted.clear()
    monkeypatch.setattr(suite_results, "VERSION", 99)
    eval_suite.run("tiny", overrides=[*SMALL, "evaluation.n_test=7"])
    assert len(counted) == 4


def test_an_interrupted_run_goes_on_task_by_task(runs, finished, counted, monkeypatch):
    finished("base", "0"), finished("sft", "1")
    measure_one, made = eval_suite.measure_one, []

    def stop_at_third(subject, each):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(each)
        return measure_one(subject, each)

    monkeypatch.setattr(eval_suite, "measure_one", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        eval_suite.run("tiny", overrides=SMALL)
    assert not (runs / "tiny" / "evaluation" / "metrics.json").exists()
    monkeypatch.setattr(eval_suite, "measure_one", measure_one)
    assert eval_suite.run("tiny", overrides=SMALL)["measured_now"] == 2 and len(counted) == 4


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-20], lambda t: "", lambda t: t.replace("scores", "score"), lambda t: "{]\n" + t]
)
def test_a_damaged_file_of_items_is_measured_again_and_counted(runs, finished, counted, damage):
    finished("base", "0"), finished("sft", "1")
    eval_suite.run("tiny", overrides=SMALL)
    folder = runs / "tiny" / "evaluation"
    victim = next((folder / "items").glob("schema-*.jsonl"))
    victim.write_text(damage(victim.read_text()))
    (folder / "metrics.json").unlink()
    metrics = eval_suite.run("tiny", overrides=SMALL)
    assert metrics["damaged_files"] == 1 and metrics["measured_now"] == 1


def test_the_same_weights_are_measured_once(runs, finished, counted):
    finished("base", "1"), finished("sft", "1")
    assert eval_suite.run("tiny", overrides=SMALL)["measured_now"] == 2, "sft has base's weights"


# ------------------------------------------------------------------------------------------------- missing and damaged


def test_what_is_missing_is_named_with_its_command_and_no_criterion_hides_it(runs, finished, counted, capsys):
    finished("base", "0")
    metrics = eval_suite.run("tiny", overrides=SMALL)
    out = capsys.readouterr().out
    assert "`labs run sft --profile tiny`" in out and "evaluation.build=yes" in out
    assert metrics["missing"].keys() == {"sft"} and metrics["not_run"] == ["sft schema", "sft sums"]
    by_name = {row["name"]: row for row in metrics["criteria"]}
    assert by_name["coverage"]["value"] == 0.5 and not by_name["coverage"]["passed"]
    assert by_name["sft_gain_low"]["value"] is None and not by_name["sft_gain_low"]["passed"]
    rows = json.loads((runs / "tiny" / "evaluation" / "results.json").read_text())["rows"]
    missing = [row for row in rows if row["stage"] == "sft"]
    assert missing and all(row["value"] is None and row["state"].startswith("not run") for row in missing)


def test_nothing_at_all_is_an_error(runs, counted):
    with pytest.raises(LabsError, match="labs run all"):
        eval_suite.run("tiny", overrides=SMALL)


def test_a_missing_stage_is_built_when_wanted(runs, finished, counted, monkeypatch):
    finished("base", "0")
    monkeypatch.setattr(eval_suite, "run_stage", lambda stage, profile: finished(stage, "1"))
    metrics = eval_suite.run("tiny", overrides=[*SMALL, "evaluation.build=yes"])
    assert not metrics["missing"] and metrics["measured_now"] == 4


@pytest.mark.parametrize(("answer", "built"), [("y", ["sft"]), ("", []), ("n", [])])
def test_on_a_terminal_it_asks(runs, finished, monkeypatch, answer, built):
    done = []
    monkeypatch.setattr(eval_suite, "run_stage", lambda stage, profile: done.append(stage))
    monkeypatch.setattr(eval_suite.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(eval_suite.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: answer)
    missing = {"sft": find_checkpoint("tiny", "sft")}
    assert eval_suite.build_missing("tiny", "ask", missing) is bool(built) and done == built
    assert not eval_suite.build_missing("colab", "yes", missing), "a real stage is started by hand"


def test_damaged_checkpoints_are_named(finished):
    folder = finished("sft")
    assert find_checkpoint("tiny", "sft").missing is None
    (folder / "model" / "x.safetensors").unlink()
    assert "no weights" in find_checkpoint("tiny", "sft").missing
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("1")
    (folder / "adapter" / "adapter_config.json").write_text("{]")
    assert "damaged adapter" in find_checkpoint("tiny", "sft").missing


def test_weights_that_cannot_be_loaded_are_a_row_not_a_crash(runs, finished, counted, monkeypatch):
    finished("base", "0"), finished("sft", "1")

    def load(checkpoint):
        if checkpoint.stage == "sft":
            raise LabsError("cannot load it: not a safetensors file")
        return Subject(checkpoint.stage, 0.0, None)

    monkeypatch.setattr(eval_suite, "load_subject", load)
    metrics = eval_suite.run("tiny", overrides=SMALL)
    assert metrics["not_run"] == ["sft schema", "sft sums"] and metrics["measured_now"] == 2


def test_a_mark_follows_weights_template_and_base(finished, tmp_path):
    folder = finished("sft")
    marks = {find_checkpoint("tiny", "sft").mark}
    (folder / "model" / "chat_template.jinja").write_text("{{ x }}")
    marks.add(find_checkpoint("tiny", "sft").mark)
    base = tmp_path / "base_model"
    shutil.copytree(folder / "model", base)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("1")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    marks.add(find_checkpoint("tiny", "sft").mark)
    (base / "x.safetensors").write_text("2")
    marks.add(find_checkpoint("tiny", "sft").mark)
    assert len(marks) == 4


# ------------------------------------------------------------------------------------------------------ the control


def test_the_control_answers_as_the_parent_and_leaves_the_parent_as_it_is():
    config, _ = eval_suite.settings_of("tiny", SMALL)
    results = {
        (each.stage, each.task): Result(each, [{"scores": {"x": each.stage}}])
        for each in planned(config)
        if each.task in ("schema", "reasoning", "contamination", "pairs")
    }
    control = eval_suite.untrained(results)
    said = {key: result.items[0]["scores"]["x"] for key, result in control.items()}
    assert said["dpo", "schema"] == said["tools", "schema"] == "sft" and said["sft", "schema"] == "base"
    assert said["base", "schema"] == "base" and said["grpo", "reasoning"] == "cold_start"
    assert said["dpo", "contamination"] == "dpo" and said["reward", "pairs"] == "reward"
    assert control["dpo", "schema"].planned.stage == "dpo" and results["dpo", "schema"].items[0]["scores"]["x"] == "dpo"


def test_with_the_control_nothing_is_gained(runs, finished, counted):
    finished("base", "0"), finished("sft", "1")
    rows = {}
    for control in (False, True):
        eval_suite.run("tiny", overrides=[*SMALL, f"evaluation.control={control}"])
        table = json.loads((runs / "tiny" / "evaluation" / "results.json").read_text())["rows"]
        assert not counted or not control, "the control needs no new measurement"
        counted.clear()
        rows[control] = [row for row in table if row["stage"] == "sft" and row["difference"] is not None]
    assert rows[False] and all(row["difference"] > 0 for row in rows[False])
    assert rows[True] and all(row["difference"] == 0 and row["p"] == 1 for row in rows[True])


# ------------------------------------------------------------------------------------------------------ bad rows


class OneWord:
    """Enough of a tokenizer and a model for `ask_rows`, whose asking is replaced."""


def asked(monkeypatch, rows, replies):
    monkeypatch.setattr(suite_tasks, "replies_of", lambda subject, prompts, n: [replies[p] for p in prompts])
    score = lambda given, kept: [{"right": float(reply == row["gold"])} for reply, row in zip(given, kept, strict=True)]  # noqa: E731
    return ask_rows(
        Subject("x", None, None), rows, prompt=lambda row: row["q"], rendered=lambda row: row["q"],
        gold=lambda row: row["gold"], score=score, max_new_tokens=4,
    )  # fmt: skip


def test_bad_rows_are_named_and_never_a_silent_zero(monkeypatch):
    rows = [
        {"q": "fine", "gold": "yes"},
        {"q": "empty reply", "gold": "yes"},
        {"q": "no room", "gold": "yes"},
        {"q": "no gold", "gold": None},
        {"q": "", "gold": "yes"},
        {"q": "lost letters \ufffd", "gold": "yes"},
        {"q": "Ã©tÃ©", "gold": "yes"},
        {"q": "broken reply", "gold": "yes"},
    ]
    replies = {"fine": "yes", "empty reply": " ", "no room": None, "broken reply": "\ufffd"}
    items = asked(monkeypatch, rows, replies)
    assert [item["scores"].get("right") for item in items] == [1.0, 0.0, None, None, None, None, None, 0.0]
    assert [("error" in item) for item in items] == [False, False, True, True, True, True, True, False]
    assert items[1]["empty"] and items[7]["damaged"] and "no answer" in items[3]["error"]
    assert "Windows-1252" in items[6]["error"]
    counts = eval_suite.item_counts({"x": Result(None, items)})
    assert (counts["n"], counts["n_error"], counts["n_empty"], counts["n_damaged"]) == (8, 5, 1, 1)
    assert sum(counts["errors"].values()) == 5


def test_no_row_at_all_that_can_be_asked_asks_nobody(monkeypatch):
    def nobody(given, kept):
        raise AssertionError

    monkeypatch.setattr(suite_tasks, "replies_of", lambda subject, prompts, n: [])
    items = ask_rows(
        Subject("x", None, None), [{"q": "", "gold": "1"}], prompt=lambda r: r["q"], rendered=lambda r: r["q"],
        gold=lambda r: r["gold"], score=nobody, max_new_tokens=4,
    )  # fmt: skip
    assert items[0]["error"]


def test_the_store_keeps_what_it_is_given(tmp_path):
    config, _ = eval_suite.settings_of("tiny", SMALL)
    each = next(p for p in planned(config) if p.task == "schema")
    store, checkpoint = ItemStore(tmp_path), Checkpoint("sft", tmp_path, mark="a")
    assert store.load(checkpoint, each) is None and not store.damaged
    items = [{"scores": {"right": 1.0}, "reply": "ü"}, {"scores": {}, "error": "no room"}]
    store.save(checkpoint, Result(each, items, 1.5))
    assert store.load(checkpoint, each).items == items and store.load(checkpoint, each).seconds == 1.5
    assert store.load(Checkpoint("sft", tmp_path, mark="b"), each) is None


def test_the_inputs_mark_follows_everything(finished):
    config, _ = eval_suite.settings_of("tiny", SMALL)
    plan = planned(config)
    folder = finished("base", "0")
    marks = [inputs_mark(config, 0, eval_suite.find_checkpoints("tiny"), plan)]
    marks.append(inputs_mark(config, 1, eval_suite.find_checkpoints("tiny"), plan))
    (folder / "train_log.jsonl").write_text('{"step": 1}\n')
    marks.append(inputs_mark(config, 0, eval_suite.find_checkpoints("tiny"), plan))
    finished("sft", "0")
    marks.append(inputs_mark(config, 0, eval_suite.find_checkpoints("tiny"), plan))
    assert len(set(marks)) == 4
    for same in ([], ["evaluation.build=yes", "evaluation.wandb=disabled"]):
        config, _ = eval_suite.settings_of("tiny", [*SMALL, *same])
        assert marks[3] == inputs_mark(config, 0, eval_suite.find_checkpoints("tiny"), plan)


def test_a_second_look_imports_nothing_heavy(runs, finished):
    """Planning, finding checkpoints and marking them needs neither torch nor transformers."""
    program = (
        "import sys, eval_suite as e; c, f = e.settings_of('tiny', []); p = e.planned(c);"
        "e.inputs_mark(c, 0, e.find_checkpoints('tiny'), p);"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO_ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_mistakes_are_one_line(script, tmp_path):
    done = script(SCRIPT, "--profile", "tiny", LABS_RUNS_DIR=str(tmp_path))
    assert (
        done.returncode == 1 and done.stderr.startswith("error: nothing to measure") and "Traceback" not in done.stderr
    )
