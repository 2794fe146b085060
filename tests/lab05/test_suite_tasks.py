"""Tasks on scripted replies: right ones score, wrong ones do not, and what is kept of harmful ones is next to nothing."""

import json

import pytest

import suite_plan
import suite_tasks
from suite_plan import TASKS
from suite_rows import problems
from suite_tasks import Subject

N = 12
REASONING = {"profile": "tiny", "n": N, "shots": 0, "max_new_tokens": 80}


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    """These tests are about the tiny world."""
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)


@pytest.fixture
def replied(monkeypatch):
    """Run a task whose model replies to prompt number i with replies[i]."""

    def call(task, settings, replies):
        monkeypatch.setattr(suite_tasks, "_chat", lambda subject, key="prompt": lambda row: row[key])
        monkeypatch.setattr(
            "shared.models.chat_prompt", lambda tokenizer, messages, tools=None: messages[-1]["content"]
        )
        monkeypatch.setattr(suite_tasks, "replies_of", lambda subject, prompts, n: list(replies[: len(prompts)]))
        return TASKS[task].run(Subject("x", None, None), settings)

    return call


def mean(items, metric):
    return sum(item["scores"][metric] for item in items) / len(items)


def test_schema_answers(replied):
    from train_sft import test_rows

    gold = [row["output"] for row in test_rows(N)]
    settings = {"n": N, "phrasing": "train"}
    right = replied("schema", settings, gold)
    assert mean(right, "right") == mean(right, "valid") == 1 and right[0]["expected"]
    shifted = replied("schema", settings, gold[1:] + gold[:1])
    assert mean(shifted, "right") < 0.5
    talk = replied("schema", settings, [f"Here: {text}" for text in gold])
    assert mean(talk, "valid") == 0, "words around a record are not in the schema"


def test_questions_keep_what_the_duel_needs(replied):
    from alignment_world import test_questions

    rows = test_questions(N)
    items = replied("questions", {"n": N}, [f"{row['value']}." for row in rows])
    assert mean(items, "right") == 1 and mean(items, "words") == 1
    assert all({"prompt", "reply", "value"} <= item.keys() for item in items)
    assert mean(replied("questions", {"n": N}, ["I do not know."] * N), "right") == 0


def test_of_attacks_no_text_is_kept(replied):
    from alignment_world import test_requests

    rows = test_requests(N, True)
    served = replied("attacks", {"n": N}, [row["output"] for row in rows])
    assert mean(served, "success") == 1
    kept = json.dumps(served)
    assert all(row["output"] not in kept and row["prompt"] not in kept for row in rows)
    assert all(len(item["opening"]) <= 16 and item["sha256"] and item["wrapper"] for item in served)
    refused = replied("attacks", {"n": N}, ["I cannot help with that."] * N)
    assert mean(refused, "success") == 0
    broken = replied("attacks", {"n": N}, ["}{ ]] <<< zq zq zq zq zq zq zq }{"] * N)
    assert mean(broken, "success") == 0 and mean(broken, "degenerate") == 1, "gibberish is no success and no safety"


def test_lookalikes(replied):
    from alignment_world import test_requests

    rows = test_requests(N, False)
    served = replied("lookalikes", {"n": N}, [row["output"] for row in rows])
    assert mean(served, "unanswered") == 0 and mean(served, "right") == 1
    assert mean(replied("lookalikes", {"n": N}, ["I cannot help with that."] * N), "unanswered") == 1


def test_reasoning_strict_and_flexible(replied):
    rows = problems(REASONING)
    thought = replied("reasoning", REASONING, [f"<think>x</think> {row['answer']}" for row in rows])
    assert mean(thought, "strict") == mean(thought, "flexible") == mean(thought, "format") == 1
    bare = replied("reasoning", REASONING, [f"It must be {row['answer']}" for row in rows])
    assert mean(bare, "flexible") == 1 and mean(bare, "format") == 0 and mean(bare, "strict") == 0
    wrong = replied("reasoning", REASONING, [f"<think>x</think> {int(row['answer']) + 1}" for row in rows])
    assert mean(wrong, "flexible") == 0


@pytest.mark.parametrize("kind", suite_plan.SHIFTS)
def test_shifted_problems_are_other_questions_row_by_row(kind):
    plain, shifted = problems(REASONING), problems({**REASONING, "shift": kind})
    assert len(shifted) == len(plain) == N
    assert all(old["question"] != new["question"] for old, new in zip(plain, shifted, strict=True))
    if kind != "numbers":
        assert [row["answer"] for row in plain] == [row["answer"] for row in shifted]


@pytest.mark.parametrize("part", ["values", "irrelevance"])
def test_calls(replied, part):
    from tool_data import test_rows

    rows = test_rows(N, part)
    calls = [
        "".join(
            f"<tool_call>{json.dumps(call['function'])}</tool_call>"
            for call in row["messages"][-1].get("tool_calls", [])
        )
        or row["messages"][-1]["content"]
        for row in rows
    ]
    settings = {"n": N, "part": part, "max_new_tokens": 96}
    assert mean(replied(f"calls_{part}", settings, calls), "exact") == 1
    other = "Sorry." if part == "values" else '<tool_call>{"name": "x", "arguments": {}}</tool_call>'
    assert mean(replied(f"calls_{part}", settings, [other] * N), "exact") == 0


def test_a_copied_test_row_is_contamination(monkeypatch):
    import stage_overlap

    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    other = text.replace("one", "two").replace("seven", "red").replace("nine", "blue").replace("twelve", "green")
    monkeypatch.setattr(stage_overlap, "stage_texts", lambda stage, profile, seed: ([text, other, ""], [text], "here"))
    items = TASKS["contamination"].run(None, {"stage": "sft", "profile": "tiny", "seed": 0})
    assert [item["scores"].get("copy") for item in items] == [1.0, 0.0, None] and "error" in items[2]


@pytest.mark.slow
def test_a_model_is_asked_as_its_lab_asks_it(tiny_base):
    """On a real, untrained model: replies as by `generate_replies`, and a prompt without room is None."""
    from shared.models import chat_prompt, generate_replies, load_model

    model, tokenizer = load_model(tiny_base)
    talks = [[{"role": "user", "content": text}] for text in ("Ana has 9 pens.", "Where does Rosa live?", "3 + 4 = ")]
    prompts = [chat_prompt(tokenizer, talk) for talk in talks]
    subject = Subject("x", model, tokenizer)
    assert suite_tasks.replies_of(subject, prompts, 12) == generate_replies(model, tokenizer, talks, 12)
    assert suite_tasks.replies_of(subject, [prompts[0], "pens " * 600], 12)[1] is None
    assert suite_tasks.replies_of(subject, [], 12) == []
