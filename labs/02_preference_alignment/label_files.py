"""Pairs in, preferences out: files to label, samples of two models to compare, and training files of what was preferred.

To label, one JSON object a line: {"prompt", "response_a", "response_b"} and, where there are, "model_a", "model_b",
"source", and "gold" ("a" or "b", which makes it an attention check). DPO triplets {"prompt", "chosen", "rejected"} serve
too; they come back as labels of "chosen" against "rejected".
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from label_store import text_problem
from preference_data_creation import problem
from shared import LabsError

REPLY_FIELDS = ("reply", "response", "completion", "output")  # of a samples file; the labs write "reply"


# ------------------------------------------------------------------------------------------------------------ reading


def read_pairs(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file to label, as `LabelStore.add_examples` takes them.

    Raises LabsError naming the file and the first bad row, with the number of further ones.
    """
    return _read(Path(path), _pair, "nothing was imported")


def _pair(row: Mapping[str, Any]) -> dict[str, str]:
    triplet = "chosen" in row and "response_a" not in row
    first, second = ("chosen", "rejected") if triplet else ("response_a", "response_b")
    pair = {"prompt": _text(row, "prompt"), "response_a": _text(row, first), "response_b": _text(row, second)}
    if pair["response_a"].strip() == pair["response_b"].strip():
        raise ValueError(f"{first!r} and {second!r} are the same answer")
    # What is exported must be readable by the lab's training: a prompt with several turns is checked now.
    trouble = problem({"prompt": pair["prompt"], "chosen": pair["response_a"], "rejected": pair["response_b"]})
    if trouble:
        raise ValueError(trouble)
    for field in ("model_a", "model_b", "source"):
        if row.get(field) is not None:
            pair[field] = _text(row, field)
    if triplet:
        pair = {"model_a": "chosen", "model_b": "rejected"} | pair
    if row.get("gold") is not None:
        if row["gold"] not in ("a", "b"):
            raise ValueError(f'\'gold\' is {row["gold"]!r}; it must be "a" or "b"')
        pair["gold"] = row["gold"]
    return pair


def read_samples(path: str | Path) -> dict[str, str]:
    """{prompt: reply} of a stage's samples.jsonl, or of any such file with a reply under one of REPLY_FIELDS.

    Of a prompt that stands there twice the first reply is taken. Raises LabsError as `read_pairs` does.
    """

    def sample(row: Mapping[str, Any]) -> tuple[str, str]:
        field = next((name for name in REPLY_FIELDS if name in row), REPLY_FIELDS[0])
        reply = row.get(field)
        if reply != "":  # an empty reply is a reply, and a bad one
            reply = _text(row, field)
        return _text(row, "prompt"), reply

    return dict(reversed(_read(Path(path), sample, "nothing was compared")))


def pairs_from_samples(
    name_a: str, samples_a: Mapping[str, str], name_b: str, samples_b: Mapping[str, str]
) -> tuple[list[dict[str, str]], Counter]:
    """Pairs of two models' replies to the same prompts, and how many prompts were left out and why.

    Raises LabsError when the names are equal or no pair is left.
    """
    if name_a == name_b:
        raise LabsError(f"both models are called {name_a}: give each a name of its own")
    pairs, left_out = [], Counter()
    for prompt in dict.fromkeys([*samples_a, *samples_b]):
        if prompt not in samples_a or prompt not in samples_b:
            left_out["in one file only"] += 1
            continue
        pair = {"prompt": prompt, "response_a": samples_a[prompt], "response_b": samples_b[prompt]}
        if pair["response_a"].strip() == pair["response_b"].strip():
            left_out["the same reply"] += 1
            continue
        pairs.append({**pair, "model_a": name_a, "model_b": name_b, "source": "comparison"})
    if not pairs:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the files are empty"
        raise LabsError(f"{name_a} and {name_b} have no pair to compare ({why}): take samples of the same prompts")
    return pairs, left_out


