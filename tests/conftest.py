"""What tests share: run folders of their own, scripts as a user would start them, a small base model, ways to stop a run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import REPO_ROOT, tiny_world
from shared.training import TrainLog, read_log


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty runs folder that LABS_RUNS_DIR points to."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("LABS_RUNS_DIR", str(folder))
    return folder


@pytest.fixture
def script():
    """Run a script or module of the project as a user would: script("labs/…/pretrain.py", "base") → completed process."""

    def call(path, *arguments, **environment):
        command = [sys.executable, str(REPO_ROOT / path), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}, cwd=REPO_ROOT
        )

    return call


@pytest.fixture
def real_data():
    """Call it for a file of LABS_DATA_DIR: its path; where it is not there, the test is skipped."""

    def find(path):
        found = Path(os.environ.get("LABS_DATA_DIR") or "nowhere") / path
        if not found.exists():
            pytest.skip(f"LABS_DATA_DIR has no {path}")
        return found

    return find


@pytest.fixture
def labelled_by_people(real_data):
    """For tests that read XSTest's labelled replies through the project's own loader."""
    return real_data("xstest/llama2_completions_labelled.jsonl.gz")


@pytest.fixture(scope="session")
def world_tokenizer():
    from tokenizer_training import train_tokenizer

    return train_tokenizer(tiny_world.tokenizer_texts(random.Random("tokenizer"), 9000), 1024, 512)


@pytest.fixture
def tiny_base(tmp_path, world_tokenizer):
    """A folder with an untrained base model of the tiny kind."""
    import torch

    from attention_implementation import LanguageModel, ModelConfig, to_huggingface

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(world_tokenizer), dim=64, n_layers=2, n_heads=2, max_positions=512, zero_init_outputs=False
    )
    folder = tmp_path / "model"
    to_huggingface(LanguageModel(config)).save_pretrained(folder)
    world_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tiny_base):
    """Call it for a new untrained model with its tokenizer: the same weights each time."""
    from shared.models import load_model

    return lambda: load_model(tiny_base, for_training=True)


@pytest.fixture
def with_policy(tiny_base):
    """Fill a runs folder with an untrained model that counts as the finished stages of these names (default: sft)."""

    def place(folder, *stages):
        for stage in stages or ("sft",):
            target = folder / "tiny" / stage
            target.mkdir(parents=True)
            shutil.copytree(tiny_base, target / "model")
            (target / "metrics.json").write_text("{}")
        return folder

    return place


@pytest.fixture
def interrupted():
    """Run something and interrupt it, as Ctrl-C does, when its log reaches a step."""

    def call(step, run, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            write = TrainLog.write

            def write_or_stop(log, at, **numbers):
                if at >= step:
                    raise KeyboardInterrupt
                return write(log, at, **numbers)

            patch.setattr(TrainLog, "write", write_or_stop)
            with pytest.raises(KeyboardInterrupt):
                run(*arguments, **options)

    return call


@pytest.fixture
def killed():
    """Start a script and kill it with SIGKILL as soon as its log reaches a random step in the middle."""

    def start(path, command, log, environment, steps=(4, 9)):
        victim = subprocess.Popen(
            [sys.executable, str(REPO_ROOT / path), *command],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        at = random.randint(*steps)
        while victim.poll() is None and not any(row["step"] >= at for row in read_log(log)):
            time.sleep(0.005)
        assert victim.poll() is None, "the run ended before it could be killed"
        victim.send_signal(signal.SIGKILL)
        victim.wait()

    return start


@pytest.fixture
def same_weights():
    """Whether two models of one kind have the same weights, to `tolerance`."""

    def compare(model, other, tolerance=0.0):
        theirs = other.state_dict()
        return all((value - theirs[name]).abs().max() <= tolerance for name, value in model.state_dict().items())

    return compare


@pytest.fixture
def nothing_written(tmp_path):
    """Whether what lies under the test's folder is as it was when this fixture was asked for."""

    def now():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = {}

    class Watch:
        def begin(self):
            before.update(now())

        def __bool__(self):
            return now() == before

    return Watch()
