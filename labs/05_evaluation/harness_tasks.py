"""Standard benchmarks through EleutherAI's lm-evaluation-harness: its loop, its prompts or ours, intervals on every number.

    python harness_tasks.py grpo                                          # a stage's checkpoint, a few rows of each slice
    python harness_tasks.py sft --tasks labs_gsm8k --limit 20
    python harness_tasks.py Qwen/Qwen2.5-0.5B --tasks gsm8k,hellaswag,arc_easy --limit 200    # the harness's own, from the hub
    python harness_tasks.py Qwen/Qwen2.5-0.5B-Instruct --tasks labs_humaneval --chat

Tasks of ours (folder `harness/`) read LABS_DATA_DIR, or the hub with LABS_ALLOW_HUB=1: labs_gsm8k (generated rows without
either), labs_mmlu_stem, labs_humaneval. The hub's are the harness's own by name, with what is pinned in `HUB_TASKS`: their
scores compare with published ones when nothing is changed and every row is asked. A `limit` is a slice: its interval says so.

Code that a model wrote is run by `shared/code_sandbox` alone. The harness's own way to run it stays off, and its tasks that
need it are refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

import harness_rows
from shared import LabsError
from shared.data_registry import DATASETS
from shared.profiles import nearest

TASK_FOLDER = Path(__file__).parent / "harness"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASK_FOLDER.glob("*.yaml")))
# The harness's own tasks, with the number of worked examples that their scores are usually published with and, where this
# project knows it, the data's commit.
HUB_TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {"num_fewshot": 5, "revision": DATASETS["gsm8k"].revision},
    "mmlu_stem": {"num_fewshot": 5},
    "hellaswag": {"num_fewshot": 10},
    "arc_easy": {"num_fewshot": 0},
    "arc_challenge": {"num_fewshot": 25},
}
TASKS = (*LOCAL_TASKS, *HUB_TASKS)
TINY_LIMIT = 8


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one task."""

    task: str
    metric: str  # acc, pass, or exact_match with its filter: strict-match, flexible-extract, ours-strict …
    value: float
    n: int
    ci95: tuple[float, float]  # Wilson
    scores: list[float]  # of each row, in the harness's order: for a paired test with another checkpoint
    source: str  # mirror, hub or generated
    left_out: dict[str, int] = field(default_factory=dict)  # rows of the set without a gold, by reason

    def line(self) -> str:
        low, high = self.ci95
        left = "".join(f"; {count} rows left out: {reason}" for reason, count in self.left_out.items())
        said = f"{self.task:<15} {self.metric:<17} {self.value:6.1%} of {self.n} [{low:.1%}, {high:.1%}]"
        return f"{said}, rows: {self.source}{left}"


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises LabsError for an unknown task, and for none."""
    if not tasks:
        raise LabsError(f"name at least one task: {', '.join(TASKS)}")
    for task in tasks:
        if task in ("humaneval", "mbpp") or task.startswith(("humaneval_", "mbpp_")):
            raise LabsError(f"the harness runs the code of {task} without a sandbox: take labs_humaneval")
        if task not in TASKS:
            raise LabsError(f"unknown task {task!r}: {nearest(task, TASKS)}")


def run_harness(
    checkpoint: str | Path | tuple[Any, Any],
    tasks: Sequence[str] = LOCAL_TASKS,
    limit: int | None = TINY_LIMIT,
    *,
    profile: str | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    seed: int = 0,
) -> list[HarnessResult]:
    """Ask a checkpoint the first `limit` rows of each task (None: all) and return a result for each metric.

    checkpoint: a stage's name, a folder, a hub id, or (model, tokenizer) already loaded. num_fewshot, max_new_tokens: as the
    task says where None; a model of few positions needs fewer. chat: through the tokenizer's chat template. Prompts longer
    than the model's positions lose their beginning, as always in the harness. Raises LabsError for an unknown task, a missing
    set, a set without a usable row and where lm-eval is not installed.
    """
    check_tasks(tasks)
    if limit is not None and limit < 1:
        raise LabsError(f"limit={limit} must be at least 1")
    with _quiet():
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise LabsError(f"lm-eval cannot be used ({error}): pip install -c constraints.txt '.[eval]'") from None
        model, tokenizer = checkpoint if isinstance(checkpoint, tuple) else _loaded(str(checkpoint), profile)
        longest = getattr(model.config, "max_position_embeddings", None)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
        # Reading the thousands of tasks that come with the harness takes seconds: only where one of them is wanted.
        on_hub = [task for task in tasks if task in HUB_TASKS]
        manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=bool(on_hub))
        wanted = [_hub_task(task, num_fewshot) if task in HUB_TASKS else task for task in tasks]
        found = simple_evaluate(
            model=wrapped,
            tasks=wanted,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,  # intervals are made here
            log_samples=True,
            apply_chat_template=chat,
            gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=False,
        )
    results = [row for task, samples in found["samples"].items() for row in _results(task, samples)]
    if not results:
        raise LabsError(f"the harness measured nothing on {', '.join(tasks)}: check the tasks' metrics")
    return results


def _hub_task(task: str, num_fewshot: int | None) -> dict[str, Any]:
    """The harness's own task with what is pinned. A group (mmlu_stem) hands its settings to its members."""
    pinned = HUB_TASKS[task]
    spec: dict[str, Any] = {"task": task, "num_fewshot": pinned["num_fewshot"] if num_fewshot is None else num_fewshot}
    if pinned.get("revision"):
        spec["dataset_kwargs"] = {"revision": pinned["revision"]}
    return spec


