"""Stages beside one another: what waits for what, what happens when one fails, and that nothing is left running."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from shared import REPO_ROOT, LabsError, parallel_stages
from shared.parallel_stages import ALONE, run_stages, with_missing
from shared.profiles import STAGES, command_of, stage_dir

# Notes when it began and ended, with how many threads, and what it was called with; ends as it is told, and not before another
# stage has begun where it is told to wait for that.
STAGE = """
import json, os, pathlib, sys, time
folder, other, words = pathlib.Path(sys.argv[1]), sys.argv[4], sys.argv[5:]
seconds, code = float(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
began = time.monotonic()
(folder / "pid").write_text(str(os.getpid()))
print("stage says", folder.name)
time.sleep(seconds)
while other and not (folder.parent / other / "pid").exists() and time.monotonic() < began + 60:
    time.sleep(0.02)
if code == 0:
    (folder / "metrics.json").write_text("{}")
note = {"began": began, "ended": time.monotonic(), "threads": int(os.environ["OMP_NUM_THREADS"]), "words": words}
(folder / "note.json").write_text(json.dumps(note))
sys.exit(code)
"""


@pytest.fixture
def fake(runs, monkeypatch):
    """Run stages that only sleep: fake(names, jobs=…, codes={stage: exit code}, seconds={stage: …}) gives what they noted."""
    monkeypatch.setattr(parallel_stages, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def call(names, jobs=2, codes=None, seconds=None, overrides=None, seed=0, restart=False, other=None):
        def command(stage, *rest):
            how = [str((seconds or {}).get(stage, 0.3)), str((codes or {}).get(stage, 0))]
            how.append((other or {}).get(stage, ""))
            return [sys.executable, "-c", STAGE, str(stage_dir("tiny", stage)), *how, *command_of(stage, *rest)[2:]]

        run_stages(names, "tiny", overrides or {}, seed, restart, jobs, command)

    return call


def notes():
    found = {name: stage_dir("tiny", name) / "note.json" for name in STAGES}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def test_each_waits_for_what_it_needs_and_two_run_at_once(fake, capsys):
    fake(list(STAGES), seconds=dict.fromkeys(STAGES, 0.1), other={"sft": "midtrain", "midtrain": "sft"})
    found = notes()
    assert set(found) == set(STAGES)
    for name, note in found.items():
        others = [other for key, other in found.items() if key != name]
        beside = sum(other["began"] < note["began"] < other["ended"] for other in others)
        assert beside <= 1
        assert all(found[needed]["ended"] <= note["began"] for needed in STAGES[name].requires), name
    assert found["evaluation"]["began"] >= max(note["ended"] for key, note in found.items() if key != "evaluation")
    for name in (*ALONE, "evaluation"):  # these have all cores, and nothing beside them
        note = found.pop(name)
        assert note["threads"] == 4
        assert all(other["ended"] <= note["began"] or other["began"] >= note["ended"] for other in found.values())
    assert {note["threads"] for note in found.values()} == {2}
    assert found["sft"]["began"] < found["midtrain"]["ended"] and found["midtrain"]["began"] < found["sft"]["ended"]
    assert found["sft"]["ended"] - found["sft"]["began"] < 60
    out = capsys.readouterr().out
    assert out.count("stage says") == len(STAGES) and "== base (tiny) started, 4 threads" in out
    assert (stage_dir("tiny", "sft") / "output.log").read_text().startswith("stage says sft")


def test_the_longest_way_to_the_end_comes_first(fake):
    fake(["sft", "midtrain", "shakespeare", "cold_start", "grpo"], jobs=1)
    found = notes()
    order = sorted(found, key=lambda name: found[name]["began"])
    assert order == ["base", "midtrain", "cold_start", "grpo", "sft", "shakespeare"]


def test_what_is_missing_is_built_once_and_what_is_finished_stays(fake):
    assert with_missing(["dpo", "safedpo"], "tiny") == ["base", "sft", "dpo", "safedpo"]
    assert with_missing(["reward", "dpo"], "tiny") == ["base", "sft", "safedpo", "reward", "dpo"]
    assert with_missing(["dpo"], "colab") == ["dpo"]  # there the settings name a hub model
    fake(["base"])
    began = notes()["base"]["began"]
    assert with_missing(["dpo", "safedpo"], "tiny") == ["sft", "dpo", "safedpo"]
    fake(["dpo", "safedpo"], overrides={"dpo": ["dpo.beta=0.2"]}, seed=3, restart=True)
    found = notes()
    assert found["base"]["began"] == began and set(found) == {"base", "sft", "dpo", "safedpo"}
    assert found["dpo"]["words"] == ["--profile", "tiny", "--seed", "3", "--restart", "dpo.beta=0.2"]
    assert found["safedpo"]["words"] == ["--profile", "tiny", "--seed", "3", "--restart"]
    assert found["sft"]["words"] == ["--profile", "tiny", "--seed", "3"]  # nobody asked for that to be trained again


def test_a_failure_starts_nothing_more_and_loses_nothing_that_runs(fake, capsys):
    with pytest.raises(LabsError, match="stage sft stopped with exit code 3; run it again to go on"):
        fake(["base", "sft", "midtrain", "dpo", "cold_start"], codes={"sft": 3}, seconds={"midtrain": 1.0})
    found = notes()
    assert set(found) == {"base", "sft", "midtrain"} and (stage_dir("tiny", "midtrain") / "metrics.json").exists()
    assert "== sft (tiny) stopped\nstage says sft" in capsys.readouterr().out


def test_an_interrupted_stage_interrupts_all(fake, monkeypatch):
    monkeypatch.setattr(parallel_stages, "GRACE_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        fake(["base", "sft", "midtrain"], codes={"sft": 130}, seconds={"midtrain": 60})
    assert "midtrain" not in notes()
    with pytest.raises(ProcessLookupError):
        os.kill(int((stage_dir("tiny", "midtrain") / "pid").read_text()), 0)


def test_sigterm_ends_the_stages_too(runs, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, sys.argv[-1].split('=')[1] + '.pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    program = (
        "import dataclasses; from shared import cli, profiles\n"
        "for name in ('midtrain', 'sft'):\n"
        f"    profiles.STAGES[name] = dataclasses.replace(profiles.STAGES[name], script={str(script)!r}, requires=())\n"
        "cli._stages = lambda name: ['midtrain', 'sft']\ncli.main()"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "run",
        "all",
        "sft.a=one",
        "midtrain.a=two",
        "--profile",
        "tiny",
        "--jobs=2",
    ]
    labs = subprocess.Popen(command, cwd=REPO_ROOT)
    files = [tmp_path / "one.pid", tmp_path / "two.pid"]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < until:
        time.sleep(0.05)
    labs.send_signal(signal.SIGTERM)
    assert labs.wait(30) == 143
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_the_bar_shows_the_last_logged_step_of_this_run(runs):
    folder = stage_dir("tiny", "sft")
    folder.mkdir(parents=True)
    log = folder / "train_log.jsonl"
    log.write_text('{"step": 700, "train/loss": 9.0}\n')
    os.utime(log, (1, 1))  # of an earlier run
    bars = parallel_stages._Bars("tiny")
    bars.progress.live.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with bars:
        bars.begin("sft")
        bars.update()
        (task,) = bars.progress.tasks
        assert (task.completed, task.total, task.fields["loss"]) == (0, 700, "starts")
        log.write_text('{"step": 20, "train/loss": 2.0}\n{"step": 40, "train/loss": 1.25, "elapsed_seconds": 3}\n')
        bars.update()
        assert (task.completed, task.fields["loss"]) == (40, "train/loss 1.25")
        log.write_text('{"step": 60, "train/lo')  # being written
        bars.update()
        assert task.completed == 40
        (folder / "second").mkdir()
        (folder / "second" / "train_log.jsonl").write_text('{"step": 5, "reward": 0.5}\n')
        os.utime(log, (time.time() - 9, time.time() - 9))
        bars.update()
        assert (task.completed, task.fields["loss"]) == (5, "reward 0.5")
        bars.end("sft", "done")
    assert not bars.progress.tasks
