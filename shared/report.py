"""Criteria, metrics.json and the report card: what a stage must show, what it did show, how sure that is.

A criterion is declared once, in its lab's profiles.yaml. The script, the notebook's last cell, `labs check`, CI and
`labs report` all judge by that declaration.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import LabsError
from shared.training import atomic_write_text, hardware, peak_memory_bytes, versions

METRICS_KEYS = ("stage", "profile", "seed", "wall_seconds", "peak_memory_bytes", "hardware", "versions", "criteria")
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Measurement:
    """A measured number: its sample size, its 95 % interval and what it was before (None where there is none)."""

    value: float
    n: int | None = None
    ci95: tuple[float, float] | None = None
    baseline: float | None = None


class CriterionFailed(LabsError):
    """At least one declared criterion was not met."""


def _finite(value: float | None) -> float | None:
    """A plain float, or None: JSON has no NaN, and NumPy's numbers are not JSON's."""
    return None if value is None or not math.isfinite(value) else float(value)


def evaluate(criteria: Mapping[str, Mapping], measurements: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """Hold each measurement against its declaration {description, unit, comparison, threshold}.

    A declared criterion that was not measured fails, and so do NaN and infinity. Raises LabsError for a measurement
    that no criterion asks for, and for a declaration with a missing field or an unknown comparison.
    """
    extra = set(measurements) - set(criteria)
    if extra:
        raise LabsError(f"measured but not declared in profiles.yaml: {', '.join(sorted(extra))}")
    rows = []
    for name, declared in criteria.items():
        missing = [key for key in ("description", "unit", "comparison", "threshold") if declared.get(key) is None]
        if missing:
            raise LabsError(f"criterion {name} has no {', '.join(missing)}: add it in profiles.yaml")
        if declared["comparison"] not in COMPARISONS:
            raise LabsError(f"criterion {name}: comparison {declared['comparison']!r}; use one of {list(COMPARISONS)}")
        measured = measurements.get(name, Measurement(math.nan))
        ends = [_finite(end) for end in measured.ci95 or ()]
        value = _finite(measured.value)
        passed = value is not None and COMPARISONS[declared["comparison"]](value, declared["threshold"])
        rows.append(
            {
                "name": name,
                "description": declared["description"],
                "value": value,
                "unit": declared["unit"],
                "n": None if measured.n is None else int(measured.n),
                "ci95": ends if ends and None not in ends else None,
                "baseline": _finite(measured.baseline),
                "threshold": declared["threshold"],
                "comparison": declared["comparison"],
                "passed": bool(passed),
            }
        )
    return rows


def write_metrics(
    stage_dir: str | Path,
    *,
    stage: str,
    profile: str,
    seed: int,
    wall_seconds: float,
    criteria: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `stage_dir`/metrics.json whole or not at all, with memory, machine and versions, and return it."""
    metrics = {
        "stage": stage,
        "profile": profile,
        "seed": seed,
        "wall_seconds": round(wall_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "hardware": hardware(),
        "versions": versions(),
        "criteria": [dict(row) for row in criteria],
        **(extra or {}),
    }
    atomic_write_text(Path(stage_dir) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def read_metrics(stage_dir: str | Path) -> dict[str, Any]:
    """The metrics of a finished stage. Raises LabsError when there are none or the file is damaged."""
    path = Path(stage_dir) / "metrics.json"
    again = f"run `labs run {path.parent.name} --restart`"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabsError(f"{path} is not there: run `labs run {path.parent.name}` first") from None
    except json.JSONDecodeError as error:
        raise LabsError(f"{path} is damaged (line {error.lineno}): {again}") from None
    missing = [key for key in METRICS_KEYS if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise LabsError(f"{path} has no {', '.join(missing)}: {again}")
    return metrics


def check(metrics: Mapping[str, Any]) -> None:
    """Raise CriterionFailed, naming each criterion that was not met with its value and threshold."""
    failed = [
        f"{row['name']} is {number(row['value'])}, must be {row['comparison']} {number(row['threshold'])}"
        for row in metrics["criteria"]
        if not row["passed"]
    ]
    if failed or not metrics["criteria"]:
        raise CriterionFailed(f"stage {metrics['stage']}: {'; '.join(failed) or 'no criterion was measured'}")


def judge_again(metrics: Mapping[str, Any], criteria: Mapping[str, Mapping]) -> dict[str, Any]:
    """The metrics with each measured criterion held against today's declaration; those no longer declared are left out."""
    measured = {
        row["name"]: Measurement(
            math.nan if row["value"] is None else row["value"], row["n"], row["ci95"], row["baseline"]
        )
        for row in metrics["criteria"]
        if row["name"] in criteria
    }
    return {**metrics, "criteria": evaluate({name: criteria[name] for name in measured}, measured)}


# ------------------------------------------------------------------------------------------------------------ tables


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(row: Mapping[str, Any]) -> str:
    """The 95 % interval of a criterion, or a dash."""
    return "–" if not row["ci95"] else f"{number(row['ci95'][0])} to {number(row['ci95'][1])}"


HEADINGS = ("stage", "criterion", "measured", "95 % interval", "n", "before", "must be", "met")


def table_rows(all_metrics: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the report card, one row a criterion, in the order of HEADINGS."""
    return [
        (
            metrics["stage"],
            f"{row['description']} ({row['unit']})",
            number(row["value"]),
            interval(row),
            "–" if row["n"] is None else str(row["n"]),
            number(row["baseline"]),
            f"{row['comparison']} {number(row['threshold'])}",
            "yes" if row["passed"] else "NO",
        )
        for metrics in all_metrics
        for row in metrics["criteria"]
    ]


def footer(metrics: Mapping[str, Any]) -> str:
    """One line on how a stage was run: time against its budget, memory, seed, machine."""
    budget = metrics.get("time_budget_seconds")
    machine = metrics["hardware"]
    threads, cores = machine.get("threads"), machine["cores"]
    where = machine["gpu"] or (f"{cores} CPU cores" if threads in (None, cores) else f"{threads} of {cores} CPU cores")
    return (
        f"{metrics['stage']}: {metrics['wall_seconds']:.0f} s of training"
        + (f" (budget {budget:.0f} s)" if budget else "")
        + f", peak memory {metrics['peak_memory_bytes'] / 2**30:.2f} GiB, seed {metrics['seed']}, "
        + f"profile {metrics['profile']}, {where}"
    )


def render_markdown(all_metrics: Sequence[Mapping[str, Any]]) -> str:
    """The report card as a Markdown table, with a line on each run below it."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table_rows(all_metrics)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {footer(metrics)}" for metrics in all_metrics) + "\n"


def criteria_table(metrics: Mapping[str, Any]) -> str:
    """One stage's report card in Markdown: what scripts and notebooks print at their end."""
    return render_markdown([metrics])


def render_terminal(all_metrics: Sequence[Mapping[str, Any]]) -> None:
    """Print the report card as a table that fits the terminal, the criteria of each stage under its name."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Report card", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS[1:]:  # at 80 columns only the criterion's words may wrap: numbers stay whole
        side = "left" if heading in ("criterion", "met") else "right"
        table.add_column(heading, justify=side, no_wrap=heading != "criterion")
    for metrics in all_metrics:
        table.add_row(f"[bold]{escape(metrics['stage'])}[/]")
        for cells in table_rows([metrics]):
            met = "[green]yes[/]" if cells[-1] == "yes" else "[bold red]NO[/]"
            table.add_row(*map(escape, cells[1:-1]), met)
        table.add_section()
    console = Console()
    console.print(table)
    for metrics in all_metrics:
        console.print(footer(metrics), style="dim", markup=False, highlight=False)


def update_readme(path: str | Path, block: str, text: str) -> None:
    """Replace what stands between `<!-- results:BLOCK:begin -->` and `<!-- results:BLOCK:end -->` in a README."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LabsError(f"cannot read {path}: {error.strerror}; it should hold the results block {block}") from None
    begin, end = f"<!-- results:{block}:begin -->", f"<!-- results:{block}:end -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise LabsError(f"{path} must have one {begin} and, after it, one {end}")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    atomic_write_text(path, f"{before}{begin}\n{text.strip()}\n{end}{after}")
