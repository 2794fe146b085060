"""Preference pairs from three sources, checked and filtered: public dialogues, two models' samples, the micro-world.

A **triplet** is {"prompt", "chosen", "rejected"}: three texts. A prompt with several turns is written as HH-RLHF writes it,
each turn after a blank line and "Human:" or "Assistant:"; any other prompt is one user turn. For SafeDPO a triplet also
says which of its answers are unsafe: {"chosen_unsafe", "rejected_unsafe"}.

    python preference_data_creation.py persona pairs.jsonl --n 500     # the brief persona
    python preference_data_creation.py safety pairs.jsonl              # with safety labels
    python preference_data_creation.py hh-rlhf pairs.jsonl             # public dialogues (LABS_DATA_DIR or the hub)
    python preference_data_creation.py mine.jsonl clean.jsonl          # your own triplets: check, filter, report
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import alignment_world
from shared import LabsError, tiny_world
from shared.pairwise import Judge, compare
from shared.training import atomic_write_text

FIELDS = ("prompt", "chosen", "rejected")
SAFETY_LABELS = ("chosen_unsafe", "rejected_unsafe")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SOURCES = ("persona", "safety", "hh-rlhf")


# ------------------------------------------------------------------------------------------------- dialogues (HH-RLHF)
def turns(dialogue: str) -> list[dict[str, str]]:
    """The turns of an HH-RLHF dialogue as messages. Raises ValueError for one that does not alternate from "Human:" on."""
    pieces = TURN.split(dialogue)
    if pieces[0].strip() or len(pieces) < 3 or pieces[1] != "Human":
        raise ValueError('does not begin with "Human:"')
    messages = [
        {"role": ROLES[role], "content": text.strip()} for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    for position, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[position % 2]:
            raise ValueError("two turns of one speaker in a row")
    return messages


def as_messages(prompt: str) -> list[dict[str, str]]:
    """A triplet's prompt as messages: the turns of a dialogue, or one user turn."""
    if prompt.startswith("\n\nHuman:"):
        return turns(prompt)
    return [{"role": "user", "content": prompt}]


def split_dialogues(chosen: str, rejected: str) -> dict[str, str]:
    """Two dialogues that differ in their last assistant turn → a triplet.

    Raises ValueError with the reason for a pair that is malformed: another history, no last answer, an empty or the same one.
    """
    answers, histories = [], []
    for dialogue in (chosen, rejected):
        messages = turns(dialogue)
        if messages[-1]["role"] != "assistant":
            raise ValueError("ends with the human's turn")
        if not all(message["content"] for message in messages):
            raise ValueError("empty turn")
        answers.append(messages[-1]["content"])
        histories.append(messages[:-1])
    if histories[0] != histories[1]:
        raise ValueError("the two histories differ")
    if answers[0] == answers[1]:
        raise ValueError("both answers are the same")
    names = {role: name for name, role in ROLES.items()}
    prompt = "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in histories[0])
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "source": "hh-rlhf"}


def from_dialogues(rows: Iterable[Mapping[str, str]]) -> tuple[list[dict[str, str]], Counter]:
    """HH-RLHF rows {"chosen", "rejected"} → (triplets, how many were malformed for which reason)."""
    triplets, malformed = [], Counter()
    for row in rows:
        try:
            triplets.append(split_dialogues(row["chosen"], row["rejected"]))
        except ValueError as error:
            malformed[str(error)] += 1
    return triplets, malformed


# --------------------------------------------------------------------------------------------------- models' samples
def from_samples(
    prompts: Sequence[str], answers_a: Sequence[str], answers_b: Sequence[str], judge: Judge
) -> tuple[list[dict[str, str]], Counter]:
    """Two answers to each prompt, judged in both orders → (triplets, how many pairs gave none and why)."""
    triplets, dropped = [], Counter()
    if not prompts:
        return triplets, dropped
    result = compare(prompts, answers_a, answers_b, judge)
    for prompt, a, b, verdict in zip(prompts, answers_a, answers_b, result.verdicts, strict=True):
        if verdict in ("a", "b"):
            chosen, rejected = (a, b) if verdict == "a" else (b, a)
            triplets.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "samples"})
        else:
            dropped["tie" if verdict == "tie" else "no verdict"] += 1
    return triplets, dropped


