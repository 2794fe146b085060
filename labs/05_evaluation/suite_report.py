"""What the suite leaves behind: criteria, the table as JSON and Markdown, a picture of the differences, samples, W&B."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.report import Measurement, number
from shared.training import atomic_write_text, read_log
from suite_table import Results, Row, empty_row, find
from suite_tasks import Metric

SAMPLES = 3  # of each (stage, task)
HEADINGS = (
    "stage", "task", "what", "n", "value", "95 % interval", "parent", "before", "difference", "95 % interval", "p (Holm)",
    "verdict",
)  # fmt: skip
REWARD = Metric("reward", "training reward: last fifth of the steps, before: the first", "reward", 0)
FEWEST_STEPS = 10


def reward_row(stage: str, folder: Path) -> Row:
    """What the stage was paid in training, last fifth of the steps against the first, from its log; Welch's t test.

    The only row that is not held out: beside the accuracy of the same stage it shows whether what was paid is what was wanted.
    """
    row = empty_row(stage, "training_reward", REWARD, "watched", "measured")
    paid = [each["reward/mean"] for each in read_log(folder / "train_log.jsonl") if "reward/mean" in each]
    paid = [float(value) for value in paid if math.isfinite(value)]
    row["parent"] = None
    if len(paid) < FEWEST_STEPS:
        row["state"] = f"not run: {len(paid)} steps in {folder.name}/train_log.jsonl, too few to compare"
        return row
    from scipy.stats import t, ttest_ind

    end = len(paid) // 5
    first, last = paid[:end], paid[-end:]
    mean = sum(last) / end
    spread = math.sqrt(sum((value - mean) ** 2 for value in last) / max(1, end - 1) / end) * float(
        t.ppf(0.975, max(1, end - 1))
    )
    row |= {
        "n": 2 * end, "value": mean, "ci95": [mean - spread, mean + spread], "parent_value": sum(first) / end,
    }  # fmt: skip
    if len({round(value, 9) for value in (*first, *last)}) > 1:  # where nothing varies there is nothing to test
        test = ttest_ind(last, first, equal_var=False)
        interval = test.confidence_interval(0.95)
        ends = [float(interval.low), float(interval.high)]
        row |= {"difference": mean - sum(first) / end, "difference_ci95": ends, "p": float(test.pvalue)}
    return row


# ------------------------------------------------------------------------------------------------------------- criteria


def measurements(config, rows: Sequence[Row], results: Results, agreeing: Sequence[Row]) -> dict[str, Measurement]:
    """The measured side of every criterion that there is a number for; what was not measured fails by its absence."""
    from shared.significance import wilson_interval

    found: dict[str, Measurement] = {}

    def share(name: str, count: int, n: int) -> None:
        if n:
            found[name] = Measurement(count / n, n, wilson_interval(count, n))

    share("coverage", sum(result.state == "measured" for result in results.values()), len(results))
    items = [item for result in results.values() for item in result.items]
    share("judged", sum("error" not in item for item in items), len(items))
    share("agreement", sum(row["agrees"] for row in agreeing), len(agreeing))

    def take(name: str, key: tuple[str, str, str], pick) -> None:
        row = find(rows, *key)
        value = None if row is None else pick(row)
        if row is not None and value is not None:
            found[name] = Measurement(value[0], row["n"], value[1], row["parent_value"])

    change = lambda end: lambda row: row["difference_ci95"] and (row["difference_ci95"][end], row["difference_ci95"])  # noqa: E731
    plain = lambda row: (row["value"], row["ci95"])  # noqa: E731
    take("sft_gain_low", ("sft", "schema", "right"), change(0))
    take("persona_win_rate_low", ("dpo", "persona", "win_rate"), lambda row: (row["ci95"][0], row["ci95"]))
    take("attack_change_high", ("safedpo", "attacks", "success"), change(1))
    take("over_refusal", ("safedpo", "lookalikes", "unanswered"), plain)
    take("pair_accuracy", ("reward", "pairs", "right"), plain)
    take("grpo_gain_low", ("grpo", "reasoning", "flexible"), change(0))
    take("exact_calls", ("tools", "calls_values", "exact"), plain)
    take("hack_accuracy_high", ("hacked", "reasoning", "flexible"), change(1))
    take(
        "hack_reward_gain", ("hacked", "training_reward", "reward"),
        lambda row: row["difference_ci95"] and (row["difference"], row["difference_ci95"]),
    )  # fmt: skip
    copies = [row for row in rows if row["task"] == "contamination" and row["value"] is not None]
    if copies:
        worst = max(copies, key=lambda row: row["value"])
        found["copies"] = Measurement(worst["value"], worst["n"], worst["ci95"])
    if lost := losses(rows):
        worst = lost[0]
        low, high = sorted(-worst["better"] * end for end in worst["difference_ci95"])
        found["largest_loss"] = Measurement(
            -worst["better"] * worst["difference"], worst["n"], (low, high), worst["parent_value"]
        )
    found["seconds"] = Measurement(sum(result.seconds for result in results.values()))
    return found


def losses(rows: Sequence[Row]) -> list[Row]:
    """Skills that a stage was to keep, the one that lost most first (the first may well have gained)."""
    kept = [
        row
        for row in rows
        if row["role"] == "kept" and row["better"] and row["unit"] == "share" and row["difference_ci95"]
    ]
    return sorted(kept, key=lambda row: row["better"] * row["difference"])


# -------------------------------------------------------------------------------------------------------------- outputs


def cells(row: Row) -> list[str]:
    """A row of the table as text, in the order of HEADINGS. What was not run says why in the place of its numbers."""
    head = [row["stage"], row["task"], row["description"]]
    if row["value"] is None:
        return [*head, "–", row["state"], *["–"] * 6, ""]
    compared = [row["parent"] or "–", number(row["parent_value"]), number(row["difference"])]
    return [
        *head, str(row["n"]) + (f" (+{row['n_error']} not judged)" if row["n_error"] else ""), number(row["value"]),
        _interval(row["ci95"]), *compared, _interval(row["difference_ci95"]), p_text(row["p_holm"]), row["verdict"],
    ]  # fmt: skip


def p_text(p: float | None) -> str:
    """A p value with two digits; below 0.0001 that and no more."""
    return "–" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _interval(ends: Sequence[float] | None) -> str:
    return "–" if not ends else f"{number(ends[0])} to {number(ends[1])}"


def markdown(rows: Sequence[Row], agreeing: Sequence[Row]) -> str:
    """The whole table in Markdown, and below it how the stages' own numbers compare."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    tested = sum(row["p"] is not None for row in rows)
    lines += [
        "",
        f"p: exact McNemar test for shares, sign-flip test else, on the same items; corrected for the {tested} tests of this "
        "table (Holm). Intervals of differences: Newcombe for shares, bootstrap else.",
    ]
    outside = [row for row in agreeing if not row["agrees"]]
    lines += [
        f"The stages' own numbers: {len(agreeing) - len(outside)} of {len(agreeing)} lie in the suite's intervals."
    ]
    lines += [
        f"- {row['stage']} {row['criterion']}: own {number(row['own'])}, here {number(row['suite'])} ({_interval(row['ci95'])})"
        for row in outside
    ]
    return "\n".join(lines) + "\n"


