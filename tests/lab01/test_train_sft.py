"""The fine-tuning stage: a killed run ends the same, learning rate zero fails, mistakes are one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import train_sft
from shared import REPO_ROOT, LabsError
from shared.training import read_log

SCRIPT = "labs/01_sft_foundations/train_sft.py"
SHORT = [
    "sft.trainer.max_steps=24",
    "sft.trainer.save_steps=4",
    "sft.trainer.eval_steps=12",
    "sft.trainer.logging_steps=4",
    "sft.trainer.per_device_train_batch_size=4",
    "sft.n_train=200",
    "sft.n_test=10",
]


@pytest.fixture
def with_base(tiny_base):
    """Fill a runs folder with an untrained base model that counts as finished."""

    def place(folder):
        base = folder / "tiny" / "base"
        base.mkdir(parents=True)
        shutil.copytree(tiny_base, base / "model")
        (base / "metrics.json").write_text("{}")
        return folder

    return place


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_with_the_same_loss(tmp_path, with_base, script):
    final = {}
    for name in ("whole", "killed"):
        folder = with_base(tmp_path / name)
        environment = {"LABS_RUNS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = ["--profile", "tiny", "--seed", "5", *SHORT]
        log = folder / "tiny" / "sft" / "train_log.jsonl"
        if name == "killed":
            victim = subprocess.Popen(
                [sys.executable, str(REPO_ROOT / SCRIPT), *command],
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            at = random.randint(5, 20)
            while victim.poll() is None and not any(row["step"] >= at for row in read_log(log)):
                time.sleep(0.005)
            assert victim.poll() is None, "the run ended before it could be killed"
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            assert not (log.parent / "metrics.json").exists()
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        rows = read_log(log)
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == sorted(set(steps)) and steps[-1] == 24
        final[name] = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
    assert final["killed"] == pytest.approx(final["whole"], abs=1e-6)


@pytest.mark.slow
def test_with_learning_rate_zero_the_criteria_fail(tmp_path, with_base, script):
    folder = with_base(tmp_path / "runs")
    arguments = ["--profile", "tiny", *SHORT, "sft.trainer.learning_rate=0"]
    done = script(SCRIPT, *arguments, "--strict", LABS_RUNS_DIR=str(folder))
    assert done.returncode == 1 and "values_right is 0" in done.stderr and "Traceback" not in done.stderr
    metrics = json.loads((folder / "tiny" / "sft" / "metrics.json").read_text())
    passed = {row["name"]: row["passed"] for row in metrics["criteria"]}
    assert passed["values_right"] is False and passed["schema_valid"] is False


@pytest.mark.slow
def test_an_adapter_is_saved_and_answers_like_the_model_it_was(tmp_path, with_base, script):
    folder = with_base(tmp_path / "runs")
    done = script(SCRIPT, "--profile", "tiny", *SHORT, "sft.method=lora", LABS_RUNS_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    stage = folder / "tiny" / "sft"
    assert (stage / "adapter" / "adapter_model.safetensors").exists() and not (stage / "model").exists()
    from shared.models import load_model

    model, tokenizer = load_model(folder / "tiny" / "base" / "model", adapter=stage / "adapter")
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    rows = train_sft.test_rows(10)
    assert train_sft.answers(model, tokenizer, rows) == [sample["reply"] for sample in samples]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--profile", "big"], "unknown profile"),
        (["--profile", "tiny", "sft.trainer.lr=1"], "sft.trainer.lr"),
        (["--profile", "tiny", "sft.method=magic"], "choose full or lora"),
        (["--profile", "tiny", "sft.data=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, script, arguments, words):
    done = script(SCRIPT, *arguments, LABS_RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_broken_line_of_the_users_data_is_named(tmp_path, script):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": \n')
    done = script(SCRIPT, "--profile", "tiny", f"sft.data={path}", LABS_RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 1 and "mine.jsonl" in done.stderr and "2" in done.stderr and done.stderr.count("\n") == 1


def test_test_questions_do_not_depend_on_the_training_seed_and_differ_from_training():
    questions = train_sft.test_rows(50)
    assert questions == train_sft.test_rows(50) != train_sft.test_rows(50, "held_out")
    asked = {row["instruction"] for row in train_sft.generated_rows(2000, 0)}
    assert not asked & {row["instruction"] for row in questions}


def test_questions_in_words_are_mixed_in_where_asked_for():
    rows = train_sft.generated_rows(2000, 0, question_share=0.4)
    in_words = [row for row in rows if "format" not in row]
    assert 0.35 < len(in_words) / len(rows) < 0.45
    lengths = [len(row["output"].split()) for row in in_words]
    assert 0.5 < sum(length > 5 for length in lengths) / len(lengths) < 0.7  # most people answer at length
    asked = {row["instruction"] for row in rows}
    assert not asked & {row["instruction"] for row in train_sft.test_questions(300)}


def test_labels_cover_the_answer_alone_unless_told_otherwise(world_tokenizer):
    rows = train_sft.generated_rows(3, 0)
    masked = train_sft.tokenized(rows, world_tokenizer, 256)
    for row, example in zip(rows, masked, strict=True):
        kept = [token for token in example["labels"] if token != -100]
        assert world_tokenizer.decode(kept) == row["output"] + "<|im_end|>"
    everything = train_sft.tokenized(rows, world_tokenizer, 256, mask=False)
    assert all(example["labels"] == example["input_ids"] for example in everything)
    with pytest.raises(LabsError, match="max_length=5"):
        train_sft.tokenized(rows, world_tokenizer, 5)
