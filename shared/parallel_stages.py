"""Several stages at once: two processes train models this small faster than two threads (benchmarks/threads_or_processes.py).

A stage starts when those that it needs are finished, the one with the longest way to the end first. What it prints is kept in
`output.log` in its folder and shown when it ends; meanwhile a bar shows its last logged step.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import typer

from shared import REPO_ROOT, LabsError
from shared.profiles import STAGES, command_of, load_profile, stage_dir
from shared.training import usable_cores

ALONE = ("base",)  # nearly everything waits for it, so it gets all cores
MEASURES_ALL = ("evaluation",)  # waits for everything else
GRACE_SECONDS = 10  # for stages to end by themselves after Ctrl-C, which reaches them, too


def with_missing(names: Sequence[str], profile: str) -> list[str]:
    """The stages and, in the tiny profile, those that they need and that are not finished, each after its needs.

    Else two stages could both find that a third is missing and build it in the same folder.
    """
    found: list[str] = []

    def add(name: str) -> None:
        for needed in STAGES[name].requires:
            if profile == "tiny" and (needed in names or not (stage_dir(profile, needed) / "metrics.json").exists()):
                add(needed)
        if name not in found:
            found.append(name)

    for name in names:
        add(name)
    return found


def run_stages(
    names: Sequence[str], profile: str, overrides: Mapping[str, list[str]], seed: int = 0, restart: bool = False,
    jobs: int = 2, command: Callable[..., list[str]] = command_of,
) -> None:  # fmt: skip
    """Run the stages in processes of their own, up to `jobs` at a time, each with its share of the cores.

    When one fails, no other is started and those that run come to their end. Raises LabsError naming the one that failed, and
    KeyboardInterrupt when one was interrupted.
    """
    plan = with_missing(names, profile)
    needs = {name: set(STAGES[name].requires) & set(plan) for name in plan}
    needs |= {name: set(plan) - {name} for name in plan if name in MEASURES_ALL}
    seconds = {name: load_profile(STAGES[name].lab, profile)[name].get("time_budget_seconds", 0) for name in plan}

    @cache
    def way_to_the_end(name: str) -> float:
        return seconds[name] + max((way_to_the_end(other) for other in plan if name in needs[other]), default=0)

    finished: set[str] = set()
    failed: dict[str, int] = {}
    running: dict[str, subprocess.Popen] = {}
    interrupted = False
    with _Bars(profile) as bars:
        try:
            while len(finished) < len(plan) and (running or not failed):
                ready = [name for name in plan if name not in {*finished, *running} and needs[name] <= finished]
                ready.sort(key=way_to_the_end, reverse=True)
                crowded = any(name in running for name in ALONE)
                while ready and not failed and not crowded and len(running) < jobs:
                    name = ready.pop(0)
                    crowded = name in ALONE
                    if crowded and running:
                        break
                    is_last = len(finished) == len(plan) - 1
                    threads = usable_cores() if crowded or is_last else max(1, usable_cores() // jobs)
                    words = command(name, profile, overrides.get(name, []), seed, restart and name in names)
                    bars.say(f"== {name} ({profile}) started, {threads} thread{'s' * (threads > 1)}")
                    running[name] = _start(words, stage_dir(profile, name) / "output.log", threads)
                    bars.begin(name)
                time.sleep(0.2)
                bars.update()
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    output = (stage_dir(profile, name) / "output.log").read_text(encoding="utf-8", errors="replace")
                    bars.end(name, f"\n== {name} ({profile}) {'stopped' if code else 'finished'}\n{output.strip()}")
                    if code == 130:
                        raise KeyboardInterrupt
                    failed |= {name: code} if code else {}
                    finished |= set() if code else {name}
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            for process in running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS if interrupted else 0)
                process.terminate()
                process.wait()
    for name, code in failed.items():
        raise LabsError(f"stage {name} stopped with exit code {code}; run it again to go on")


def _start(words: Sequence[str], log: Path, threads: int) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            words, cwd=REPO_ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


class _Bars:
    """A line for each stage that runs, on a terminal; elsewhere only what is said."""

    def __init__(self, profile: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.profile = profile
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(
            *columns, TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), console=Console(), transient=True
        )
        self.tasks: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> _Bars:
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        if self.progress.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text)

    def begin(self, name: str) -> None:
        settings = load_profile(STAGES[name].lab, self.profile)[name]
        total = settings.trainer.get("max_steps") if "trainer" in settings else None
        self.tasks[name] = (self.progress.add_task(name, total=total, loss="starts"), time.time())

    def update(self) -> None:
        """Read the last line of the newest log of each running stage (some train twice), if it was written since it began."""
        for name, (task, began) in self.tasks.items():
            with suppress(OSError, ValueError, IndexError, KeyError):  # no log yet, or half a line
                logs = stage_dir(self.profile, name).rglob("train_log.jsonl")
                log = max(logs, key=lambda path: path.stat().st_mtime)
                if log.stat().st_mtime >= began:
                    with log.open("rb") as file:
                        file.seek(max(0, log.stat().st_size - 4096))
                        row = json.loads(file.read().splitlines()[-1])
                    loss = next((f"{key} {row[key]:.3g}" for key in row if key.endswith(("loss", "reward"))), "")
                    self.progress.update(task, completed=row["step"], loss=loss)

    def end(self, name: str, text: str) -> None:
        self.progress.remove_task(self.tasks.pop(name)[0])
        self.say(text)
