"""Lab 05: every stage measured again by one suite, each beside the stage that it was made from.

    python eval_suite.py                                   # the profile that fits this machine
    python eval_suite.py --profile tiny evaluation.build=yes     # builds first what is missing
    python eval_suite.py evaluation.control=true           # the negative control: no stage has learnt, so criteria must fail
    python eval_suite.py --restart                         # measures all again, whatever is known

Perplexity, schema answers, the persona, attacks and look-alikes, reasoning, function calls: the labs' own test rows and scoring
functions, one table, every number with n and interval, every difference on the same items with a paired test, all tests
corrected together. What is known is not measured again: interrupt it when you like, and only a changed checkpoint costs time.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared import LabsError
from shared.profiles import STAGES, load_profile, run_stage, runs_root
from shared.report import criteria_table, evaluate, read_metrics, write_metrics
from shared.stages import stage_command
from shared.training import progress, wandb_run, watched
from suite_plan import PARENTS, TASKS, Planned, planned
from suite_results import Checkpoint, ItemStore, Result, find_checkpoint, inputs_mark, load_subject, measured_stages

STAGE = "evaluation"
BUILD = ("ask", "yes", "no")
REWARDED = ("grpo", "hacked")  # stages whose training reward is set beside their held-out accuracy


def find_checkpoints(profile: str) -> dict[str, Checkpoint]:
    """The checkpoint of every stage that is measured."""
    return {stage: find_checkpoint(profile, stage) for stage in measured_stages()}


def build_missing(profile: str, build: str, missing: Mapping[str, Checkpoint]) -> bool:
    """Build what is missing, after asking where that is wanted and possible; returns whether something was built.

    Says by name what is missing and which command builds it. Raises LabsError when a stage cannot be built.
    """
    if not missing:
        return False
    for checkpoint in missing.values():
        print(f"missing: {checkpoint.missing}", flush=True)
    if profile != "tiny" or build == "no":  # a real stage takes hours and is started by hand
        return False
    if build == "ask":
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            print("what is there is measured; with evaluation.build=yes the rest is built first", flush=True)
            return False
        if input(f"build {', '.join(missing)} now? [y/N] ").strip().lower() not in ("y", "yes"):
            return False
    for stage in [name for name in STAGES if name in missing]:
        print(f"\n== {stage} ({STAGES[stage].title})", flush=True)
        run_stage(stage, profile)
    return True


def measure(
    plan: Sequence[Planned], checkpoints: Mapping[str, Checkpoint], store: ItemStore
) -> dict[tuple[str, str], Result]:
    """Every planned measurement: from the store where it is known, else made and kept. Models are loaded when needed."""
    results: dict[tuple[str, str], Result] = {}
    subject = None
    bar = progress(plan, "evaluation")
    for each in bar:
        checkpoint = checkpoints[each.stage]
        bar.set_postfix_str(f"{each.stage} {each.task}")
        result = None if checkpoint.missing else store.load(checkpoint, each)
        if checkpoint.missing:
            result = Result(each, state=f"not run: {checkpoint.missing}")
        if result is None:
            try:
                if TASKS[each.task].asks and (subject is None or subject.stage != each.stage):
                    subject = load_subject(checkpoint)
                result = measure_one(subject, each)
                store.save(checkpoint, result)
            except LabsError as error:
                result = Result(each, state=f"not run: {error}")
            if not watched():
                print(f"{each.stage:<11} {each.task:<18} {len(result.items):>4} items {result.seconds:6.1f} s"
                      + ("" if result.state == "measured" else f"  {result.state}"), flush=True)  # fmt: skip
        results[each.stage, each.task] = result
    return results


def untrained(results: Mapping[tuple[str, str], Result]) -> dict[tuple[str, str], Result]:
    """The negative control: for every stage what its parent answered, as if its training had changed nothing."""
    found = dict(results)
    for (stage, task), result in results.items():
        parent = results.get((PARENTS.get(stage, ""), task))
        if parent is not None and TASKS[task].asks:
            found[stage, task] = replace(parent, planned=result.planned)
    return found


def measure_one(subject, each: Planned) -> Result:
    """Run one task on a loaded model. Raises LabsError as the labs' functions do.

    Seconds are of the clock, or of the processor where others keep it busy and these are fewer.
    """
    start, busy = time.perf_counter(), time.process_time()
    items = TASKS[each.task].run(subject, each.settings)
    seconds = min(time.perf_counter() - start, time.process_time() - busy)
    return Result(each, items, seconds, fresh=True)


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Measure what has changed, write the table, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder = settings_of(profile, overrides)
    plan = planned(config)
    checkpoints = find_checkpoints(config.profile)
    missing = {stage: checkpoint for stage, checkpoint in checkpoints.items() if checkpoint.missing}
    if build_missing(config.profile, config.build, missing):
        checkpoints = find_checkpoints(config.profile)
    if all(checkpoint.missing for checkpoint in checkpoints.values()):
        raise LabsError(f"nothing to measure in {runs_root() / config.profile}: `labs run all` builds every stage")
    mark = inputs_mark(config, seed, checkpoints, plan)
    if not restart and (folder / "metrics.json").exists() and read_metrics(folder).get("inputs") == mark:
        print("nothing has changed since the last evaluation; --restart measures everything again")
        return read_metrics(folder)
    if restart:
        shutil.rmtree(folder / "items", ignore_errors=True)
    return evaluate_stages(config, folder, seed, plan, checkpoints, mark)


def settings_of(profile: str | None, overrides: list[str] | None):
    """(the stage's settings, its folder). Raises LabsError for settings that cannot be."""
    from omegaconf import OmegaConf

    settings = load_profile("05", profile, overrides or [])
    config = OmegaConf.merge({"profile": settings.profile}, settings[STAGE])
    if str(config.build).lower() in ("true", "false"):
        config.build = "yes" if config.build in (True, "true", "True") else "no"
    if config.build not in BUILD:
        raise LabsError(f"evaluation.build={config.build!r}: choose {', '.join(BUILD)}")
    for name in ("n_test", "n_pass", "pass_k"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise LabsError(f"evaluation.{name}={config[name]} must be a whole number of at least 1")
    return config, runs_root() / config.profile / STAGE


def evaluate_stages(
    config, folder: Path, seed: int, plan: Sequence[Planned], checkpoints: Mapping[str, Checkpoint], mark: str
) -> dict[str, Any]:
    """Measure, put the table together, hold it against the criteria, and leave everything in the folder."""
    from shared.training import quiet_when_unwatched, seed_everything
    from suite_report import log_table, measurements, reward_row, write_outputs
    from suite_table import agreement, build_table

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    quiet_when_unwatched()
    seed_everything(seed)
    store = ItemStore(folder / "items")
    results = measure(plan, checkpoints, store)
    more = [reward_row(stage, checkpoints[stage].folder) for stage in REWARDED if _there(checkpoints, stage)]
    rows = build_table(untrained(results) if config.control else results, results, more)
    own = {
        stage: read_metrics(checkpoint.folder) for stage, checkpoint in checkpoints.items() if not checkpoint.missing
    }
    agreeing = agreement(rows, own)
    about = {
        "profile": config.profile, "seed": seed, "control": config.control,
        "checkpoints": {stage: checkpoint.mark or None for stage, checkpoint in checkpoints.items()},
    }  # fmt: skip
    write_outputs(folder, rows, agreeing, results, about)
    with wandb_run(STAGE, config, folder, config.wandb) as wandb:
        if wandb is not None:
            log_table(wandb, rows)
    not_run = sorted(
        {f"{result.planned.stage} {result.planned.task}" for result in results.values() if result.state != "measured"}
    )
    metrics = write_metrics(
        folder,
        stage=STAGE,
        profile=config.profile,
        seed=seed,
        wall_seconds=sum(result.seconds for result in results.values()),
        criteria=evaluate(config.criteria, measurements(config, rows, results, agreeing)),
        extra={
            "settings": mark,
            "inputs": mark,
            "time_budget_seconds": config.time_budget_seconds,
            "checkpoints": about["checkpoints"],
            "missing": {stage: each.missing for stage, each in checkpoints.items() if each.missing},
            "not_run": not_run,
            "measured_now": sum(result.fresh for result in results.values()),
            "from_cache": sum(result.state == "measured" and not result.fresh for result in results.values()),
            "damaged_files": store.damaged,
            "items": item_counts(results),
            "seconds_by_task": {
                f"{stage} {task}": round(result.seconds, 1) for (stage, task), result in results.items()
            },
        },
    )
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(criteria_table(metrics))
    return metrics


def _there(checkpoints: Mapping[str, Checkpoint], stage: str) -> bool:
    return stage in checkpoints and not checkpoints[stage].missing


def item_counts(results: Mapping[Any, Result]) -> dict[str, Any]:
    """How many rows were asked, could not be judged (by reason), were answered with nothing or with broken letters."""
    items = [item for result in results.values() for item in result.items]
    reasons: dict[str, int] = {}
    for item in items:
        if "error" in item:
            reasons[item["error"]] = reasons.get(item["error"], 0) + 1
    return {
        "n": len(items), "n_error": sum(reasons.values()), "errors": reasons,
        "n_empty": sum(bool(item.get("empty")) for item in items),
        "n_damaged": sum(bool(item.get("damaged")) for item in items),
    }  # fmt: skip


if __name__ == "__main__":
    stage_command(run, __doc__)()
