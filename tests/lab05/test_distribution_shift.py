"""Shifts: answers recomputed by a program of the test's own, only one thing changes, nothing stands in training."""

import random
import re

import pytest

import distribution_shift
from distribution_shift import (
    KINDS,
    NEW_NAMES,
    measure_shifts,
    plain_problems,
    read_story,
    shift_rows,
    shifted_problems,
)
from gsm8k_data_prep import overlaps, tiny_problems
from shared import LabsError, tiny_world
from shared.significance import mcnemar, wilson_interval

N = 120
UP, DOWN = {"gets", "finds", "buys"}, {"gives", "loses", "sells"}


def independent_answer(question):
    """Numbers and verbs in their order, read without the module's patterns."""
    total = None
    for sentence in re.split(r"(?<=[.?]) ", question)[:-1]:
        words = set(re.findall(r"\w+", sentence))
        (number,) = map(int, re.findall(r"\d+", sentence))
        total = number if total is None else total + number if words & UP else total - number if words & DOWN else None
    return total


@pytest.fixture(scope="module")
def plain():
    return plain_problems(N)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_and_the_form_is_lab_03s(plain, kind):
    rows = shifted_problems(N, kind=kind)
    assert len(rows) == N
    for row, old in zip(rows, plain, strict=True):
        assert row["answer"] == str(independent_answer(row["question"]))
        assert set(row) == set(old) and row["level"] == old["level"]
        assert row["id"] == f"{old['id']}/{kind}"
        assert row["prompt"] == [{"role": "user", "content": row["question"]}] or row["question"] in str(row["prompt"])
        assert row["solution"].rstrip(".").endswith(f"= {row['answer']}")
        assert row["solution"].count(" = ") == row["level"]
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["solution"]):
            assert int(left) + (1 if sign == "+" else -1) * int(right) == int(result)


def skeleton(question, *, names=False, numbers=False):
    if names:
        for name in (*tiny_world.NAMES, *NEW_NAMES):
            question = re.sub(rf"\b{name}\b", "NAME", question)
    return re.sub(r"\d+", "0", question) if numbers else question


def test_only_the_name_changes(plain):
    for row, old in zip(shifted_problems(N, kind="names"), plain, strict=True):
        assert row["question"] != old["question"] and row["answer"] == old["answer"]
        assert skeleton(row["question"], names=True) == skeleton(old["question"], names=True)
        assert read_story(row["question"]).name in NEW_NAMES


def test_only_the_numbers_change(plain):
    for row, old in zip(shifted_problems(N, kind="numbers"), plain, strict=True):
        assert skeleton(row["question"], numbers=True) == skeleton(old["question"], numbers=True)
        assert skeleton(row["solution"], numbers=True) == skeleton(old["solution"], numbers=True)
        numbers = [int(number) for number in re.findall(r"\d+", row["question"] + row["solution"])]
        assert all(100 <= number <= 999 for number in numbers)  # three digits, each of which the tokenizer writes alone


def test_only_the_phrasing_changes(plain):
    for row, old in zip(shifted_problems(N, kind="phrasing"), plain, strict=True):
        assert row["answer"] == old["answer"]
        assert re.findall(r"\d+", row["question"]) == re.findall(r"\d+", old["question"])
        story = read_story(old["question"])
        assert {word for word in re.findall(r"\w+", row["question"]) if word in tiny_world.NAMES} == {story.name}
        assert {word for word in re.findall(r"\w+", row["question"]) if word in tiny_world.THINGS} == {story.thing}
        with pytest.raises(LabsError, match="not a word problem"):
            read_story(row["question"])  # no sentence of training is left in its place
        sums = [re.findall(r"\d+ [+-] \d+ = \d+", text["solution"]) for text in (row, old)]
        assert sums[0] == sums[1]


def test_new_phrasing_is_made_of_words_that_the_world_knows():
    rng = random.Random(0)
    mix = dict.fromkeys(tiny_world.TEXTS, 1.0)
    stream = tiny_world.documents(rng, mix)
    known = set()
    for _ in range(6000):
        known.update(re.findall(r"\w+", next(stream)))
    templates = (distribution_shift.NEW_HAS, distribution_shift.NEW_GAINS)
    templates += (distribution_shift.NEW_LOSSES, distribution_shift.NEW_ASKS)
    for template in (text for part in templates for text in part):
        assert set(re.findall(r"\w+", re.sub(r"\{\w+\}", "", template))) <= known, template
        assert template not in (*tiny_world.GAINS, *tiny_world.LOSSES)


