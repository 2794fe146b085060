"""Two processes with a thread each against one with two threads: what `labs run all` and `make test` are arranged by.

    python benchmarks/threads_or_processes.py                 # five rounds, about three minutes; leave the machine alone
    python benchmarks/threads_or_processes.py --rounds 3 --seconds 5

Each process trains a new model of lab 00's tiny size on random tokens and counts them. The three ways take turns in each round,
so that a machine that slows down slows down all of them.
"""

import argparse
import os
import subprocess
import sys
import time

from shared import REPO_ROOT
from shared.profiles import load_profile
from shared.significance import bootstrap_ci

WAYS = {"one process, 1 thread": (1, 1), "one process, 2 threads": (1, 2), "two processes, 1 thread each": (2, 1)}
ROWS, LENGTH, VOCABULARY = 12, 128, 1024  # a batch of lab 04's


def train_for(seconds: float) -> float:
    """Tokens a second of forward, backward and an AdamW step, after two steps that are not counted."""
    import torch

    from attention_implementation import LanguageModel, ModelConfig, to_huggingface

    torch.manual_seed(0)
    sizes = load_profile("00", "tiny").base.model
    model = to_huggingface(LanguageModel(ModelConfig(vocab_size=VOCABULARY, **sizes)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    steps, start = -2, 0.0
    while steps < 1 or time.perf_counter() < start + seconds:
        if steps == 0:
            start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps * ROWS * LENGTH / (time.perf_counter() - start)


def measure(processes: int, threads: int, seconds: float) -> float:
    """Tokens a second of all processes together."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", str(seconds)]
    running = [
        subprocess.Popen(command, env=environment, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("error: a process stopped; its message stands above")
    return sum(float(output) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of training in each process")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(train_for(arguments.worker))
        return
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(arguments.rounds):
        for name, (processes, threads) in WAYS.items():
            rates[name].append(measure(processes, threads, arguments.seconds))
            print(f"{name:<30} {rates[name][-1]:>8,.0f} tokens/s", flush=True)
    one, threads, processes = rates.values()
    for name, over, under in (
        ("a second thread", threads, one), ("a second process", processes, one),
        ("two processes over two threads", processes, threads),
    ):  # fmt: skip
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        low, high = bootstrap_ci(ratios)
        print(
            f"{name}: {sum(ratios) / len(ratios):.2f} times (95 % interval {low:.2f} to {high:.2f}, n = {len(ratios)})"
        )


if __name__ == "__main__":
    main()
