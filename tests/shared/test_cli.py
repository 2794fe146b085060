"""The command `labs`: quick to answer, one line for a mistake, exit codes a script can rely on."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from shared import REPO_ROOT, cli, data, models, parallel_stages, profiles, training
from shared.profiles import STAGES, load_profile
from shared.report import Measurement, evaluate, write_metrics

HEAVY = ("torch", "transformers", "datasets", "omegaconf", "scipy", "statsmodels", "matplotlib", "numpy", "wandb")


@pytest.fixture
def labs(monkeypatch, capsys):
    """labs("check", "sft") → (exit code, standard output, standard error), in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["labs", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return call


def finish(stage, good=True, leave_out=()):
    """A finished stage's folder, as its script would leave it."""
    criteria = load_profile(STAGES[stage].lab, "tiny")[stage].criteria
    criteria = {name: dict(declared) for name, declared in criteria.items() if name not in leave_out}
    measured = {}
    for name, declared in criteria.items():
        better = declared["comparison"] in (">=", ">")
        measured[name] = Measurement(declared["threshold"] + (0.01 if better == good else -0.01), 100, (0.1, 0.9), 0.0)
    folder = profiles.stage_dir("tiny", stage)
    rows = evaluate(criteria, measured)
    return write_metrics(folder, stage=stage, profile="tiny", seed=0, wall_seconds=1.0, criteria=rows)


def test_the_command_line_imports_nothing_heavy():
    program = f"import sys, shared.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO_ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_unknown_commands_as_a_user_runs_them():
    def run(*arguments):
        command = [sys.executable, "-m", "shared.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPO_ROOT)

    shown = run("--help")
    assert shown.returncode == 0
    for command in ("doctor", "list", "run", "check", "report", "chat", "data"):
        assert f"\n  {command} " in shown.stdout
    wrong = run("dctor")
    assert wrong.returncode == 2 and "No such command" in wrong.stderr and "Traceback" not in wrong.stderr
    wrong = run("check", "sfft", "--profile", "tiny")
    assert wrong.returncode == 1 and wrong.stderr == "error: unknown stage or lab 'sfft': did you mean sft?\n"


def test_doctor_names_profile_and_reason(labs, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "detect_profile", lambda: "tiny")
    monkeypatch.setenv("LABS_DATA_DIR", str(tmp_path / "gone"))
    code, out, err = labs("doctor")
    assert code == 0 and "tiny (no NVIDIA GPU)" in out and "free disk" in out
    assert "gone is no folder" in err
    assert not runs.exists()  # looking changes nothing


def test_list_shows_the_state_of_every_stage(labs, runs):
    finish("base")
    finish("sft", good=False)
    code, out, _ = labs("list", "--profile", "tiny")
    states = {line.split()[1]: line for line in out.splitlines()}
    assert code == 0 and "not run" in states["shakespeare"]
    assert "finished" in states["base"] and "criteria not met" in states["sft"]


def test_check_exits_with_1_for_missing_failing_and_stale_stages(labs, runs):
    assert labs("check", "base", "--profile", "tiny")[0] == 1
    finish("base")
    assert labs("check", "base", "--profile", "tiny")[:2] == (0, "base: every criterion is met\n")
    code, _, err = labs("check", "all", "--profile", "tiny")
    assert code == 1 and "shakespeare" in err and "sft" in err and "Traceback" not in err
    finish("base", good=False)
    assert labs("check", "base", "--profile", "tiny")[0] == 1
    newest = list(load_profile("00", "tiny").base.criteria)[-1]
    finish("base", leave_out=[newest])
    code, _, err = labs("check", "base", "--profile", "tiny")
    assert code == 1 and f"{newest} not measured" in err


def test_check_judges_by_the_declaration_not_by_the_runs_own_threshold(labs, runs):
    metrics = finish("base", good=False)
    for row in metrics["criteria"]:  # as `labs run base base.criteria.….threshold=…` would leave it
        row["threshold"], row["passed"] = row["value"], True
    (profiles.stage_dir("tiny", "base") / "metrics.json").write_text(json.dumps(metrics))
    code, _, err = labs("check", "base", "--profile", "tiny")
    assert code == 1 and all(f"{row['name']} is" in err for row in metrics["criteria"])


def test_a_terminated_run_takes_its_training_with_it(tmp_path):
    pid_file, script = tmp_path / "pid", tmp_path / "stage.py"
    script.write_text(f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(120)")
    program = (
        "import dataclasses; from shared import cli, profiles; "
        f"profiles.STAGES['base'] = dataclasses.replace(profiles.STAGES['base'], script={str(script)!r}); cli.main()"
    )
    command = [sys.executable, "-c", program, "run", "base", "--profile", "tiny"]
    labs = subprocess.Popen(command, cwd=REPO_ROOT, env={**os.environ, "LABS_RUNS_DIR": str(tmp_path / "runs")})
    waited_until = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < waited_until:
        time.sleep(0.05)
    training = int(pid_file.read_text())
    labs.terminate()
    assert labs.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)


def test_run_runs_in_order_hands_overrides_to_their_stage_and_reports(labs, runs, monkeypatch):
    ran = []

    def run_stage(stage, profile, overrides, seed, restart):
        ran.append((stage, profile, overrides, seed, restart))
        finish(stage)

    monkeypatch.setattr(profiles, "run_stage", run_stage)
    words = ("run", "all", "base.trainer.max_steps=2", "--profile", "tiny", "--seed", "4", "--restart")
    code, out, _ = labs(*words, "--jobs", "1")
    assert code == 0 and [row[0] for row in ran] == list(STAGES)
    assert ("base", "tiny", ["base.trainer.max_steps=2"], 4, True) in ran and ran[0][2] == []
    assert re.search(rf"{len(STAGES)} stages, \d+\.\d minutes", out)
    assert "Report card" in out and (runs / "tiny" / "report.html").exists()
    code, _, err = labs("run", "00", "trainer.max_steps=2", "--profile", "tiny")
    assert code == 1 and "each must begin with a stage" in err
    # All of tiny, two at a time where there are two cores; a lab or another profile one by one.
    beside = []
    monkeypatch.setattr(parallel_stages, "run_stages", lambda *arguments: beside.append(arguments))
    for n_cores in (1, 2):
        monkeypatch.setattr(training, "usable_cores", lambda n_cores=n_cores: n_cores)
        assert labs(*words)[0] == 0 and labs("run", "00", "--profile", "tiny")[0] == 0
        assert labs("run", "all", "--profile", "colab")[0] == 0
    overrides = {name: ["base.trainer.max_steps=2"] * (name == "base") for name in STAGES}
    assert beside == [(list(STAGES), "tiny", overrides, 4, True, 2)]
    assert labs("run", "00", "--jobs", "3", "--profile", "tiny")[0] == 0 and beside[1][-1] == 3


def test_run_fails_with_the_criteria_and_stops_at_a_failing_stage(labs, runs, monkeypatch):
    monkeypatch.setattr(profiles, "run_stage", lambda stage, *rest: finish(stage, good=False))
    code, out, err = labs("run", "base", "--profile", "tiny")
    assert code == 1 and "NO" in out and "criteria not met: base: " in err

    def crash(stage, *rest):
        raise cli.LabsError(f"stage {stage} stopped with exit code 1; run it again to go on")

    monkeypatch.setattr(profiles, "run_stage", crash)
    code, out, err = labs("run", "all", "--profile", "tiny", "--jobs", "1")
    assert code == 1 and err == "error: stage shakespeare stopped with exit code 1; run it again to go on\n"
    assert "== base" not in out


def test_control_c_exits_with_130_and_says_how_to_go_on(labs, runs, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiles, "run_stage", interrupt)
    code, _, err = labs("run", "base", "--profile", "tiny")
    assert code == 130 and "run the same command again to go on" in err


def test_report_writes_what_it_is_asked_for(labs, runs, tmp_path, monkeypatch):
    code, _, err = labs("report", "--profile", "tiny")
    assert code == 1 and "nothing has been run" in err
    finish("base")
    page, table = tmp_path / "a" / "page.html", tmp_path / "table.md"
    assert labs("report", "--profile", "tiny", "--html", page, "--markdown", table)[0] == 0
    assert page.read_text().startswith("<!doctype html>") and table.read_text().startswith("| stage |")
    (tmp_path / "file").write_text("")
    code, _, err = labs("report", "--profile", "tiny", "--html", tmp_path / "file" / "page.html")
    assert code == 1 and err.startswith("error: cannot write") and err.count("\n") == 1


def test_report_readme_fills_the_blocks(labs, runs, tmp_path, monkeypatch):
    finish("base")
    monkeypatch.setattr(cli, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(profiles, "lab_dir", lambda lab: tmp_path / "lab")
    (tmp_path / "lab").mkdir()
    for path, block in ((tmp_path / "README.md", "all"), (tmp_path / "lab" / "README.md", "base")):
        path.write_text(f"<!-- results:{block}:begin -->\n<!-- results:{block}:end -->\n")
    # load_profile finds the lab's folder through the same function, so nothing after finish() may need it
    assert labs("report", "--profile", "tiny", "--readme")[0] == 0
    assert "| base |" in (tmp_path / "README.md").read_text() and "| base |" in (tmp_path / "lab/README.md").read_text()


def test_chat_answers_once_or_until_the_input_ends(labs, runs, monkeypatch):
    asked = []

    def stream_reply(model, tokenizer, messages, max_new_tokens, temperature, seed, raw):
        asked.append(([dict(message) for message in messages], raw))
        yield from ("Hel", "lo")

    monkeypatch.setattr(models, "load_model", lambda **where: (where, None))
    monkeypatch.setattr(models, "stream_reply", stream_reply)
    code, _, err = labs("chat", "sft", "--prompt", "hi", "--profile", "tiny")
    assert code == 1 and "has not been run" in err
    code, _, err = labs("chat", "shakespeare", "--prompt", "hi", "--profile", "tiny")
    assert code == 1 and "without a chat" in err
    for stage in ("base", "sft"):
        (runs / "tiny" / stage / "model").mkdir(parents=True)
        (runs / "tiny" / stage / "model" / "config.json").write_text("{}")
    assert labs("chat", "sft", "--prompt", "hi", "--profile", "tiny")[:2] == (0, "Hello\n")
    assert labs("chat", "base", "--prompt", "hi", "--profile", "tiny")[0] == 0
    assert asked == [([{"role": "user", "content": "hi"}], False), ([{"role": "user", "content": "hi"}], True)]
    lines = iter(["one", "two"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    asked.clear()
    assert labs("chat", "sft", "--profile", "tiny")[0] == 0
    assert [message["content"] for message in asked[-1][0]] == ["one", "Hello", "two"]


def test_chat_finds_an_adapter_and_its_base(runs):
    adapter = runs / "tiny" / "sft" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere"}))
    for named in ("sft", str(adapter)):
        assert cli.locate_model(named, "tiny") == {"name_or_path": "somewhere", "adapter": adapter}
    assert cli.locate_model("Qwen/Qwen2.5-0.5B", "tiny") == {"name_or_path": "Qwen/Qwen2.5-0.5B"}


def test_data_list_and_fetch(labs, tmp_path, monkeypatch):
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)
    code, out, _ = labs("data", "list")
    assert code == 0 and all(name in out for name in data.DATASETS)
    code, out, _ = labs("data", "fetch", tmp_path / "mirror", "gsm8k", "--source", "generated")
    assert code == 0 and "export LABS_DATA_DIR=" in out and (tmp_path / "mirror/MANIFEST.json").exists()
    code, _, err = labs("data", "fetch", tmp_path / "mirror", "gsm9k")
    assert code == 1 and "did you mean gsm8k" in err


def test_a_reader_who_stops_early_is_no_error():
    command = f"{sys.executable} -m shared.cli data list | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPO_ROOT, env={**os.environ})
    assert "Traceback" not in done.stderr