# --------------------------------------------------------------------------------------------------------------- files
def problem(row: Any) -> str | None:
    """What is wrong with a triplet, or None."""
    if not isinstance(row, Mapping):
        return f"expected an object with {', '.join(FIELDS)}, found a {type(row).__name__}"
    for field in FIELDS:
        if field not in row:
            return f"field {field!r} is missing"
        if not isinstance(row[field], str):
            return f"field {field!r} must be text, not {type(row[field]).__name__}"
        if not row[field].strip():
            return f"field {field!r} is empty"
        if any("\ud800" <= letter <= "\udfff" for letter in row[field]):  # JSON can spell it, UTF-8 cannot
            return f"field {field!r} holds half a character (a lone surrogate)"
    if row["chosen"].strip() == row["rejected"].strip():
        return "chosen and rejected are the same"
    if row["prompt"].startswith("\n\nHuman:"):
        try:
            last = turns(row["prompt"])[-1]
        except ValueError as error:
            return f"field 'prompt' is no dialogue: {error}"
        if last["role"] != "user":
            return (
                "field 'prompt' is a dialogue that ends with the assistant's turn, so that there is nothing to answer"
            )
    for field in SAFETY_LABELS:
        label = row.get(field)
        if label is not None and (not isinstance(label, int) or label not in (0, 1)):  # a bool is an int
            return f"field {field!r} must be true or false"
    return None


def read_triplets(path: str | Path) -> list[dict[str, Any]]:
    """The triplets of a .jsonl or .parquet file.

    Raises LabsError that names the file and the first bad row (counted from 1, in a .jsonl file its line) and says how many
    more there are: unreadable bytes, broken JSON, a missing field, a field that is no text, an answer that is both chosen
    and rejected.
    """
    path = Path(path)
    rows, problems = [], []
    for number, row, unreadable in _raw_rows(path):
        trouble = unreadable or problem(row)
        if trouble:
            problems.append((number, trouble))
        else:
            rows.append(dict(row))
    if problems:
        number, trouble = problems[0]
        others = len(problems) - 1
        more = f"; {others} more row{'s have' if others > 1 else ' has'} problems" if others else ""
        raise LabsError(f"{path}, row {number}: {trouble}{more}; mend or delete them ({len(rows)} rows are good)")
    if not rows:
        raise LabsError(f"{path} holds no triplet: write one JSON object with {', '.join(FIELDS)} a line")
    return rows


def _raw_rows(path: Path) -> Iterable[tuple[int, Any, str | None]]:
    """(row number, row, None), or (row number, None, why it cannot be read)."""
    try:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            content = path.read_bytes()
            try:
                rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                reason = str(error).splitlines()[0]
                raise LabsError(f"{path} is not a readable Parquet file ({reason}); write it again") from None
            yield from ((number, row, None) for number, row in enumerate(rows, 1))
            return
        if path.suffix != ".jsonl":
            raise LabsError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl or .parquet")
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise LabsError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8")), None
            except UnicodeDecodeError as error:
                yield number, None, f"not UTF-8 text (byte {error.start}); convert the file to UTF-8"
            except json.JSONDecodeError as error:
                yield number, None, f"broken JSON ({error.msg})"
            except (ValueError, RecursionError):  # numbers of thousands of digits, lists nested a thousand deep
                yield number, None, "JSON that no triplet needs"