def _read(path: Path, check: Callable[[Mapping[str, Any]], Any], consequence: str) -> list:
    """Each line through `check`, which raises ValueError for a bad row."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise LabsError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"one JSON object a line is expected, not a {type(row).__name__}")
            rows.append(check(row))
        except UnicodeDecodeError as error:
            bad.append((number, f"not UTF-8 text (byte {error.start})"))
        except json.JSONDecodeError as error:
            bad.append((number, f"broken JSON ({error.msg})"))
        except RecursionError:
            bad.append((number, "JSON nested too deeply"))
        except ValueError as error:
            bad.append((number, str(error)))
    if bad:
        number, problem = bad[0]
        more = f" ({len(bad) - 1} further bad rows)" if len(bad) > 1 else ""
        raise LabsError(f"{path}, row {number}: {problem}{more}; {consequence}: mend the file and try again")
    if not rows:
        raise LabsError(f"{path} holds no rows; {consequence}")
    return rows


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing")
    value = row[field]
    problem = text_problem(value) or (None if value.strip() else "is empty")
    if problem:
        raise ValueError(f"{field!r} {problem}")
    return value


# ------------------------------------------------------------------------------------------------------------ writing


def by_example(preferences: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Live preferences (`LabelStore.preferences`) grouped by example, attention checks left out."""
    groups: dict[int, list] = {}
    for row in preferences:
        if row["gold"] is None:
            groups.setdefault(row["example_id"], []).append(row)
    return groups


def verdict(labels: Sequence[Mapping[str, Any]]) -> str:
    """What one example's labels say: "a", "b", "tie", "both_bad" by majority, "votes tied", or "skip" if all skipped."""
    votes = Counter(row["preferred"] for row in labels if row["preferred"] != "skip").most_common(2)
    if not votes:
        return "skip"
    return "votes tied" if len(votes) == 2 and votes[0][1] == votes[1][1] else votes[0][0]


def training_rows(preferences: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Counter]:
    """Triplets {"prompt", "chosen", "rejected"} with what is known of each, and how many examples gave none and why."""
    left_out = Counter()
    checks = {row["example_id"] for row in preferences if row["gold"] is not None}
    if checks:
        left_out["attention check"] = len(checks)
    rows = []
    for example_id, labels in by_example(preferences).items():
        winner = verdict(labels)
        if winner not in ("a", "b"):
            left_out[{"both_bad": "both bad", "skip": "skipped"}.get(winner, winner)] += 1
            continue
        loser, one = "b" if winner == "a" else "a", labels[0]
        agreeing = [row for row in labels if row["preferred"] == winner]
        rows.append(
            {
                "prompt": one["prompt"],
                "chosen": one[f"response_{winner}"],
                "rejected": one[f"response_{loser}"],
                "source": one["source"],
                "chosen_model": one[f"model_{winner}"],
                "rejected_model": one[f"model_{loser}"],
                "example_id": example_id,
                "labelers": sorted(row["labeler"] for row in labels if row["preferred"] != "skip"),
                "votes": sum(row["preferred"] != "skip" for row in labels),
                "votes_for_chosen": len(agreeing),
                "confidence": statistics.fmean(row["confidence"] for row in agreeing),
                "reasoning": "\n".join(row["reasoning"] for row in agreeing if row["reasoning"]),
            }
        )
    return rows, left_out


def check_ending(path: Path) -> Path:
    """The path. Raises LabsError unless it ends in .jsonl or .parquet."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise LabsError(f"{path}: the file's name must end in .jsonl or .parquet")
    return path


def write_training_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write .jsonl or .parquet, whole or not at all. Raises LabsError for another ending or a place not writable."""
    path = check_ending(Path(path))
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        texts = ("prompt", "chosen", "rejected", "source", "chosen_model", "rejected_model")
        types = {name: pyarrow.string() for name in (*texts, "reasoning")}  # not the type "null" where none is known
        types["labelers"] = pyarrow.list_(pyarrow.string())
        types |= {name: pyarrow.int64() for name in ("example_id", "votes", "votes_for_chosen")}
        schema = pyarrow.schema([(name, types.get(name, pyarrow.float64())) for name in rows[0]])
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), buffer)
        content = buffer.getvalue()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise LabsError(f"cannot write {path}: {error.strerror or error}; choose a folder you may write to") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
