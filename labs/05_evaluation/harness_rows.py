"""What this lab's task files call: rows of LABS_DATA_DIR, answers read as the harness reads them, code run in the sandbox.

Two ways to read the number at the end of a GSM8K completion. Ours (lab 03's `extract_answer`) reads what a person would; the
harness's are two regular expressions, which every published GSM8K score of it stands on. `harness_strict`, `harness_flexible`
and `harness_match` are those, to the letter; where the two differ:

    completion, the gold being 18              harness                            ours
    #### 17 … wait, no … #### 18               strict: the first mark, 17         the last: models correct themselves
    #### 17, then at once #### 18              flexible: 18                       two offers, so neither
    20 or 18                                   flexible: the last one, 18         two offers, so neither
    ####18, #### $18, #### +18                 strict: none, wants "#### 18"      marked
    \\boxed{18}, <think>…</think> 18           strict: none                       marked
    #### 18.00, #### 018, #### 36/2            another text                       the same number
    #### 1,8                                   18, commas are dropped             not clearly 18
    #### 18, then "that took 3 steps"          flexible: 3                        the mark counts
    the answer is 18 (for 3 people)            flexible: 3                        what is called the answer counts
    I have 18. ...    It costs 18 dollars, $.  flexible: "...", "$."              18
    eighteen                                   none                               18

Each line is a case of tests/lab05/test_harness_tasks.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared import LabsError

# lm-evaluation-harness 0.4.13, tasks/gsm8k/gsm8k.yaml (version 3.0).
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
INVALID = "[invalid]"

LEFT_OUT: dict[str, Counter] = {}  # task → rows that could not be asked, by reason, as last loaded
SOURCES: dict[str, str] = {}  # task → where its rows came from, as last loaded


# ------------------------------------------------------------------------------------------------------- GSM8K's answers
def harness_strict(completion: str) -> str:
    """What the harness's filter strict-match takes from a completion: the number after the first `#### `."""
    found = STRICT.findall(completion)
    return found[0].strip() if found else INVALID


def harness_flexible(completion: str) -> str:
    """What its filter flexible-extract takes: the last thing like a number, which may be a lone "$." or ",,"."""
    found = FLEXIBLE.findall(completion)
    return next(group for group in found[-1] if group).strip() if found else INVALID


def harness_match(extracted: str, gold: str) -> bool:
    """Its exact match of an extracted text with a gold solution (`… #### 18`): as texts, without commas, $ and a last dot."""
    for pattern in IGNORED:
        extracted, gold = re.sub(pattern, "", extracted), re.sub(pattern, "", gold)
    return extracted.lower() == gold.lower()


def gsm8k_scores(completion: str, gold: str) -> dict[str, bool]:
    """A completion by all four readings: the harness's two and ours. `gold` is GSM8K's whole solution or its number."""
    from reward_functions import answers_match, extract_answer

    return {
        "strict-match": harness_match(harness_strict(completion), gold),
        "flexible-extract": harness_match(harness_flexible(completion), gold),
        "ours-strict": answers_match(extract_answer(completion, "strict"), gold),
        "ours-flexible": answers_match(extract_answer(completion, "flexible"), gold),
    }


# ---------------------------------------------------------------------------------------------------------------- code
def program_of(prompt: str, completion: str, entry_point: str) -> str:
    """The program that a completion of a HumanEval stub makes: a fenced function of that name, else stub and body."""
    from code_reward import extract_code

    fenced = extract_code(completion) if "```" in completion else ""
    if re.search(rf"^def {re.escape(entry_point)}\b", fenced, re.MULTILINE):
        return fenced
    return prompt + completion.partition("```")[0]


def run_code(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """{"pass": 1.0 where every test of the row passes, else 0.0}, from the sandbox. Raises LabsError where there is none."""
    from code_reward import code_reward

    program = program_of(doc["prompt"], results[0], doc["entry_point"])
    (passed,) = code_reward(
        [f"```python\n{program}\n```"], [list(doc["tests"])], [doc["entry_point"]], [doc["setup"]], scoring="all"
    )
    return {"pass": passed}


# ---------------------------------------------------------------------------------------------------------------- rows
def _usable(task: str, rows: Sequence[Mapping[str, Any]], convert: Callable[[Mapping], dict]) -> list[dict[str, Any]]:
    """The rows that have a gold; the others are counted by reason in LEFT_OUT. Raises LabsError where none has."""
    kept, left = [], Counter()
    for row in rows:
        try:
            kept.append(convert(row))
        except ValueError as error:
            left[str(error)] += 1
    LEFT_OUT[task] = left
    if not kept:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left.items())
        raise LabsError(f"{task} has no row that can be asked ({reasons or 'it is empty'}): mend the file")
    return kept


def _dataset(task: str, name: str, splits: Sequence[str], convert: Callable[[Mapping], dict]) -> dict[str, Any]:
    from datasets import Dataset

    from shared.data import first_rows

    parts = {}
    for split in reversed(splits):  # the test last: what is left out of it is what counts
        rows, _, SOURCES[task] = first_rows(name, (split,))
        parts[split] = Dataset.from_list(_usable(task, rows, convert))
    return parts


def gsm8k(**kwargs: Any) -> dict[str, Any]:
    """{"train", "test"}: questions and whole solutions with a number after `####`."""
    from reasoning_rows import gsm8k_problem

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        gsm8k_problem(row)  # raises where there is no gold
        return {"question": row["question"], "answer": row["answer"]}

    return _dataset("labs_gsm8k", "gsm8k", ("test", "train"), convert)


def mmlu_stem(**kwargs: Any) -> dict[str, Any]:
    """{"test"}: questions with four choices and the position of the right one."""

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        if len(row["choices"]) != 4 or not all(str(choice).strip() for choice in row["choices"]):
            raise ValueError("field 'choices' has not four texts")
        if not 0 <= row["answer"] < 4:
            raise ValueError("field 'answer' names no choice")
        return dict(row)

    return _dataset("labs_mmlu_stem", "mmlu_stem", ("test",), convert)


def humaneval(**kwargs: Any) -> dict[str, Any]:
    """{"test"}: stubs with tests taken apart; rows whose tests cannot be are left out."""
    from reasoning_rows import code_problem

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        problem = code_problem(row)
        kept = {name: problem[name] for name in ("tests", "setup", "entry_point")}
        return {"task_id": row["task_id"], "prompt": row["prompt"], **kept}

    return _dataset("labs_humaneval", "humaneval", ("test",), convert)
