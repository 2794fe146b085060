"""The report as one self-contained HTML page: the model's life, stage by stage. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.profiles import STAGES
from shared.report import HEADINGS, read_metrics, table_rows
from shared.training import atomic_write_text, plot_curves, read_log

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 2px solid #8886; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } .scroll { overflow-x: auto; margin: 1rem 0; }
caption { text-align: left; font-weight: bold; padding: .3rem 0; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886; vertical-align: top; }
tbody th { font-weight: normal; }
.samples :is(td, tbody th) { white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.4 monospace; min-width: 7rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { font-weight: bold; } dd { margin: 0; }
.yes { color: light-dark(#137333, #81c995); } .NO { color: light-dark(#b3261e, #f2b8b5); font-weight: bold; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; border-radius: .5rem; }
img, svg { max-width: 100%; height: auto; } figcaption { color: #444; font-size: .85rem; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; } }
"""
# Columns of a training log that share a picture, by a word in their names: the first that fits.
CURVES = ("loss", "accuracy", "reward", "length", "entropy", "induction")
LONGEST_SAMPLE = 600
LONGEST_HARMFUL = 60  # of a reply to what the stage itself calls harmful


def write_html(stage_dirs: Sequence[Path], path: str | Path, samples: int = 6) -> Path:
    """Write the page for finished stages and return its path. Raises LabsError for a stage without metrics."""
    return atomic_write_text(path, render_html(stage_dirs, samples))


def render_html(stage_dirs: Sequence[Path], samples: int = 6) -> str:
    """The page for finished stages, `samples` of each stage's samples shown. Raises LabsError as `write_html` does."""
    stages = [(Path(folder), read_metrics(folder)) for folder in stage_dirs]
    sections = "".join(_stage(folder, metrics, samples) for folder, metrics in stages)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Post-Training Labs: report card</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body><main>"
        f"<h1>Report card: one model's life</h1>{_summary(stages)}{sections}</main></body></html>\n"
    )


def _summary(stages: Sequence[tuple[Path, Mapping]]) -> str:
    """What one wants to know first, and a table of the stages that leads to each."""
    rows = [row for _, metrics in stages for row in metrics["criteria"]]
    sizes = sorted({_parameters(folder / "model") for folder, _ in stages} - {0})
    seconds = sum(metrics["wall_seconds"] for _, metrics in stages)
    versions = (", ".join(f"{name} {which}" for name, which in metrics["versions"].items()) for _, metrics in stages)
    facts = {
        "criteria met": f"{sum(row['passed'] for row in rows)} of {len(rows)}; stages: {len(stages)}",
        "time": f"{seconds:,.0f} s of training in all ({seconds / 60:.1f} minutes)",
        "model": " and ".join(f"{size:,}" for size in sizes) + " parameters" * bool(sizes),
        "run on": "; ".join(dict.fromkeys(_where(metrics) for _, metrics in stages)),
        "versions": "; ".join(dict.fromkeys(versions)),
    }
    listed = [
        (f"<a href='#{name}'>{name}</a>", _title(metrics), *_costs(metrics), f"{metrics['wall_seconds']:,.0f} s")
        for name, metrics in ((html.escape(metrics["stage"]), metrics) for _, metrics in stages)
    ]  # fmt: skip
    return _list(facts) + _table(("stage", "what for", "criteria met", "peak memory", "training"), listed, "The stages")


def _stage(folder: Path, metrics: Mapping, samples: int) -> str:
    name, known = html.escape(metrics["stage"]), STAGES.get(metrics["stage"])
    logs = {path.parent.name if path.parent != folder else "": read_log(path) for path in _logs(folder)}
    seconds, budget = metrics["wall_seconds"], metrics.get("time_budget_seconds")
    tokens = sum(max((row.get("tokens") or 0 for row in log), default=0) for log in logs.values())
    size, trained = _parameters(folder / "model"), metrics.get("trainable_parameters") or 0
    facts = {
        "starts from": ", ".join(known.requires) or "random weights" * (known.lab == "00") if known else "",
        "criteria met": _costs(metrics)[0],
        "training": f"{seconds:,.1f} s" + (f" of a budget of {budget:,.0f} s" if budget else ""),
        "tokens": f"{tokens:,.0f}, {tokens / seconds:,.0f} a second" if tokens and seconds else "",
        "peak memory": _costs(metrics)[1],
        "parameters": f"{size:,}" * bool(size) + f" ({trained:,} trained)" * bool(trained),
        "run on": _where(metrics),
    }
    rows = [
        (*map(html.escape, cells[1:-1]), f"<span class='{cells[-1]}'>{cells[-1]}</span>") for cells in table_rows([metrics])
    ]  # fmt: skip
    parts = [
        f"<h2 id='{name}'>{f'Lab {known.lab}: ' if known else ''}{name}</h2><p>{_title(metrics)}</p>",
        _list(facts),
    ]
    parts.append(_table(HEADINGS[1:], rows, "Criteria"))
    for part, log in logs.items():
        parts += [_figure(_curves(log, columns), f"{part} {', '.join(columns)}".strip()) for columns in _groups(log)]
    return "".join([*parts, _pictures(folder), _suite_table(folder), _samples(folder / "samples.jsonl", samples)])


