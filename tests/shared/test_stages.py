"""Stage folders: whose checkpoints lie there, which of them are whole, and the command line around a run."""

import pytest
from typer.testing import CliRunner

from shared import LabsError
from shared.report import CriterionFailed, read_metrics, write_metrics
from shared.stages import claim_folder, log_callback, newest_checkpoint, open_stage, stage_command, trainer_defaults
from shared.training import TrainLog, read_log


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


@pytest.mark.parametrize(
    "note, restart, kept",
    [("mine", False, True), ("mine", True, False), ("theirs", False, False), (None, False, False)],
)
def test_checkpoints_stay_only_for_the_same_run(tmp_path, note, restart, kept):
    """Those of a comparison run below it belong to the same settings, and go with them."""
    own, below = tmp_path / "checkpoints", tmp_path / "plain_dpo" / "checkpoints"
    for folder in (own, below):
        checkpoint(folder, 4)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "plain_dpo" / "train_log.jsonl").write_text("")
    if note:
        (tmp_path / "settings.txt").write_text(note)
    claim_folder(tmp_path, "mine", restart)
    assert own.exists() is below.exists() is kept
    assert (tmp_path / "settings.txt").read_text() == "mine" and not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "plain_dpo" / "train_log.jsonl").exists()


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    claim_folder(tmp_path / "new" / "stage", "mine", False)
    assert [path.name for path in (tmp_path / "new" / "stage").iterdir()] == ["settings.txt"]


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1', "\udcff"])
def test_the_newest_whole_checkpoint_is_taken_and_partial_ones_removed(tmp_path, state):
    for step in (9, 10, 100):  # by number, not by name
        checkpoint(tmp_path, step)
    partial = checkpoint(tmp_path, 200, None)
    if state is not None:
        (partial / "trainer_state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert not partial.exists() and (tmp_path / "checkpoint-9").exists()


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None and newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 5)
    assert newest_checkpoint(tmp_path, resume=False) is None
    assert (tmp_path / "checkpoint-5").exists()


def test_a_stage_is_finished_only_with_the_same_settings(runs, capsys):
    config, folder, mark, finished = open_stage("02", "dpo", "tiny", 0, False, ["dpo.n_test=7"])
    assert finished is None and config.n_test == 7 and config.profile == "tiny"
    assert folder == runs / "tiny" / "dpo" and not runs.exists()
    folder.mkdir(parents=True)
    write_metrics(folder, stage="dpo", profile="tiny", seed=0, wall_seconds=1.0, criteria=[], extra={"settings": mark})
    assert open_stage("02", "dpo", "tiny", 0, False, ["dpo.n_test=7"])[3] == read_metrics(folder)
    assert "--restart" in capsys.readouterr().out
    for seed, restart, overrides in ((1, False, ["dpo.n_test=7"]), (0, True, ["dpo.n_test=7"]), (0, False, [])):
        assert open_stage("02", "dpo", "tiny", seed, restart, overrides)[3] is None


def test_trainer_defaults_write_where_they_are_told_and_report_to_nobody(tmp_path):
    settings = trainer_defaults(tmp_path, 5)
    assert settings["output_dir"] == str(tmp_path) and settings["seed"] == settings["data_seed"] == 5
    assert settings["report_to"] == [] and settings["save_total_limit"] == 1


def test_the_log_has_our_names_and_nothing_unnamed(tmp_path):
    from types import SimpleNamespace

    told = []
    wandb = SimpleNamespace(log=lambda row, step: told.append((row["train/loss"], step)))
    callback = log_callback(TrainLog(tmp_path / "log.jsonl"), {"loss": "train/loss"}, wandb)
    callback.on_log(
        None, SimpleNamespace(global_step=3), None, logs={"loss": 0.5, "grad_norm": 1.0, "num_tokens": 12.0}
    )
    callback.on_log(None, SimpleNamespace(global_step=4), None, logs={"train_runtime": 9.0})
    callback.on_log(None, SimpleNamespace(global_step=4), None)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert (row["step"], row["train/loss"], row["tokens"]) == (3, 0.5, 12) and "grad_norm" not in row
    assert told == [(0.5, 3)]


def metrics(passed):
    row = {"name": "score", "passed": passed, "value": 0.1, "comparison": ">=", "threshold": 0.5}
    return {"stage": "dpo", "profile": "tiny", "criteria": [{**row, "description": "score", "unit": "share", "n": 3}]}


@pytest.mark.parametrize(
    "outcome, arguments, code, words",
    [
        (metrics(True), ["--strict"], 0, ""),
        (metrics(False), [], 0, ""),
        (metrics(False), ["--strict"], 1, "error: "),
        (LabsError("mend this"), [], 1, "error: mend this\n"),
        (CriterionFailed("too low"), [], 1, "error: too low\n"),
        (KeyboardInterrupt(), [], 130, "goes on from the last checkpoint"),
    ],
)
def test_exit_codes_and_errors_of_one_line(outcome, arguments, code, words):
    asked = []

    def run(profile, seed, restart, overrides):
        asked.append((profile, seed, restart, overrides))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    done = CliRunner().invoke(stage_command(run, "What it does."), [*arguments, "--seed", "3", "a.b=1"])
    assert done.exit_code == code and words in done.stderr and done.stderr.count("\n") <= 1
    assert asked == [(None, 3, False, ["a.b=1"])]
