"""The loop, its switches, and the promise that a killed run ends like an uninterrupted one."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import pretrain
from attention_implementation import LanguageModel, ModelConfig
from shared import REPO_ROOT, LabsError
from shared.training import read_log
from training_loop import TrainerConfig, TrainingDiverged, learning_rate_factor, make_optimizers, train, with_changes

SCRIPT = "labs/00_pretraining_fundamentals/pretrain.py"
SMALL = [
    "shakespeare.model.dim=32",
    "shakespeare.model.hidden_dim=64",
    "shakespeare.model.n_layers=2",
    "shakespeare.trainer.max_steps=120",
    "shakespeare.trainer.eval_every=60",
    "shakespeare.trainer.checkpoint_every=20",
]
# Each number is the last one plus 0, 1 or 2: ln 3 = 1.1 nats to learn, ln 20 = 3.0 without learning.
IDS = torch.randint(3, (5000,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 20


def small_model(**changes):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=20, dim=32, n_layers=2, n_heads=2, max_positions=16, **changes))


def run(folder, config=None, model=None, **options):
    config = config or TrainerConfig(max_steps=40, batch_size=8, context=16, warmup_steps=5, eval_every=20)
    model = model or small_model()
    batches = pretrain.random_windows(IDS.to(torch.int16), config.batch_size, config.context, 0)
    return model, train(model, batches, config, folder=folder, **options)


def same(first, second, atol=0.0):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls(tmp_path, optimizer):
    config = TrainerConfig(max_steps=150, batch_size=8, context=16, optimizer=optimizer, eval_every=50)
    rows = run(tmp_path, config)[1]
    assert rows[-1]["train/loss"] < 1.5


def test_learning_rate_zero_learns_nothing(tmp_path):
    config = TrainerConfig(max_steps=20, batch_size=8, context=16, learning_rate=0.0, muon_learning_rate=0.0)
    assert same(run(tmp_path, config)[0], small_model())


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    whole = TrainerConfig(max_steps=10, batch_size=8, context=16, optimizer="adamw")
    parts = with_changes(whole, batch_size=4, gradient_accumulation_steps=2)
    large = pretrain.random_windows(IDS, 8, 16, 0)
    halves = lambda i: tuple(t[(i % 2) * 4 : (i % 2) * 4 + 4] for t in large(i // 2))  # noqa: E731
    one, other = small_model(), small_model()
    train(one, large, whole, folder=tmp_path / "a")
    train(other, halves, parts, folder=tmp_path / "b")
    assert same(one, other, atol=1e-5) and not same(one, small_model(), atol=1e-3)


def test_clipping_holds_the_gradient(tmp_path):
    config = TrainerConfig(
        max_steps=3, batch_size=8, context=16, optimizer="adamw", max_grad_norm=1e-12, weight_decay=0.0
    )
    # AdamW divides by the gradient's own size, but its epsilon is larger than a gradient that was clipped to nothing.
    assert same(run(tmp_path, config)[0], small_model(), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"schedule": "cosine"}]
)
def test_each_switch_trains(tmp_path, changes):
    config = with_changes(TrainerConfig(max_steps=60, batch_size=8, context=16, eval_every=60), **changes)
    assert run(tmp_path, config)[1][-1]["train/loss"] < math.log(20)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path):
    config = TrainerConfig(max_steps=5, batch_size=8, context=16)
    plain = run(tmp_path / "plain", config)[1]
    compiled = run(tmp_path / "compiled", with_changes(config, compile=True))[1]
    assert compiled[-1]["train/loss"] == pytest.approx(plain[-1]["train/loss"], abs=1e-3)


def test_the_schedule_rises_then_falls():
    config = TrainerConfig(max_steps=100, warmup_steps=10, schedule="cosine", min_factor=0.1)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert (
        factors[0] == pytest.approx(0.1)
        and max(factors) == pytest.approx(1.0)
        and factors.index(max(factors)) in (9, 10)
    )
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[-1] == pytest.approx(0.1, abs=0.01)
    late = with_changes(config, schedule="linear", decay_fraction=0.5, min_factor=0.0)
    assert learning_rate_factor(50, late) == 1.0 and learning_rate_factor(99, late) < 0.05
    with pytest.raises(LabsError, match="schedule"):
        learning_rate_factor(5, with_changes(config, schedule="stairs"))


def test_every_parameter_is_trained_by_one_optimizer():
    model = small_model()
    for kind in ("muon", "adamw"):
        groups = [
            group
            for optimizer in make_optimizers(model, TrainerConfig(optimizer=kind))
            for group in optimizer.param_groups
        ]
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
    with pytest.raises(LabsError, match="sgd"):
        make_optimizers(model, TrainerConfig(optimizer="sgd"))


def test_a_diverging_run_says_so_and_keeps_its_log(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        run(tmp_path, model=model)
    assert math.isnan(read_log(tmp_path / "train_log.jsonl")[-1]["train/loss"])


def test_a_run_continued_from_its_checkpoint_is_the_same_run(tmp_path):
    config = TrainerConfig(max_steps=60, batch_size=8, context=16, checkpoint_every=20, eval_every=20)
    whole, rows = run(tmp_path / "whole", config)

    class PowerCut(Exception):
        pass

    def cut(model, step):
        if step == 40:
            raise PowerCut
        return {}

    with pytest.raises(PowerCut):
        run(tmp_path / "cut", config, evaluate=cut)
    resumed, resumed_rows = run(tmp_path / "cut", config)
    assert same(whole, resumed, atol=1e-7)
    assert resumed_rows[-1]["train/loss"] == pytest.approx(rows[-1]["train/loss"], abs=1e-6)
    assert [row["step"] for row in resumed_rows] == [row["step"] for row in rows]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    config = TrainerConfig(max_steps=40, batch_size=8, context=16, checkpoint_every=20)
    run(tmp_path, config, settings="one")
    with pytest.raises(LabsError, match="--restart"):
        run(tmp_path, config, settings="two")


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_with_the_same_loss(tmp_path, script):
    final = {}
    for name in ("whole", "killed"):
        environment = {"LABS_RUNS_DIR": str(tmp_path / name), "LABS_DATA_DIR": "", "OMP_NUM_THREADS": "1"}
        command = ["shakespeare", "--profile", "tiny", "--seed", "3", *SMALL]
        log = tmp_path / name / "tiny" / "shakespeare" / "train_log.jsonl"
        if name == "killed":
            victim = subprocess.Popen(
                [sys.executable, str(REPO_ROOT / SCRIPT), *command],
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            at = random.randint(21, 99)
            while victim.poll() is None and not any(row["step"] >= at for row in read_log(log)):
                time.sleep(0.01)
            assert victim.poll() is None, "the run ended before it could be killed"
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            assert not (log.parent / "metrics.json").exists()
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((log.parent / "metrics.json").read_text())
        final[name] = metrics["criteria"][0]["value"]
        assert [row["step"] for row in read_log(log)] == [0, *range(20, 121, 20)]
    assert final["killed"] == pytest.approx(final["whole"], abs=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["shakespere"], "unknown run"),
        (["base", "--profile", "tiyn"], "did you mean tiny"),
        (["base", "--profile", "tiny", "base.trainer.learning_rat=1"], "learning_rate"),
        (["base", "--profile", "tiny", "base.trainer.max_steps=many"], "must be a number"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(tmp_path, script, arguments, words):
    done = script(SCRIPT, *arguments, LABS_RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_unwritable_folder_is_one_line(tmp_path, script):
    (tmp_path / "file").write_text("in the way")
    done = script(SCRIPT, "shakespeare", "--profile", "tiny", *SMALL, LABS_RUNS_DIR=str(tmp_path / "file"))
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write") and "Traceback" not in done.stderr


def test_characters_are_split_without_overlap_and_windows_follow_seed_and_step():
    tokenizer, training, validation = pretrain.character_data("abcdefghij" * 50)
    assert tokenizer.decode([*training.tolist(), *validation.tolist()]) == "abcdefghij" * 50
    batches = pretrain.random_windows(training, 4, 10, 1)
    ids, targets = batches(7)
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(ids, batches(7)[0])
    assert not torch.equal(ids, batches(8)[0])
    assert not torch.equal(ids, pretrain.random_windows(training, 4, 10, 2)(7)[0])


def test_the_base_run_leaves_an_ordinary_checkpoint(runs, world_tokenizer):
    small = ["max_steps=12", "batch_size=4", "eval_every=6", "checkpoint_every=6"]
    overrides = [f"base.trainer.{setting}" for setting in small]
    metrics = pretrain.run("base", "tiny", 0, overrides=[*overrides, "base.n_test=20", "base.model.n_layers=2"])
    assert {row["name"]: row["passed"] for row in metrics["criteria"]} == {
        "copy_accuracy": False,
        "sum_accuracy": False,
    }
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs / "tiny" / "base" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama" and tokenizer.chat_template and model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert not (folder.parent / "checkpoints").exists()
    unchanged = pretrain.run("base", "tiny", 0, overrides=[*overrides, "base.n_test=20", "base.model.n_layers=2"])
    assert unchanged == metrics


@pytest.mark.parametrize("profile, given, seen", [("tiny", None, None), ("colab", None, "1"), ("local", "0", "0")])
def test_only_the_real_profiles_go_to_the_hub_for_data(tmp_path, monkeypatch, profile, given, seen):
    monkeypatch.setenv("LABS_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("LABS_ALLOW_HUB", given or "")
    if given is None:
        monkeypatch.delenv("LABS_ALLOW_HUB")
    found = []
    monkeypatch.setitem(pretrain.RUNS, "shakespeare", lambda *_: found.append(os.environ.get("LABS_ALLOW_HUB")))
    monkeypatch.setattr(pretrain, "read_metrics", lambda folder: {})
    pretrain.run("shakespeare", profile)
    assert found == [seen]
