"""Two runs of the labs side by side: what differs, how sure that is, and what they cannot be compared on.

    labs report --against /path/to/other/runs/tiny        # another run's folder, or one stage's
    labs report --against local --profile tiny            # another profile's
    labs report --against results.json                    # a table that the evaluation suite left
    python compare_runs.py --against OTHER --markdown changes.md --fail-if-worse

Where both runs have kept the evaluation suite's items, and they are the same questions, the same items are compared (exact
McNemar for shares, sign-flip test else). Where they have not, there are two numbers with their intervals: they are compared as
independent samples and marked "unpaired". On the same questions that is the weaker comparison; it misses small differences.
No difference is shown without an interval, and all p values of one comparison are corrected together (Holm).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from run_files import EVALUATION, Run, load_run
from shared import LabsError
from shared.profiles import PROFILES, detect_profile, nearest, runs_root
from shared.report import number
from shared.significance import holm_correction, mcnemar, paired_bootstrap, wilson_interval
from shared.training import atomic_write_text

SIGNIFICANT = 0.05
LEAST_COMMON = 0.5  # of the smaller set of items: below that the two were asked other questions
HEADINGS = ("stage", "what", "n", "this", "other", "difference", "95 % interval", "p (Holm)", "compared", "verdict")


# -------------------------------------------------------------------------------------------------------- comparing


def is_share(value: float, n: int | None, ci95: Sequence[float] | None) -> bool:
    """Whether a number is a count out of n: only then does it have Wilson's interval, and a test that counts."""
    if not n or not ci95 or not 0 <= value <= 1 or abs(value * n - round(value * n)) > 1e-6 * n:
        return False
    return all(abs(a - b) < 1e-6 for a, b in zip(wilson_interval(round(value * n), n), ci95, strict=True))