def plot_differences(rows: Sequence[Row], path: Path) -> None:
    """Every paired difference of a share with its interval: right of the line it rose. Filled: shown, after correction."""
    from matplotlib.figure import Figure  # not pyplot, whose backend a notebook needs for its own plots

    shown = [row for row in rows if row["difference_ci95"] and row["unit"] in ("share", "mean share", "win rate")][::-1]
    if not shown:
        return
    colours = {"better": "tab:green", "worse": "tab:red", "changed": "tab:blue"}
    figure = Figure(figsize=(8, 0.6 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(shown):
        colour = colours.get(row["verdict"], "grey")
        axes.plot(row["difference_ci95"], [height, height], color=colour, linewidth=1.5)
        filled = row["verdict"] in colours
        axes.plot(
            [row["difference"]], [height], "o", color=colour, markersize=4, fillstyle="full" if filled else "none"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{row['stage']} − {row['parent']}: {row['task']}, {row['metric']}".replace("_", " ") for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set(xlabel="difference to the parent, same items, 95 % interval", ylim=(-0.7, len(shown) - 0.3))
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def samples(results: Results) -> list[dict[str, Any]]:
    """A few items of every (stage, task). Attacks were stored without their text, so nothing harmful can be here."""
    shown = []
    for (stage, task), result in results.items():
        for item in result.items[:SAMPLES]:
            shown.append(
                {"stage": stage, "task": task, **{key: value for key, value in item.items() if key != "value"}}
            )
    return shown


def write_outputs(
    folder: Path, rows: Sequence[Row], agreeing: Sequence[Row], results: Results, about: Mapping[str, Any]
) -> None:
    """results.json, table.md, samples.jsonl and the picture, each whole or not at all."""
    document = {**about, "rows": list(rows), "agreement": list(agreeing)}
    atomic_write_text(folder / "results.json", json.dumps(document, indent=1) + "\n")
    atomic_write_text(folder / "table.md", markdown(rows, agreeing))
    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples(results)))
    plot_differences(rows, folder / "plots" / "differences.png")


def log_table(run, rows: Sequence[Row]) -> None:
    """The table to Weights & Biases, and every value as a number of its own."""
    import wandb

    columns = [*HEADINGS]
    columns[columns.index("95 % interval", 6)] = "95 % interval of the difference"
    run.log({"evaluation": wandb.Table(columns=columns, data=[cells(row) for row in rows])})
    run.log({f"{row['stage']}/{row['task']}/{row['metric']}": row["value"] for row in rows if row["value"] is not None})