def write_triplets(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write triplets as JSON lines, whole or not at all. Raises LabsError where a row is no triplet, or there is none."""
    if Path(path).suffix != ".jsonl":
        raise LabsError(f"cannot write {path}: triplets are written as JSON lines; name the file .jsonl")
    if not rows:
        raise LabsError(f"no triplet is left to write to {path}: look at what was dropped, or take another source")
    for number, row in enumerate(rows, 1):
        trouble = problem(row)
        if trouble:
            raise LabsError(f"triplet {number}: {trouble}; nothing was written to {path}")
    return atomic_write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def labelled(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with a safety label on either side; an answer without one (none, or null) counts as safe."""
    return [{**pair, **{label: bool(pair.get(label)) for label in SAFETY_LABELS}} for pair in pairs]


# -------------------------------------------------------------------------------------------------------------- filters
def filter_pairs(
    pairs: Iterable[Mapping[str, Any]], held_out: Iterable[str] = (), max_length_ratio: float = 20.0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the pairs that can be trained on, {reason: how many were dropped}).

    Dropped are: identical answers; a prompt that is held out for the test (a leak); a prompt met before; an answer more
    than `max_length_ratio` times as long as the other, which would teach length and little else. White space and case
    do not make two texts different.
    """
    tests = {_plain(prompt) for prompt in held_out}
    dropped = dict.fromkeys(("identical answers", "held-out prompt", "duplicate prompt", "length ratio"), 0)
    kept, seen = [], set()
    for pair in pairs:
        prompt, chosen, rejected = (_plain(pair[field]) for field in FIELDS)
        lengths = sorted((len(chosen), len(rejected)))
        if chosen == rejected:
            dropped["identical answers"] += 1
        elif prompt in tests:
            dropped["held-out prompt"] += 1
        elif prompt in seen:
            dropped["duplicate prompt"] += 1
        elif lengths[1] > max_length_ratio * max(1, lengths[0]):
            dropped["length ratio"] += 1
        else:
            seen.add(prompt)
            kept.append(dict(pair))
    return kept, dropped


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def report_lines(kept: int, dropped: Mapping[str, int], malformed: Mapping[str, int] | None = None) -> list[str]:
    """What became of the rows, a line each."""
    lines = [f"kept {kept} pairs"]
    lines += [f"malformed: {reason}: {count}" for reason, count in sorted((malformed or {}).items()) if count]
    return lines + [f"dropped: {reason}: {count}" for reason, count in dropped.items() if count]


def test_instructions(n: int) -> list[dict[str, Any]]:
    """`n` held-out schema instructions: what the model could do before, and should still do."""
    rng = random.Random("held-out instructions after alignment")
    return [tiny_world.instruction(rng, "held_out") for _ in range(n)]


def held_out_prompts(n: int = 400) -> list[str]:
    """Every prompt that the criteria of the stages `dpo` and `safedpo` are measured on, up to `n_test` = n."""
    requests = [alignment_world.test_requests(n, harmful) for harmful in (True, False)]
    prompts = [row["prompt"] for rows in (alignment_world.test_questions(n), *requests) for row in rows]
    return prompts + [row["instruction"] for row in test_instructions(n)]


def collect(source: str, n: int, seed: int = 0, max_length_ratio: float = 20.0) -> tuple[list[dict], list[str]]:
    """(filtered triplets of a source or a file, the report on what was dropped), from at most `n` rows of it.

    Of HH-RLHF it takes the train split, or the test split where the mirror holds that alone; the report says which, and
    whether the rows are real. Raises LabsError as `read_triplets` does.
    """
    malformed: Counter = Counter()
    origin = []
    if source == "persona":
        rows = alignment_world.persona_pairs(n, seed)
    elif source == "safety":
        rows = alignment_world.safety_pairs(n, seed)
    elif source == "hh-rlhf":
        from shared.data import first_rows

        dialogues, split, used = first_rows("hh-rlhf", ("train", "test"), limit=n, seed=seed)
        rows, malformed = from_dialogues(dialogues)
        origin = [f"{len(dialogues)} rows of the {split} split, source: {used}"]
    elif Path(source).suffix:
        rows = read_triplets(source)
        if n < len(rows):
            origin = [f"{n} of {len(rows)} rows"]
            rows = random.Random(seed).sample(rows, n)
    else:
        from shared.profiles import nearest

        raise LabsError(f"unknown source {source!r}: {nearest(source, SOURCES)}, or a .jsonl or .parquet file")
    kept, dropped = filter_pairs(rows, held_out_prompts(), max_length_ratio)
    return kept, [*origin, *report_lines(len(kept), dropped, malformed)]


def split_pairs(pairs: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training, validation), at least one pair in each; all pairs of one prompt are in the same part.

    Raises LabsError for a share that is not between 0 and 1 and for pairs of fewer than two prompts.
    """
    if not 0 <= share < 1:
        raise LabsError(f"validation_fraction={share} must be at least 0 and below 1")
    order = list(pairs)
    random.Random(f"split {seed}").shuffle(order)
    prompts = list(dict.fromkeys(_plain(pair["prompt"]) for pair in order))
    if len(prompts) < 2:
        raise LabsError(f"{len(pairs)} pairs of {len(prompts)} prompts: training and validation need one each at least")
    held = set(prompts[: min(len(prompts) - 1, max(1, round(len(order) * share)))])
    parts: tuple[list[dict], list[dict]] = ([], [])
    for pair in order:
        parts[_plain(pair["prompt"]) in held].append(pair)
    return parts


def main(
    source: Annotated[str, typer.Argument(help="persona, safety, hh-rlhf, or a .jsonl or .parquet file of triplets.")],
    output: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    n: Annotated[
        int | None, typer.Option(help="At most so many rows of the source. Default: 1000; all of a file.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Rows are drawn from it.")] = 0,
    max_length_ratio: Annotated[float, typer.Option(help="Drop pairs whose answers differ more in length.")] = 20.0,
) -> None:
    try:
        rows, lines = collect(source, n or (10**9 if Path(source).suffix else 1000), seed, max_length_ratio)
        write_triplets(rows, output)
    except LabsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo("\n".join([*lines, f"wrote {output}"]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=__doc__)(main)
    app()