def test_new_names_are_nowhere_in_the_world():
    world = {word for words in tiny_world.POOLS.values() for word in words}
    assert not world & set(NEW_NAMES) and len(set(NEW_NAMES)) == len(NEW_NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stands_in_training(plain, kind):
    rows = shifted_problems(N, kind=kind)
    train = tiny_problems(1000, 1500, "train")  # as GRPO draws them
    assert overlaps(train, rows, 1.0) == []
    assert overlaps(train, [train[3]], 1.0)  # the check can find
    questions = {row["question"] for row in plain}
    assert not questions & {row["question"] for row in rows}


def test_pairs_are_stable():
    for kind in KINDS:
        rows = shifted_problems(40, kind=kind)
        assert rows == shifted_problems(60, kind=kind)[:40]  # a row does not depend on how many there are
        assert rows == shifted_problems(40, kind=kind)
        assert rows != shifted_problems(40, seed=1, kind=kind)
    assert plain_problems(30) == tiny_problems(0, 500, "test", {1: 1.0, 2: 1.0, 3: 1.0})[:30]  # lab 03's own test


def test_long_stories_have_room_or_are_refused():
    def story(count, verbs):
        changes = " ".join(verbs[index % len(verbs)] for index in range(count))
        return {**plain_problems(1)[0], "question": f"Ana has 40 pens. {changes} How many pens does Ana have now?"}

    for count in (1, 5, 8):
        for verbs in (("Ana loses 1.",), ("Ana gets 2 more.",), ("Ana sells 3.", "Ana finds 4 more.")):
            (row,) = shift_rows([story(count, verbs)], "numbers")
            assert row["answer"] == str(independent_answer(row["question"]))
            assert all(100 <= int(number) <= 999 for number in re.findall(r"\d+", row["question"] + row["solution"]))
    with pytest.raises(LabsError, match="too many changes"):
        shift_rows([story(9, ("Ana loses 1.",))], "numbers")
    shift_rows([story(30, ("Ana loses 1.", "Ana gets 1 more."))], "numbers")  # it goes up and down


@pytest.mark.parametrize("question", ["", "What is 3 + 4?", "Ana has 9 pens. How many pens does Ana have now?"])
def test_other_questions_are_refused(question, plain):
    with pytest.raises(LabsError, match="not a word problem"):
        shift_rows([{**plain[0], "question": question}], "names")


def test_unknown_kind_is_named(plain):
    with pytest.raises(LabsError, match="did you mean numbers"):
        shift_rows(plain, "number")


# ------------------------------------------------------------------------------------------------------------- measuring


def solver(rows):
    return [f"<think>work 1</think> {independent_answer(row['question'])}" for row in rows]


def memoriser(rows):
    """Right on the plain test, and answers every changed question with a number of its text."""
    known = {row["question"]: row["answer"] for row in plain_problems(N)}
    return [f"<think>x 1</think> {known.get(row['question'], 100_000)}" for row in rows]


def test_a_solver_loses_nothing_and_a_memoriser_everything():
    for result in measure_shifts(solver, N):
        assert (result.accuracy, result.strict, result.difference, result.p_value) == (1.0, 1.0, 0.0, 1.0)
        assert result.ci95 == wilson_interval(N, N)
    plain, *shifted = measure_shifts(memoriser, N)
    assert plain.kind == "plain" and plain.accuracy == 1.0
    for result in shifted:
        assert result.accuracy == 0 and result.difference == -1.0 and result.plain_accuracy == 1.0
        assert result.p_value == mcnemar([False] * N, [True] * N) < 1e-20
        assert "McNemar" in result.line()


def test_empty_replies_are_wrong_and_missing_ones_an_error():
    assert all(result.accuracy == 0 for result in measure_shifts(lambda rows: [""] * len(rows), 20))
    with pytest.raises(LabsError, match="19 replies to 20 problems"):
        measure_shifts(lambda rows: ["1"] * 19, 20)


def test_the_command(script):
    done = script(distribution_shift.__file__, "--n", "3", "--show", "1")
    assert done.returncode == 0, done.stderr
    assert all(f"[{kind}]" in done.stdout for kind in ("plain", *KINDS))
    failed = script(distribution_shift.__file__, "--kinds", "nams")
    assert failed.returncode == 1 and "did you mean names" in failed.stderr and "Traceback" not in failed.stderr
