"""HumanEval in the sandbox: its own solutions pass all, without their bodies none. Where LABS_DATA_DIR has the set."""

import gzip
import json
import os
from pathlib import Path

import pytest

from shared.code_sandbox import run_python

FILE = Path(os.environ.get("LABS_DATA_DIR", "nowhere")) / "humaneval" / "HumanEval.jsonl.gz"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.exists(), reason="LABS_DATA_DIR has no HumanEval")]


def statuses(body):
    """What becomes of every problem's whole test, with this body below the prompt."""
    found = []
    for line in gzip.open(FILE, "rt", encoding="utf-8"):
        row = json.loads(line)
        program = f"{row['prompt']}{body(row)}\n{row['test']}\ncheck({row['entry_point']})\n"
        found.append((row["task_id"], run_python(program, timeout_s=20.0).status))
    assert len(found) >= 50
    return found


def test_the_published_solutions_pass_all():
    assert [each for each in statuses(lambda row: row["canonical_solution"]) if each[1] != "ok"] == []


def test_without_their_bodies_none_passes():
    assert [each for each in statuses(lambda row: "    pass\n") if each[1] == "ok"] == []


def test_nor_does_one_that_ends_the_program_early():
    assert [each for each in statuses(lambda row: "    import os\n    os._exit(0)\n") if each[1] == "ok"] == []