def _loaded(checkpoint: str, profile: str | None) -> tuple[Any, Any]:
    from shared.cli import locate_model
    from shared.models import load_model

    return load_model(**locate_model(checkpoint, profile))


def _results(task: str, samples: Sequence[dict[str, Any]]) -> list[HarnessResult]:
    """The metrics of a task's rows, one a filter, and for GSM8K lab 03's two readings of the same replies."""
    from shared.significance import wilson_interval

    scores: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            named = metric if sample["filter"] == "none" else sample["filter"]
            scores.setdefault(named, []).append(float(sample[metric]))
        if sample["filter"] == "strict-match":
            ours = harness_rows.gsm8k_scores(sample["resps"][0][0], sample["target"])
            for named in ("ours-strict", "ours-flexible"):
                scores.setdefault(named, []).append(float(ours[named]))
    return [
        HarnessResult(
            task=task,
            metric=metric,
            value=sum(values) / len(values),
            n=len(values),
            ci95=wilson_interval(round(sum(values)), len(values)),
            scores=values,
            source=harness_rows.SOURCES.get(task, "hub"),
            left_out=dict(harness_rows.LEFT_OUT.get(task, {})),
        )
        for metric, values in scores.items()
    ]


@contextlib.contextmanager
def _quiet():
    """The harness's reports of its own progress go, and its bars where nobody watches; what it raises stays."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
def _command(
    checkpoint: Annotated[str, typer.Argument(help="A stage (grpo), a folder with a model, or a hub id.")],
    tasks: Annotated[str, typer.Option(help=f"Of {', '.join(TASKS)}.")] = ",".join(LOCAL_TASKS),
    limit: Annotated[int, typer.Option(help="The first so many rows of each task; 0: all.", min=0)] = TINY_LIMIT,
    profile: Annotated[str | None, typer.Option(help="Whose checkpoint, where it is a stage.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples before the question.", min=0)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest reply.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results, with each row's score, as JSON.")] = None,
) -> None:
    from shared.training import atomic_write_text

    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    begun = time.monotonic()
    results = run_harness(
        checkpoint, chosen, limit or None, profile=profile, num_fewshot=num_fewshot, max_new_tokens=max_new_tokens,
        batch_size=batch_size, chat=chat,
    )  # fmt: skip
    typer.echo("\n".join(result.line() for result in results))
    typer.echo(f"{time.monotonic() - begun:.0f} s")
    if out:
        atomic_write_text(out, json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    from shared.cli import run_app

    run_app(app)
