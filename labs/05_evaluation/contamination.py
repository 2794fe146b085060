"""Was the test in the training data? Word n-grams that both have, row by row.

    python contamination.py TEST.jsonl TRAIN.jsonl --field question --n 13
    python contamination.py test.jsonl train.jsonl.gz --field question,answer --n 8 --min-coverage 0.5
    python contamination.py TEST.jsonl TRAIN.jsonl --field text --mask-numbers       # the same sentence, other numbers?

A test row is flagged when it shares a run of `n` words with a training text: n = 13 is GPT-3's rule (Brown et al. 2020, arXiv
2005.14165, appendix C). Its *coverage* is the share of its words that lie in such a run, which tells a quoted line from a
whole copy: PaLM flags 70 % of 8-grams (arXiv 2204.02311, section 8), Llama 2 counts covered words of runs of more than ten
(arXiv 2307.09288, appendix A.6). `min_coverage` sets such a border. Texts shorter than n words are looked for whole.

What it cannot see: a paraphrase, a translation, the same problem with other numbers. `mask_numbers` sees the last of these.
Texts are compared in one spelling (NFKC, case folded, without invisible characters), and what had to be mended is counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import LabsError
from text_spelling import Text, normalise_text, read_texts

MOSTLY = 0.7  # PaLM's border
SHOWN = 5  # examples in a report
SHOWN_CHARACTERS = 160
NUMBER_WORD = "0"  # what stands for every number where numbers are masked
VALUE_WORD = "\u25a1"  # and for a masked word

# Letters that are written without spaces between words, each a word of its own: else a whole Chinese line would be one word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# A sign of arithmetic alone between spaces is a word as well: without it "3 + 4" and "3 - 4" would be one text.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|(?<!\S)[-+*/=<>^%×÷](?!\S)|{VALUE_WORD}")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def words_of(text: str, mask_numbers: bool = False, mask_words: Collection[str] = ()) -> list[str]:
    """The words of a normalised text. Masked, every number is one word, and every word of `mask_words` another."""
    if mask_numbers:
        text = _NUMBER.sub(NUMBER_WORD, text)
    words = _WORD.findall(text)
    return [VALUE_WORD if word in mask_words else word for word in words] if mask_words else words


# -------------------------------------------------------------------------------------------------------------- the report
@dataclass(frozen=True)
class OverlapReport:
    """What `overlap_report` found. Shares are of the `n_compared` test texts that are not empty."""

    n: int  # words of a run
    n_test: int
    n_compared: int
    n_training: int  # training texts that are not empty
    n_flagged: int
    share: float
    ci95: tuple[float, float]  # Wilson
    mean_coverage: float
    n_mostly_covered: (
        int  # rows covered to 70 % or more: copies, where a flag alone may be a sentence that all rows share
    )
    n_short: int  # test texts of fewer than n words, looked for whole
    coverage: list[float | None]  # of each test row, None for an empty one
    flagged: list[int]  # positions of test rows
    examples: list[dict[str, Any]]  # {"test", "training": positions, "coverage", "text": test text, "shared": words}
    test_problems: dict[str, int] = field(default_factory=dict)
    training_problems: dict[str, int] = field(default_factory=dict)
    masked: bool = False

    def lines(self) -> list[str]:
        """The report for people."""
        kind = f"{self.n}-grams of words" + (", values masked" if self.masked else "")
        found = [
            f"{self.n_flagged} of {self.n_compared} test texts share one with {self.n_training} training texts ({kind}): "
            f"{self.share:.1%}, 95 % interval {self.ci95[0]:.1%} to {self.ci95[1]:.1%}; mean coverage {self.mean_coverage:.1%}",
            f"{self.n_mostly_covered} of them are covered to {MOSTLY:.0%} or more, as a copy would be",
        ]
        if self.n_short:
            found.append(f"{self.n_short} test texts are shorter than {self.n} words and were looked for whole")
        for part, problems in (("test", self.test_problems), ("training", self.training_problems)):
            found += [f"{part}: {count} texts with {name}" for name, count in sorted(problems.items())]
        for row in self.examples:
            found.append(
                f"test {row['test'] + 1} ~ training {row['training'] + 1} ({row['coverage']:.0%}): {row['shared']}"
            )
        return found


def overlap_report(
    test_texts: Iterable[Text],
    training_texts: Iterable[Text],
    n: int = 13,
    *,
    min_coverage: float = 0.0,
    mask_numbers: bool = False,
    mask_words: Collection[str] = (),
    examples: int = SHOWN,
) -> OverlapReport:
    """Which test texts share a run of `n` words with a training text, and how much of each is covered by such runs.

    A row is flagged if its coverage is above 0 and at least `min_coverage` (0 to 1). A test text of fewer than n words is
    flagged if it stands whole, words in order, in a training text. Training texts are read once and may be a generator.
    Raises LabsError where nothing can be compared: no test text, no training text, or all empty.
    """
    if n < 1 or not 0 <= min_coverage <= 1:
        raise LabsError(f"n={n} must be at least 1 and min_coverage={min_coverage} between 0 and 1")
    hidden = {word.casefold() for word in mask_words}
    test_problems: Counter = Counter()
    texts, rows = [], []
    for raw in test_texts:
        text, named = _named(raw, "test", len(rows))
        test_problems.update(named)
        texts.append(text)
        rows.append(words_of(text, mask_numbers, hidden))
    compared = [position for position, words in enumerate(rows) if words]
    if not compared:
        raise LabsError(f"{len(rows)} test texts, none with a word in it: nothing to compare; check the file and field")
    # run of words → the first training text that has it, None as long as none was met; by length, as short rows have others
    wanted: dict[int, dict[tuple[str, ...], int | None]] = defaultdict(dict)
    for position in compared:
        for run in _runs(rows[position], n):
            wanted[len(run)][run] = None
    training_problems: Counter = Counter()
    n_training = _look_up(wanted, training_texts, training_problems, mask_numbers, hidden)
    if not n_training:
        raise LabsError("no training text with a word in it: nothing to compare with; check the file and field")

    coverage: list[float | None] = [None] * len(rows)
    flagged, shown = [], []
    ### BEGIN SOLUTION
    for position in compared:
        words, covered = rows[position], set()
        found: list[tuple[int, tuple[str, ...], int]] = []
        for start, run in enumerate(_runs(words, n)):
            where = wanted[len(run)][run]
            if where is not None:
                covered.update(range(start, start + len(run)))
                found.append((start, run, where))
        coverage[position] = len(covered) / len(words)
        if found and coverage[position] >= min_coverage:
            flagged.append(position)
            if len(shown) < examples:
                shown.append(_example(position, texts[position], coverage[position], *found[0][1:]))
    ### END SOLUTION
    from shared.significance import wilson_interval

    total = len(compared)
    return OverlapReport(
        n=n,
        n_test=len(rows),
        n_compared=total,
        n_training=n_training,
        n_flagged=len(flagged),
        share=len(flagged) / total,
        ci95=wilson_interval(len(flagged), total),
        mean_coverage=sum(coverage[position] or 0.0 for position in compared) / total,
        n_mostly_covered=sum((coverage[position] or 0.0) >= MOSTLY for position in compared),
        n_short=sum(len(rows[position]) < n for position in compared),
        coverage=coverage,
        flagged=flagged,
        examples=shown,
        test_problems=dict(test_problems),
        training_problems=dict(training_problems),
        masked=bool(mask_numbers or hidden),
    )


def _named(raw: Text, part: str, position: int) -> tuple[str, list[str]]:
    try:
        text, named = normalise_text(raw)
    except LabsError as error:
        raise LabsError(f"{part} text {position + 1}: {error}") from None
    if text and not _WORD.search(text):
        named = [*named, "no word in it"]
    return text, named


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The runs of n words in their order; of a shorter text the whole of it."""
    return [tuple(words[start : start + n]) for start in range(max(1, len(words) - n + 1))]


