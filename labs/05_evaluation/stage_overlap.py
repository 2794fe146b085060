"""The tiny world's own stages held against `contamination`: what each was trained on and what it is judged on.

    python stage_overlap.py                    # a line for each stage
    python stage_overlap.py --n 8 --stages sft,grpo

Three readings of the same rows. *As it is*: no row should be a copy (covered to 70 % or more). A run of 13 words alone may be
the end of one order and the beginning of a reason, which many rows share. *Numbers masked*: the same sentence with other
numbers would be flagged. *Values masked*, where names, towns, things and the like are one word too: the sentences themselves,
which training and test share by design. The tests ask for known skills on new values, and say nothing about new wording;
that is what `distribution_shift` is for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from contamination import OverlapReport, overlap_report
from shared import LabsError, tiny_world
from shared.profiles import load_profile, nearest

N_STREAM = 20_000  # documents looked at of the stages that read an endless stream of them (base, midtrain)
SHARED_WORDS = 13


@dataclass(frozen=True)
class StageOverlap:
    """The three readings of one stage, and what was looked at."""

    stage: str
    source: str
    exact: OverlapReport
    numbers_masked: OverlapReport
    values_masked: OverlapReport

    def row(self) -> dict[str, Any]:
        """A flat row for a table or metrics.json: counts, shares and intervals, without the rows."""
        found = {"stage": self.stage, "source": self.source, "n": self.exact.n}
        for name in ("exact", "numbers_masked", "values_masked"):
            report: OverlapReport = getattr(self, name)
            kept = asdict(report)
            found[name] = {
                key: kept[key]
                for key in ("n_compared", "n_training", "n_flagged", "share", "ci95", "n_mostly_covered", "n_short")
            }
        return found

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"{title} {report.n_flagged}/{report.n_compared} ({report.n_mostly_covered} copies, to {report.ci95[1]:.1%})"
            for title, report in (
                ("as it is", self.exact), ("numbers masked", self.numbers_masked), ("values masked", self.values_masked),
            )
        ]  # fmt: skip
        return f"{self.stage:<11} {'; '.join(parts)}; {self.exact.n_training} training texts, {self.source}"


# ------------------------------------------------------------------------------------------- what each stage reads and is asked
def _base(profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    import base_probes  # noqa: F401 - its tests draw the rows below, from the same seeds

    phases = load_profile("00", profile).base.phases
    streams = [
        tiny_world.documents(random.Random(f"pretraining {seed} {index}"), dict(phase["mix"]))
        for index, phase in enumerate(phases)
    ]
    shares = [round(N_STREAM * phase["share"]) for phase in phases]
    training = [text for stream, count in zip(streams, shares, strict=True) for text in itertools.islice(stream, count)]
    copies, sums = random.Random("copy 1"), random.Random("sum 1")
    rows = [tiny_world.lookup(copies, "held_out") for _ in range(200)]
    rows += [tiny_world.sum_problem(sums, "held_out") for _ in range(200)]
    return [row["prompt"] + row["answer"] for row in rows], training, f"a sample of {len(training)} documents"


def _sft(profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    from data_formatting import to_messages
    from train_sft import load_data, test_questions, test_rows

    config = load_profile("01", profile).sft
    train, _ = load_data(config, seed)
    tests = [*test_rows(config.n_test), *test_questions(config.n_test)]
    texts = ["\n".join(message["content"] for message in to_messages(row)) for row in train]
    return [f"{row['instruction']}\n{row['output']}" for row in tests], texts, str(config.data)


def _preferences(stage: str, profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    import alignment_world
    from preference_data_creation import collect, test_instructions
    from reward_model import test_pairs
    from train_dpo import sources

    config = load_profile("02", profile)[stage]
    pairs = [
        row for name, count in sources(config.data) for row in collect(name, count, seed, config.max_length_ratio)[0]
    ]
    training = [f"{row['prompt']}\n{row[part]}" for row in pairs for part in ("chosen", "rejected")]
    if stage == "reward":
        tests = [
            f"{row['prompt']}\n{row[part]}" for row in test_pairs(config.n_test) for part in ("chosen", "rejected")
        ]
    else:
        tests = [row["prompt"] for row in alignment_world.test_questions(config.n_test)]
        if stage == "safedpo":
            tests += [r["prompt"] for h in (True, False) for r in alignment_world.test_requests(config.n_test, h)]
            tests += [row["instruction"] for row in test_instructions(config.n_test)]
        # The questions that the model answers twice itself; its answers to them are not known here.
        sampled = random.Random(f"questions to sample on {seed}")
        training += [tiny_world.question(sampled)["prompt"] for _ in range(config.n_sampled)]
    return tests, training, " ".join(map(str, config.data))


def _midtrain(profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    import midtrain

    config = load_profile("03", profile).midtrain
    read = midtrain.documents(random.Random(f"midtrain {seed}"), config.mix)
    held = midtrain.documents(random.Random("held-out worked problems"), config.held_out_mix, "held_out")
    training = ["".join(next(read)) for _ in range(N_STREAM)]
    tests = ["".join(next(held)) for _ in range(config.n_test)]
    return tests, training, f"a sample of {N_STREAM} documents"


def _reasoning(stage: str, profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    from cold_start import problems_of
    from train_grpo import prepare_problems

    config = load_profile("03", profile)[stage]
    parts = problems_of(config, seed) if stage == "cold_start" else prepare_problems(config, seed)
    # Cold start reads whole solutions; reinforcement sees questions and never a solution.
    whole = stage == "cold_start"
    training, tests = (
        [f"{row['question']}\n{row['solution']}" if whole else row["question"] for row in parts[name]]
        for name in ("train", "test")
    )
    return tests, training, str(config.data)


def _tools(profile: str, seed: int) -> tuple[list[str], Iterable[str], str]:
    import train_tool_use

    config = load_profile("04", profile).tools
    parts = train_tool_use.rows_of(config, seed)
    tests = [row for name in parts if name not in ("train", "validation") for row in parts[name]]
    return [_said(row) for row in tests], (_said(row) for row in parts["train"]), str(config.data)


def _said(row: dict) -> str:
    """What the user asks in a tool conversation: the schemas of the tools are shown to training and test alike."""
    return "\n".join(str(m.get("content") or "") for m in row["messages"] if m.get("role") == "user")


STAGE_TEXTS = {
    "base": _base,
    "sft": _sft,
    **{name: lambda profile, seed, name=name: _preferences(name, profile, seed) for name in ("dpo", "safedpo", "reward")},
    "midtrain": _midtrain,
    **{name: lambda profile, seed, name=name: _reasoning(name, profile, seed) for name in ("cold_start", "grpo", "hacked")},
    "tools": _tools,
}  # fmt: skip


def stage_texts(stage: str, profile: str = "tiny", seed: int = 0) -> tuple[list[str], list[str], str]:
    """(test texts, training texts, where these come from) of a stage, made again from its settings and its seed.

    Raises LabsError for a stage without data of its own.
    """
    if stage not in STAGE_TEXTS:
        raise LabsError(f"stage {stage!r} has no rows to compare: {nearest(stage, STAGE_TEXTS)}")
    tests, training, source = STAGE_TEXTS[stage](profile, seed)
    return tests, list(training), source


def stage_overlap(stage: str, profile: str = "tiny", seed: int = 0, n: int = SHARED_WORDS) -> StageOverlap:
    """The three readings of a stage's test rows against its training rows. Raises LabsError as `stage_texts` does."""
    tests, training, source = stage_texts(stage, profile, seed)
    return StageOverlap(
        stage,
        source,
        overlap_report(tests, training, n),
        overlap_report(tests, training, n, mask_numbers=True),
        overlap_report(tests, training, n, mask_numbers=True, mask_words=tiny_world.KNOWN_VALUES),
    )


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
def _command(
    stages: Annotated[str, typer.Option(help="Which stages, as sft,grpo; or all.")] = "all",
    profile: Annotated[str, typer.Option(help="Whose settings.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The training seed.")] = 0,
    n: Annotated[int, typer.Option(help="Words of a run.", min=1)] = SHARED_WORDS,
) -> None:
    for stage in STAGE_TEXTS if stages == "all" else [name.strip() for name in stages.split(",")]:
        typer.echo(stage_overlap(stage, profile, seed, n).line())


if __name__ == "__main__":
    from shared.cli import run_app

    run_app(app)
