"""The command `labs label`: collect human preferences, from a file of pairs to a file DPO trains on.

labs label import pairs.jsonl                 # what is to be judged
labs label serve --labeler ana --labeler ben  # prints a login link for each
labs label stats                              # agreement, attention checks, win rates
labs label export preferences.jsonl           # what was preferred, for train_dpo.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared import LabsError

if TYPE_CHECKING:
    from label_store import LabelStore

HELP = """Collect human preferences: pairs in, blind labels by several people, DPO training rows out.

Start with `labs label import pairs.jsonl`, then `labs label serve --labeler NAME`.
"""
app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
SHOWN_DISAGREEMENTS = 20
LIBRARIES = ("sqlalchemy", "psycopg", "fastapi", "uvicorn", "gradio")  # of the extra `label`

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        envvar="LABS_LABEL_DATABASE",
        help="A file (SQLite), or postgresql+psycopg://user:password@host/name. Default: labels.db in the runs folder.",
        show_default=False,
    ),
]
OverlapOption = Annotated[float, typer.Option(help="The share of the new examples that several people label.")]
RatersOption = Annotated[int, typer.Option(help="How many people label each of those.")]
SeedOption = Annotated[int, typer.Option(help="Draws which examples those are.")]


def _open(database: str | None, create: bool = False, **settings) -> LabelStore:
    from label_store import LabelStore
    from shared.profiles import runs_root

    return LabelStore(database or runs_root() / "labels.db", create=create, **settings)


def _fill(rows: list[dict], database: str | None, overlap: float, overlap_raters: int, seed: int) -> None:
    store = _open(database, create=True, overlap_share=overlap, overlap_raters=overlap_raters, seed=seed)
    added, known = store.add_examples(rows)
    typer.echo(f"imported {added} pairs; {known} were there already")


@app.command("import")
def import_pairs(
    files: Annotated[list[Path], typer.Argument(help="JSON lines: prompt, response_a, response_b, or DPO triplets.")],
    database: DatabaseOption = None,
    overlap: OverlapOption = 0.2,
    overlap_raters: RatersOption = 2,
    seed: SeedOption = 0,
) -> None:
    """Take pairs into the database; a pair that is there already is not added again.

    A row is {"prompt", "response_a", "response_b"} and may have "model_a", "model_b", "source" and "gold" ("a" or "b": an
    attention check). Example: labs label import pairs.jsonl --overlap 0.3
    """
    from label_files import read_pairs

    rows = [row for path in files for row in read_pairs(path)]  # all files are read before one row is written
    _fill(rows, database, overlap, overlap_raters, seed)


@app.command()
def compare(
    a: Annotated[str, typer.Option("--a", help="NAME=FILE: a model's name and its samples, rows of prompt and reply.")],
    b: Annotated[str, typer.Option("--b", help="The same for the other model.")],
    database: DatabaseOption = None,
    overlap: OverlapOption = 0.2,
    overlap_raters: RatersOption = 2,
    seed: SeedOption = 0,
) -> None:
    """Take two models' replies to the same prompts into the database, for a blind comparison.

    The labelers see no names; `labs label stats` gives the win rate.
    Example: labs label compare --a sft=runs/tiny/sft/samples.jsonl --b dpo=runs/tiny/dpo/samples.jsonl
    """
    from label_files import pairs_from_samples, read_samples

    named = []
    for option, value in (("--a", a), ("--b", b)):
        name, equals, path = value.partition("=")
        if not equals or not name.strip() or not path:
            raise LabsError(f"{option} {value}: write it as NAME=FILE, as in sft=runs/tiny/sft/samples.jsonl")
        named += [name.strip(), read_samples(path)]
    rows, left_out = pairs_from_samples(*named)
    _fill(rows, database, overlap, overlap_raters, seed)
    for reason, count in left_out.items():
        typer.echo(f"left out {count} prompts: {reason}")


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="The labeler, new or known.")], database: DatabaseOption = None
) -> None:
    """Print a token for a labeler, once; an older one of theirs stops working. Example: labs label token ana"""
    typer.echo(_open(database, create=True).add_labeler(name))


@app.command()
def serve(
    labeler: Annotated[
        list[str] | None,
        typer.Option("--labeler", help="Somebody who labels; a new one gets a login link. Repeatable."),
    ] = None,
    database: DatabaseOption = None,
    host: Annotated[str, typer.Option(help="The address to listen on; anything but loopback is open to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 7861,
    lease_seconds: Annotated[float, typer.Option(help="How long a pair waits for the labeler who has it.")] = 600,
    check_share: Annotated[float, typer.Option(help="Attention checks among the pairs shown, if there are any.")] = 0.1,
) -> None:
    """Serve the labelling page until Ctrl-C. Example: labs label serve --labeler ana --labeler ben

    Keys on the page: a, b, t (equal), n (both bad), s (skip), 1 to 5 (how sure), u (take back).
    """
    store = _open(database, create=True, lease_seconds=lease_seconds, check_share=check_share)
    known = store.labelers()
    new = [name for name in dict.fromkeys(labeler or []) if name not in known]
    if not known and not new:
        raise LabsError("nobody can log in yet: add --labeler NAME")
    if not store.counts()["examples"]:
        typer.echo("warning: there is nothing to label yet; `labs label import FILE` works while this runs", err=True)
    import labeling_app

    def announce(url: str) -> None:
        typer.echo(f"labelling page: {url}  (Ctrl-C stops it)")
        for name in new:
            typer.echo(f"login link of {name}, shown once: {url}/login#{store.add_labeler(name)}")
        for name in known if not new else set(labeler) & set(known):
            typer.echo(f"{name} has a token; `labs label token {name}` makes a new one")
        sys.stdout.flush()

    labeling_app.serve(store, host, port, announce)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="The file to write: .jsonl or .parquet.")],
    database: DatabaseOption = None,
) -> None:
    """Write what was preferred as DPO triplets, one an example, by majority of its labels.

    Ties, both bad, skips, tied votes and attention checks are left out and counted. Example: labs label export pairs.jsonl
    """
    from label_files import check_ending, write_training_rows
    from label_stats import export_rows

    check_ending(path)
    rows, left_out = export_rows(_open(database))
    report = f"left out: {', '.join(f'{count} {reason}' for reason, count in left_out.items()) or 'nothing'}"
    if not rows:
        raise LabsError(f"there is no preference to export ({report}); go on labelling")
    write_training_rows(rows, path)
    typer.echo(f"wrote {len(rows)} preferences to {path}; {report}")


@app.command()
def stats(database: DatabaseOption = None) -> None:
    """Show progress, agreement, every labeler's quality and the win rates. Example: labs label stats"""
    import label_stats

    store = _open(database)
    counts, rows = store.counts(), store.preferences()
    typer.echo(
        f"{counts['examples']} examples ({counts['checks']} attention checks); {counts['open']} want a label\n"
        f"{counts['live']} labels by {counts['labelers']} labelers; {counts['superseded']} taken back"
    )
    if not rows:
        return
    found = label_stats.agreement(rows)
    typer.echo(f"\nAgreement on {found.n} examples with several labels")
    if found.alpha is not None:
        typer.echo(f"  Krippendorff's alpha {found.alpha:.3f}")
    for (one, other), (kappa, n) in found.kappas.items():
        typer.echo(f"  Cohen's kappa {kappa:.3f} (n={n}): {one}, {other}")
    open_cases = label_stats.disagreements(rows)
    undecided = [case for case in open_cases if case["majority"] == "votes tied"]
    typer.echo(f"\nDisagreements: {len(open_cases)}, of them {len(undecided)} without a majority")
    for case in undecided[:SHOWN_DISAGREEMENTS]:
        labels = ", ".join(f"{name}: {label}" for name, label in case["labels"].items())
        typer.echo(f"  example {case['example_id']}: {labels}")
    if len(undecided) > SHOWN_DISAGREEMENTS:
        typer.echo(f"  and {len(undecided) - SHOWN_DISAGREEMENTS} more")
    typer.echo("\nLabelers (share of n, with 95 % interval)")
    for one in label_stats.labeler_quality(rows):
        typer.echo(
            f"  {one.name}: {one.labels} labels, {one.skips} skipped, median {one.median_seconds:.1f} s\n"
            f"    checks passed {one.checks}; left side chosen {one.left}; agrees with others {one.agrees}"
        )
    for one in label_stats.win_rates(rows):
        low, high = one.ci95
        typer.echo(
            f"\n{one.winner} over {one.loser}: win rate {one.rate:.1%} [{low:.1%}, {high:.1%}], n={one.n} "
            f"({one.wins} wins, {one.ties} ties, {one.losses} losses; a tie counts half)"
        )


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 1."""
    try:
        app(prog_name="labs label")
    except LabsError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:
            raise
        typer.echo(f"error: {error.name} is not installed: pip install -c constraints.txt -e '.[label]'", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