def _title(metrics: Mapping) -> str:
    return html.escape(STAGES[metrics["stage"]].title) if metrics["stage"] in STAGES else ""


def _costs(metrics: Mapping) -> tuple[str, str]:
    met = f"{sum(row['passed'] for row in metrics['criteria'])} of {len(metrics['criteria'])}"
    return met, f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"


def _where(metrics: Mapping) -> str:
    machine = metrics["hardware"]
    where = f"{machine['gpu'] or 'no GPU'}, {machine['cores']} CPU cores ({machine['machine']})"
    return f"{where}, profile {metrics['profile']}, seed {metrics['seed']}"


def _parameters(model: Path) -> int:
    """Numbers in the weights of a folder, from the headers of its safetensors files; 0 where there are none."""
    count = 0
    for path in model.glob("*.safetensors"):
        with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 2**27)))
            count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _list(facts: Mapping[str, str]) -> str:
    rows = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)
    return f"<dl>{''.join(rows)}</dl>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table whose cells are HTML already; the first cell of a row names it."""
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in headings)
    named = "".join(
        f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{html.escape(caption)}'><table class='{kind}'>"
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{named}</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def _logs(folder: Path) -> list[Path]:
    return [path for path in (folder / "train_log.jsonl", *sorted(folder.glob("*/train_log.jsonl"))) if path.exists()]


def _groups(rows: Sequence[Mapping]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for column in sorted({column for row in rows for column, value in row.items() if isinstance(value, int | float)}):
        for kind in CURVES:
            if kind in column:
                groups[kind].append(column)
                break
    return [groups[kind] for kind in CURVES if kind in groups]


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _pictures(folder: Path) -> str:
    parts = []
    for picture in (*sorted(folder.glob("*.png")), *sorted((folder / "plots").glob("*.png"))):
        content = base64.b64encode(picture.read_bytes()).decode()
        name = f"{folder.name}: {picture.stem.replace('_', ' ')}"
        parts.append(_figure(f"<img alt='{html.escape(name)}' src='data:image/png;base64,{content}'>", name))
    return "".join(parts)


def _curves(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """The columns over the step, as inline SVG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure = plot_curves({"": rows}, columns).figure
    buffer = io.StringIO()
    # Text as text keeps the page searchable; the metadata would name an outside address.
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", buffer.getvalue())  # within HTML the parser knows the namespaces
    label = html.escape(", ".join(columns))
    return svg[svg.index("<svg") :].replace("<svg", f"<svg role='img' aria-label='{label} over the step'", 1)


# -------------------------------------------------------------------------------------------------- samples and tables


def _samples(path: Path, wanted: int) -> str:
    """Some of a stage's samples, from first to last: what it was asked, what it said before and says now."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line cut short by a kill is left out
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    if not rows or wanted < 1:
        return ""
    n = min(wanted, len(rows))
    chosen = [rows[round(index * (len(rows) - 1) / max(1, n - 1))] for index in range(n)]
    columns = list(dict.fromkeys(name for row in chosen for name in row if row[name] not in (None, "", [], {})))
    columns.sort(key=lambda name: (name != "prompt", list(chosen[0]).index(name) if name in chosen[0] else 99))
    shown = [[html.escape(_cell(row, name)) for name in columns] for row in chosen]
    headings = ["after" if name in ("reply", "text") and "before" in columns else name for name in columns]
    return _table(headings, shown, f"Samples: {len(chosen)} of {len(rows)}", "samples")


def _cell(row: Mapping[str, Any], name: str) -> str:
    """A field of a sample. What answers a harmful request is cut to its opening, whatever the stage has left in it."""
    value = row.get(name, "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    harmful = row.get("kind") == "harmful" or row.get("harmful") or row.get("rejected_unsafe") or row.get("unsafe")
    limit = LONGEST_HARMFUL if harmful and name not in ("kind", "wrapper", "prompt") else LONGEST_SAMPLE
    return text if len(text) <= limit else f"{text[:limit]} [… {len(text) - limit} more characters]"


def _suite_table(folder: Path) -> str:
    """The table.md of the evaluation suite: its Markdown table and the lines around it."""
    path, parts, table = folder / "table.md", [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""] if path.exists() else []:
        if line.startswith("|"):
            table.append([html.escape(cell.strip().replace("\\|", "|")) for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
            continue
        if table:
            parts.append(_table(list(map(html.unescape, table[0])), table[2:], "Every stage, measured again"))
            table = []
        parts.append(f"<p>{html.escape(line)}</p>" if line.strip() else "")
    return "".join(parts)
