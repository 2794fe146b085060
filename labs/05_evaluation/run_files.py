"""What a run left on disk, read for a comparison: metrics of each stage, the evaluation's table and its items."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import LabsError
from shared.profiles import PROFILES, STAGES, nearest, runs_root
from shared.report import read_metrics

EVALUATION = "evaluation"


@dataclass
class Run:
    """What one run left: metrics by stage, the evaluation's rows and items by (stage, task), and which weights it measured."""

    name: str
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    items: dict[tuple[str, str], tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_run(where: str | Path, profile: str = "tiny") -> Run:
    """The run that a profile's name, a folder (of runs, of a profile, of a stage), a metrics.json or a results.json stands for.

    Raises LabsError where there is nothing to compare, naming what was looked for.
    """
    path = Path(where)
    if str(where) in PROFILES and not path.exists():
        path = runs_root() / str(where)
    if not path.exists():
        hint = nearest(str(where), PROFILES) if "/" not in str(where) else "check the path"
        raise LabsError(f"{where} is no run: neither a folder, a metrics.json, a results.json nor a profile; {hint}")
    run = Run(str(where))
    if path.is_file() and path.name != "metrics.json":
        _read_evaluation(run, path)
    elif path.is_file() or (path / "metrics.json").exists():
        _read_stage(run, path.parent if path.is_file() else path)
    else:
        inner = path / profile
        folder = (
            inner if not any((path / stage).is_dir() for stage in (*STAGES, EVALUATION)) and inner.is_dir() else path
        )
        for stage in dict.fromkeys((*STAGES, EVALUATION)):
            if (folder / stage / "metrics.json").exists():
                _read_stage(run, folder / stage)
    if not run.metrics and not run.rows:
        raise LabsError(f"{path} holds no finished stage: `labs run all` fills a runs folder, or give the one above")
    return run


def _read_stage(run: Run, folder: Path) -> None:
    metrics = read_metrics(folder)
    run.metrics[metrics["stage"]] = metrics
    if (folder / "results.json").exists():
        _read_evaluation(run, folder / "results.json")


def _read_evaluation(run: Run, path: Path) -> None:
    """Rows of the suite's results.json and, from `items/` beside it, what each item scored."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        run.rows = {
            (row["stage"], row["task"], row["metric"]): row for row in results["rows"] if row["value"] is not None
        }
        marks = {stage: mark for stage, mark in results.get("checkpoints", {}).items() if mark}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabsError(
            f"{path} is no table of the evaluation suite ({type(error).__name__}): `labs run 05 --restart` writes it"
        ) from None
    if results.get("control"):
        run.notes.append(f"{run.name} is a negative control: nothing was trained in it")
    kept: dict[tuple[str, str], list] = {}
    # Two stages with the same weights share a file, and a file of older weights may still lie there: the mark decides.
    files = sorted((path.parent / "items").glob("*.jsonl"), key=lambda file: (file.stat().st_mtime, file.name))
    for file in files:
        try:
            header, *items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            if header["n"] == len(items) and all(isinstance(item["scores"], dict) for item in items):
                kept.setdefault((header["checkpoint"], header["task"]), []).append((header, items))
        except (OSError, ValueError, KeyError, TypeError):
            run.notes.append(f"{run.name}: {file.name} is damaged and left out; its rows are compared unpaired")
    for (stage, task, _), row in run.rows.items():
        for header, items in kept.get((marks.get(stage, ""), task), []):
            if len(items) == row["n"] + row["n_error"]:
                run.items[stage, task] = header, items
