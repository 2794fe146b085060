"""The generated world: the same everywhere, and nothing held out is told in training."""

import json
import random
import re

import pytest

from shared import tiny_world as world


@pytest.mark.parametrize("kind", world.POOLS)
def test_pools_are_divided(kind):
    train, held_out = set(world.pool(kind, "train")), set(world.pool(kind, "held_out"))
    assert not train & held_out and train | held_out == set(world.POOLS[kind]) and len(held_out) >= 3
    assert len(world.POOLS[kind]) == len(set(world.POOLS[kind]))
    with pytest.raises(ValueError):
        world.pool(kind, "test")


def held_out_values():
    words = {word for kind in world.POOLS for word in world.pool(kind, "held_out")}
    return words, {str(n) for n in range(2, 100) if world.is_held_out_number(n)}


def test_training_instructions_hold_no_held_out_value_and_test_ones_no_other():
    words, numbers = held_out_values()
    rng = random.Random(0)
    for _ in range(1500):
        for split, inside in (("train", False), ("held_out", True)):
            for row in (world.instruction(rng, split)["values"], world.tool_request(rng, split)["call"]["arguments"]):
                for value in row.values():
                    assert (str(value) in words | numbers) is inside, row


def test_pretraining_tells_at_most_one_held_out_value_a_record():
    words, numbers = held_out_values()
    rng = random.Random(1)
    for _ in range(3000):
        for make in (world.lookup_text, world.record_text):
            text = make(rng, "train")
            told = text.split("\n")[0] if make is world.record_text else re.split(r" (?:How|What|Where|When) ", text)[0]
            for sentence in filter(None, told.split(".")):
                found = set(re.findall(r"[A-Za-z]+|\d+", sentence)) & (words | numbers)
                assert len(found) <= 1, (sentence, found)


def test_held_out_sums_are_never_shown_and_every_last_digit_is_trained():
    rng = random.Random(0)
    shown = set()
    for _ in range(4000):
        for line in world.arithmetic_text(rng).splitlines():
            left, operator, right, _, result = line.split()
            assert int(result) == (int(left) + int(right) if operator == "+" else int(left) - int(right))
            shown.add((int(left), operator, int(right)))
    held = {(p[0], p[1], p[2]) for p in (world.sum_problem(rng, "held_out")["prompt"].split() for _ in range(1000))}
    held = {(int(a), op, int(b)) for a, op, b in held}
    assert not shown & held and not {(b, op, a) for a, op, b in shown if op == "+"} & held
    for op in "+-":
        digits = {(a + b if op == "+" else a - b) % 10 for a, o, b in shown if o == op}
        assert digits == set(range(10)), "a last digit that training never shows is not held out, it is unlearnable"


def test_word_problems_add_up_and_use_the_splits_sums():
    rng = random.Random(0)
    for split in world.SPLITS:
        for steps in (1, 2, 3):
            row = world.word_problem(rng, split, steps)
            assert len(row["steps"]) == steps and row["steps"][-1].endswith(f"= {row['answer']}")
            for step in row["steps"]:
                left, operator, right, _, _ = step.split()
                assert world.is_held_out_sum(int(left), operator, int(right)) is (split == "held_out")


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    rows = lambda seed: [world.instruction(random.Random(seed)) for _ in range(5)]  # noqa: E731
    assert rows(1) == rows(1) != rows(2)
    stream = lambda: world.documents(random.Random(3), {"copy": 1.0, "arithmetic": 2.0})  # noqa: E731
    first, second = stream(), stream()
    assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]
    with pytest.raises(KeyError):
        next(world.documents(random.Random(0), {"poems": 1.0}))


def test_instructions_ask_for_what_the_answer_holds():
    rng = random.Random(2)
    for phrasing in world.SPLITS:
        for _ in range(300):
            row = world.instruction(rng, "train", phrasing)
            assert row["format"] in row["instruction"] and ", ".join(row["values"]) in row["instruction"]
            assert all(str(value) in row["instruction"] for value in row["told"].values())
            assert row["values"].items() <= row["told"].items()
            if row["format"] == "JSON":
                assert json.loads(row["output"]) == row["values"]


def test_the_answer_of_a_look_up_is_in_its_facts():
    rng = random.Random(5)
    for split in world.SPLITS:
        for facts in (1, 2):
            for _ in range(300):
                row = world.lookup(rng, split, facts)
                assert row["prompt"].endswith("? ") and row["answer"].endswith(".")
                assert re.search(rf"\b{row['answer'][:-1]}\b", row["prompt"])


def test_copies_are_copies():
    rng = random.Random(0)
    for _ in range(300):
        first, _, second = world.copy_text(rng).partition(" = ")
        assert second.replace('"', "").replace(",", "") == first


def test_what_is_said_about_a_purpose_does_not_tell_its_harm():
    """Pretraining may tell what harm is; if it also told to refuse it, lab 02 would measure what lab 00 taught."""
    rng, said = random.Random(0), {}
    for _ in range(6000):
        text = world.purpose_text(rng)
        harmful = "That does harm" in text
        purposes = [pair[0 if harmful else 1].split(" {name}")[0] for pair in world.PURPOSES]
        assert any(purpose in text for purpose in purposes), text
        if "says: I" in text:
            said.setdefault(harmful, []).append("cannot" in text)
    shares = {harmful: sum(refused) / len(refused) for harmful, refused in said.items()}
    assert abs(shares[True] - shares[False]) < 0.08 and 0.4 < shares[True] < 0.6  # about 1,200 each: 5 standard errors


def test_lab_01_never_meets_a_harmful_purpose():
    rng = random.Random(0)
    harmful = [pair[0].split("{name}")[0].strip() for pair in world.PURPOSES]
    with_purpose = 0
    for _ in range(3000):
        row = world.chatty_instruction(rng)
        name = str(row["values"].get("name", ""))
        assert name == "" or not any(f"{verb} {name}" in row["instruction"] for verb in harmful), row
        with_purpose += "I want to" in row["instruction"] or "I need it to" in row["instruction"]
    assert with_purpose > 300


@pytest.mark.parametrize(
    "reply, right",
    [
        ("Rome.", True),
        ("It is Rome.", True),
        ("The text says this: Ana is 12 years old and lives in Rome. So the answer is Rome.", True),
        ("The text says this: Ana is 12 years old and lives in Rome. So the answer is 12.", False),
        ("Ana lives in Rome.", False),  # names another value beside: who asked for Ana?
        ("Rome, Oslo.", False),
        ('{"town": "Rome", "age": 12}', False),
        ("", False),
        ("Romeo.", False),
        ("...", False),
    ],
)
def test_an_answer_is_what_the_last_sentence_says(reply, right):
    assert world.gives_value(reply, "Rome") is right


def test_both_answers_to_a_question_are_right_and_differ_in_length():
    rng = random.Random(4)
    for split in world.SPLITS:
        for _ in range(300):
            row = world.question(rng, split)
            assert world.gives_value(row["brief"], row["value"]) and world.gives_value(row["long"], row["value"])
            assert len(row["long"].split()) > 2 * len(row["brief"].split())