def unpaired(this: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"difference", "low", "high", "p"} of two independent numbers {"value", "n", "ci95"}, or None without intervals.

    Two shares: Newcombe's interval (1998, Stat. Med. 17:873, method 10) and Fisher's exact test. Else the intervals are put
    together by their distances from the values (Zou and Donner 2008, Stat. Med. 27:1693), p from the same distances.
    """
    ends = [side["ci95"] for side in (this, other)]
    if not all(ends):
        return None
    difference = this["value"] - other["value"]
    (low1, high1), (low2, high2) = ends
    down = math.hypot(this["value"] - low1, high2 - other["value"])
    up = math.hypot(high1 - this["value"], other["value"] - low2)
    if all(is_share(side["value"], side["n"], side["ci95"]) for side in (this, other)):
        from scipy.stats import fisher_exact

        counts = [(round(side["value"] * side["n"]), side["n"]) for side in (this, other)]
        p = float(fisher_exact([[count, n - count] for count, n in counts]).pvalue)
        return {"difference": difference, "low": difference - down, "high": difference + up, "p": p}
    for side, (low, high) in zip((this, other), ends, strict=True):
        # The end of an interval as a criterion ("at least +12 points for sure") has no interval of its own.
        if not low < side["value"] < high:
            return None
    from scipy.stats import norm

    spread = (down if difference > 0 else up) / norm.ppf(0.975)
    return {"difference": difference, "low": difference - down, "high": difference + up,
            "p": float(2 * norm.sf(abs(difference) / spread))}  # fmt: skip


def common_items(this: Sequence[Mapping], other: Sequence[Mapping], same_settings: bool) -> list[tuple[int, int]]:
    """Positions of the same questions in both: by their text, or by place where items keep none and the settings agree."""
    if all("prompt" in item for item in (*this, *other)):
        places: dict[tuple[str, int], int] = {}
        for index, key in enumerate(_numbered(other)):
            places[key] = index
        return [(index, places[key]) for index, key in enumerate(_numbered(this)) if key in places]
    same = same_settings and len(this) == len(other)
    same = same and all(a.get("wrapper") == b.get("wrapper") for a, b in zip(this, other, strict=True))
    return [(index, index) for index in range(len(this))] if same else []


def _numbered(items: Sequence[Mapping]) -> list[tuple[str, int]]:
    """(prompt, how often it came before): a question that is asked twice is two items."""
    seen: Counter = Counter()
    keys = []
    for item in items:
        keys.append((item["prompt"], seen[item["prompt"]]))
        seen[item["prompt"]] += 1
    return keys


def paired(row: Mapping[str, Any], this: Run, other: Run) -> tuple[dict[str, Any] | None, str]:
    """The comparison on the same items, and how it was made; None and the reason where there are none.

    Perplexities are compared as losses (nats a token, each text alike), which is what single items have.
    """
    key = row["stage"], row["task"]
    if key not in this.items or key not in other.items:
        return None, "unpaired: no items kept"
    (header, mine), (other_header, theirs) = this.items[key], other.items[key]
    pairs = common_items(mine, theirs, header.get("settings") == other_header.get("settings"))
    if len(pairs) < LEAST_COMMON * min(len(mine), len(theirs)) or not pairs:
        return None, f"unpaired: other questions ({len(pairs)} of {len(mine)} and {len(theirs)} in common)"
    scores = [(mine[i]["scores"].get(row["metric"]), theirs[j]["scores"].get(row["metric"])) for i, j in pairs]
    scores = [(a, b) for a, b in scores if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    if not scores:
        return None, "unpaired: no item was judged in both"
    after, before = zip(*scores, strict=True)
    how = f"paired, {len(scores)} items"
    if not len(mine) == len(theirs) == len(scores):
        how += f" of {len(mine)} and {len(theirs)}"
    if row["unit"] == "share":
        from suite_table import paired_share_interval

        right = [[value > 0.5 for value in side] for side in (after, before)]
        low, high = paired_share_interval(*right)
        found = {"difference": (sum(after) - sum(before)) / len(scores), "low": low, "high": high, "p": mcnemar(*right)}
    else:
        test = paired_bootstrap(after, before)
        found = {"difference": test.difference, "low": test.low, "high": test.high, "p": test.p_value}
    return {**found, "this": sum(after) / len(scores), "other": sum(before) / len(scores), "n": len(scores)}, how


def compare(this: Run, other: Run) -> list[dict[str, Any]]:
    """A row for every criterion and every row of the evaluation that both runs have, p values corrected together."""
    rows = []
    for stage, metrics in this.metrics.items():
        if stage not in other.metrics or (stage == EVALUATION and this.rows and other.rows):
            continue  # the evaluation's criteria are made of its rows, which are compared below
        theirs = {row["name"]: row for row in other.metrics[stage]["criteria"]}
        for row in metrics["criteria"]:
            if row["name"] in theirs:
                better = 1 if row["comparison"].startswith(">") else -1
                rows.append(_row(stage, row["description"], row["unit"], better, row, theirs[row["name"]]))
    for key, row in this.rows.items():
        if key in other.rows:
            found, how = paired(row, this, other)
            named = f"{row['task']}: {row['description']}"
            rows.append(_row(row["stage"], named, row["unit"], row["better"], row, other.rows[key], found, how))
    tested = [row for row in rows if row["p"] is not None]
    for row, corrected in zip(tested, holm_correction([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
        row["verdict"] = "no difference shown"
        if corrected < SIGNIFICANT and row["difference"]:
            side = int(math.copysign(1, row["difference"])) * row["better"]
            row["verdict"] = {1: "better", -1: "worse", 0: "changed"}[side]
    return rows


def _row(
    stage: str,
    what: str,
    unit: str,
    better: int,
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    found: Mapping[str, Any] | None = None,
    how: str = "unpaired",
) -> dict[str, Any]:
    """One row; its difference is this run's minus the other's."""
    row: dict[str, Any] = {
        "stage": stage, "what": what, "unit": unit, "better": better, "n": mine["n"], "other_n": theirs["n"],
        "this": mine["value"], "other": theirs["value"], "difference": None, "low": None, "high": None, "p": None,
        "p_holm": None, "compared": how, "verdict": "",
    }  # fmt: skip
    if found is not None:
        if unit == "perplexity":
            row["unit"], row["what"] = "nats", f"{what} (as loss)"
        return row | dict(found) | {"other_n": found["n"]}
    if mine["value"] is None or theirs["value"] is None:
        return row | {"compared": "not measured in both"}
    found = unpaired(mine, theirs)
    if found is None:
        return row | {"compared": "no interval of both: not compared"}
    if mine["n"] != theirs["n"]:
        row["compared"] += ", other n"
    return row | found


# --------------------------------------------------------------------------------------------------------- telling


def differences(this: Run, other: Run) -> list[str]:
    """What else is not the same in the two runs, a line each: stages, machine, seed, versions, settings, thresholds, data."""
    lines = [*this.notes, *other.notes]
    for run, without in ((this, other), (other, this)):
        if only := [stage for stage in run.metrics if stage not in without.metrics]:
            lines.append(f"only in {run.name}: {', '.join(only)}")
    both = [stage for stage in this.metrics if stage in other.metrics]

    def each(what: str, pick) -> None:
        found: dict[str, list[str]] = {}
        for stage in both:
            mine, theirs = pick(this.metrics[stage]), pick(other.metrics[stage])
            if mine != theirs:
                found.setdefault(f"{mine} here, {theirs} there" if mine and theirs else "", []).append(stage)
        for text, stages in found.items():
            which = "every stage" if len(stages) == len(both) else ", ".join(stages)
            lines.append(f"{what} ({which})" + (f": {text}" if text else ""))

    each("another profile: other models and other test sets", lambda metrics: metrics["profile"])
    each("other hardware, so times and memory do not compare", lambda metrics: _machine(metrics["hardware"]))
    each("another seed", lambda metrics: str(metrics["seed"]))
    each("other data", lambda metrics: str(metrics.get("data", "")))
    for stage in both:
        mine, theirs = this.metrics[stage], other.metrics[stage]
        changed = [name for name in mine["versions"] if mine["versions"][name] != theirs["versions"].get(name)]
        if changed:
            text = ", ".join(
                f"{name} {mine['versions'][name]} / {theirs['versions'].get(name, '–')}" for name in changed
            )
            lines.append(f"{stage}: other versions: {text}")
        if mine.get("settings") != theirs.get("settings"):
            lines.append(f"{stage}: trained with other settings")
        old = {row["name"]: row for row in theirs["criteria"]}
        for row in mine["criteria"]:
            match = old.get(row["name"])
            if match is None:
                lines.append(f"{stage}: {row['name']} was not measured there")
            elif (row["comparison"], row["threshold"]) != (match["comparison"], match["threshold"]):
                lines.append(
                    f"{stage}: {row['name']} must be {row['comparison']} {number(row['threshold'])} here, "
                    f"{match['comparison']} {number(match['threshold'])} there"
                )
    return lines


def _machine(hardware: Mapping[str, Any]) -> str:
    return f"{hardware.get('gpu') or 'no GPU'}, {hardware.get('cores')} cores, {hardware.get('machine')}"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as text, in the order of HEADINGS. Two numbers without an interval stand side by side, without a difference."""
    n = "–" if row["n"] is None else str(row["n"])
    if row["other_n"] != row["n"]:
        n += f" / {'–' if row['other_n'] is None else row['other_n']}"
    p = row["p_holm"]
    return (
        row["stage"], f"{row['what']} ({row['unit']})", n, number(row["this"]), number(row["other"]),
        "–" if row["difference"] is None else f"{row['difference']:+.3g}",
        "–" if row["low"] is None else f"{row['low']:+.3g} to {row['high']:+.3g}",
        "–" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}", row["compared"], row["verdict"],
    )  # fmt: skip