def _look_up(wanted: dict, training_texts: Iterable[Text], problems: Counter, mask_numbers: bool, hidden: set) -> int:
    """Note in `wanted` where each run stands first. Returns how many training texts have words.

    A run of length m is only built where its first word begins some wanted run of that length: this keeps a dozen lengths
    nearly as fast as one.
    """
    first_words = {size: {run[0] for run in runs} for size, runs in wanted.items()}
    used = 0
    for position, raw in enumerate(training_texts):
        text, named = _named(raw, "training", position)
        problems.update(named)
        words = words_of(text, mask_numbers, hidden)
        used += bool(words)
        for size, runs in wanted.items():
            begins = first_words[size]
            for start in range(len(words) - size + 1):
                if words[start] in begins:
                    run = tuple(words[start : start + size])
                    if run in runs and runs[run] is None:
                        runs[run] = position
    return used


def _example(position: int, text: str, coverage: float, run: Sequence[str], training: int) -> dict[str, Any]:
    shared = " ".join(run)
    return {
        "test": position,
        "training": training,
        "coverage": coverage,
        "text": text[:SHOWN_CHARACTERS],
        "shared": shared[:SHOWN_CHARACTERS],
    }


# ------------------------------------------------------------------------------------------------------------ command line
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
def _command(
    test: Annotated[Path, typer.Argument(help="The test rows: JSON lines, gzipped or not.")],
    training: Annotated[Path, typer.Argument(help="The training rows, likewise.")],
    field_name: Annotated[
        str, typer.Option("--field", help="The field with the text; several: question,answer.")
    ] = "text",
    n: Annotated[int, typer.Option(help="Words of a run.", min=1)] = 13,
    min_coverage: Annotated[float, typer.Option(help="Flag only rows covered to this share.", min=0, max=1)] = 0.0,
    mask_numbers: Annotated[bool, typer.Option("--mask-numbers", help="Every number counts as the same word.")] = False,
    show: Annotated[int, typer.Option(help="Print so many flagged rows.", min=0)] = SHOWN,
    out: Annotated[Path | None, typer.Option(help="Write the report, with every row's coverage, as JSON.")] = None,
) -> None:
    from dataclasses import asdict

    from shared.training import atomic_write_text

    fields = [name.strip() for name in field_name.split(",") if name.strip()]
    (test_texts, test_reading), (training_texts, training_reading) = (read_texts(p, fields) for p in (test, training))
    report = overlap_report(
        test_texts, training_texts, n, min_coverage=min_coverage, mask_numbers=mask_numbers, examples=show
    )
    report.test_problems.update(test_reading)
    report.training_problems.update(training_reading)
    typer.echo("\n".join(report.lines()))
    if out:
        atomic_write_text(out, json.dumps(asdict(report), ensure_ascii=False, indent=1) + "\n")
        typer.echo(f"wrote {out}")


if __name__ == "__main__":
    from shared.cli import run_app

    run_app(app)
