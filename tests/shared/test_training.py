"""The Weights & Biases log: files beside the run, no account, and never a reason for a run to fail."""

import sys
import types

from shared.training import wandb_run


def test_an_offline_log_needs_no_account_and_no_network(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with wandb_run("sft", {"a": 1}, tmp_path / "run") as run:
        run.log({"train/loss": 2.0}, step=1)
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_a_log_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def fail(**settings):
        raise RuntimeError("no room")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail, Settings=dict))
    with wandb_run("sft", {}, tmp_path) as run:
        assert run is None
    assert "RuntimeError: no room" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with wandb_run("sft", {}, tmp_path) as run:
        assert run is None
    assert not capsys.readouterr().err