def closing(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many were tested, how many got better or worse."""
    counts = Counter(row["verdict"] for row in rows if row["p"] is not None)
    tested = sum(counts.values())
    told = ", ".join(
        f"{counts[name]} {name}" for name in ("better", "worse", "changed", "no difference shown") if counts[name]
    )
    rest = len(rows) - tested
    return f"{tested} differences tested together (Holm): {told or 'none'}; {rest} numbers have no interval to test."


def markdown(this: Run, other: Run, rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as Markdown: what else differs, the table, the count."""
    lines = [f"This: {this.name}. Other: {other.name}. A difference is this minus other.", ""]
    lines += [f"- {line}" for line in differences(this, other)]
    lines += ["", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", closing(rows)]) + "\n"


def render_terminal(this: Run, other: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the comparison, the rows of each stage under its name."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{escape(this.name)} against {escape(other.name)}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right" if heading not in ("what", "compared", "verdict") else "left")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        table.add_row(f"[bold]{escape(stage)}[/]")
        for row in rows:
            if row["stage"] == stage:
                table.add_row(*map(escape, cells(row)[1:]))
        table.add_section()
    console.print(table)
    for line in [*differences(this, other), closing(rows)]:
        console.print(line, markup=False, highlight=False)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    against: Annotated[str, typer.Option(help="Another run: a folder, a metrics.json, a results.json or a profile.")],
    profile: Annotated[str | None, typer.Option(help="Whose run is this: tiny, colab or local.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="This run's folder; default: the profile's in the runs folder.")
    ] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows as JSON here.")] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit code 1 if anything is shown worse.")
    ] = False,
) -> None:
    """Compare this run with another, with intervals and tests. Example: labs report --against /path/to/runs/tiny"""
    profile = profile or detect_profile()
    if profile not in PROFILES:
        raise LabsError(f"unknown profile {profile!r}: {nearest(profile, PROFILES)}")
    this, other = load_run(run or runs_root() / profile, profile), load_run(against, profile)
    this.name = this.name if run else f"runs/{profile}"
    rows = compare(this, other)
    if not rows:
        raise LabsError(
            f"{this.name} and {other.name} have no measured number in common: compare runs of the same stages"
        )
    render_terminal(this, other, rows)
    if markdown_file:
        atomic_write_text(markdown_file, markdown(this, other, rows))
    if json_file:
        content = {"this": this.name, "other": other.name, "differences": differences(this, other), "rows": rows}
        atomic_write_text(json_file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if fail_if_worse and (worse := [f"{row['stage']}: {row['what']}" for row in rows if row["verdict"] == "worse"]):
        raise LabsError(f"worse than {other.name}: {'; '.join(worse)}")


if __name__ == "__main__":
    from shared.cli import run_app

    run_app(app)
