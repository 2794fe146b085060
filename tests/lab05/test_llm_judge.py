"""Judges with known faults, over real HTTP: each fault must be seen, and none may become a ranking."""

import hashlib
import json
import random

import pytest
from judge_server import parts, serving, verdict

import judge_prompts
import llm_judge
from judge_clients import endpoint
from llm_judge import compare_answers, rank, score_answers, trust
from model_judge import ModelJudge
from offline_judges import ReferenceRubric, RewardJudge, pairwise_from_scores
from shared import LabsError

PROMPTS = [f"question {i}" for i in range(60)]
GOOD, BAD = [f"good answer {i}" for i in range(60)], [f"poor answer {i}" for i in range(60)]


def model_judge(server, cache=None, **settings):
    settings = {"backoff_s": 0.01, "retries": 2, "timeout_s": 5, **settings}
    return ModelJudge(endpoint(server.url, "judge-1", **settings), cache=cache)


def by_merit(question, first, second):
    return "first" if "good" in first else "second" if "good" in second else "tie"


def test_a_fair_judge_gets_its_verdict_through():
    with serving(verdict(by_merit)) as server:
        found = compare_answers(PROMPTS, GOOD, BAD, model_judge(server))
    assert (found.result.wins, found.result.n_error, found.consistency, found.unreadable) == (60, 0, 1.0, 0.0)
    assert found.better == "a" and found.length_controlled > 0.9 and server.requests == 120
    with serving(verdict(by_merit)) as server:
        assert compare_answers(PROMPTS, BAD, GOOD, model_judge(server)).better == "b"


def test_a_judge_who_looks_at_the_position_gets_ties_and_consistency_0():
    for side in ("first", "second"):
        with serving(verdict(lambda *_, side=side: side)) as server:
            found = compare_answers(PROMPTS, GOOD, BAD, model_judge(server))
        assert (found.result.ties, found.result.n_inconsistent, found.consistency) == (60, 60, 0.0)
        assert found.better is None and "position" in found.why


def longer_wins(question, first, second):
    return "first" if len(first) > len(second) else "second"


def test_a_judge_of_length_is_exposed():
    rng = random.Random(0)
    # Of equal merit; a is the longer one in most pairs, as answers of a tuned model are.
    a = ["x" * rng.randint(80, 200) for _ in range(200)]
    b = ["y" * rng.randint(60, 140) for _ in range(200)]
    found = compare_answers([f"q{i}" for i in range(200)], a, b, longer_wins)
    assert found.result.win_rate > 0.75 and found.longer_won == 1.0
    assert abs(found.length_controlled - 0.5) < 0.1 and found.better is None and "equal length" in found.why
    # Where one side is always the longer, no statistic can tell; then nothing is claimed.
    always = compare_answers(
        PROMPTS, [text + " and more of it" * (i % 4 + 1) for i, text in enumerate(BAD)], BAD, longer_wins
    )
    assert always.result.wins == 60 and always.better is None and "cannot be told apart" in always.why


def test_a_judge_of_length_is_exposed_where_few_pairs_could_tell():
    """b is the longer in nine pairs of ten, and the tenth goes to a: nothing but length."""
    a = [("a longer answer" if i % 10 == 0 else "short") + f" from a {i}" for i in range(60)]
    b = [("short" if i % 10 == 0 else "a longer answer") + f" from b {i}" for i in range(60)]
    found = compare_answers(PROMPTS, a, b, longer_wins)
    assert found.result.wins == 6 and found.longer_won == 1.0 and found.better is None
    assert "whichever side wrote it" in found.why
    # Who wins the short ones, too, is better, although mostly longer.
    fair = compare_answers(PROMPTS, a, b, lambda _, first, second: "first" if "from b" in first else "second")
    assert fair.longer_won == 0.9 and fair.better == "b"


def test_a_constant_judge_gets_no_ranking():
    systems = {"one": GOOD, "two": BAD, "three": [text.upper() for text in BAD]}
    for judge in (lambda *_: "tie", lambda *_: "first"):
        found = rank(PROMPTS, systems, judge)
        assert found.order is None and not found.beats and set(found.win_rates.values()) == {0.5}
    found = rank(PROMPTS, systems, by_merit)
    assert found.order[0] == "one" and {(x, y) for x, y, _ in found.beats} == {("one", "two"), ("one", "three")}
    assert all(p < 1e-10 for *_, p in found.beats)
    with pytest.raises(LabsError, match="two systems"):
        rank(PROMPTS, {"one": GOOD}, by_merit)


def test_the_rank_needs_more_than_chance():
    """Twenty systems of equal merit before a judge who throws a coin: raw p values would separate some of 190 pairs."""

    def coin(prompt, first, second):
        low, high = sorted((first, second))
        wins = low if hashlib.sha256(f"{prompt}{low}{high}".encode()).digest()[0] % 2 else high
        return "first" if wins == first else "second"

    systems = {str(i): [f"{i:02d}{j:02d}" for j in range(40)] for i in range(8)}
    assert rank(PROMPTS[:40], systems, coin).order is None


def nonsense_of(share):
    """Exactly this share of the replies, spread over them, is no verdict."""

    def reply(body):
        p = parts(body)
        number = int(p["question"].split()[1])
        if (
            number % round(1 / share) == 0
            and "good" in p["first answer"]
            or number % round(1 / share) == 1
            and ("good" in p["second answer"])
        ):
            return "Both have their merits, it depends. [[A]]"
        return verdict(by_merit)(body)

    return reply


def test_a_fifth_of_nonsense_is_reported_as_a_fifth():
    with serving(nonsense_of(1 / 5)) as server:
        judge = model_judge(server)
        found = compare_answers(PROMPTS, GOOD, BAD, judge)
    assert found.unreadable == pytest.approx(0.2) and found.n_replies == 120
    # Each such reply spoils its pair: here two pairs of five, and none is scored.
    assert (found.result.n_error, found.result.n_valid) == (24, 36) and found.result.win_rate == 1.0
    assert judge.problems == {"no readable verdict": 24}
    assert found.better is None and "40%" in found.why
    assert any("20.0% of 120 replies" in line for line in found.lines())


def test_a_judge_who_says_nothing():
    found = compare_answers(PROMPTS, GOOD, BAD, lambda *_: None)
    assert found.result.n_error == 60 and found.better is None and found.unreadable == 1.0
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["result"]["win_rate"] is None
    with pytest.raises(ValueError, match="equally long"):
        compare_answers([], [], [], by_merit)


def test_empty_answers_are_counted():
    found = compare_answers(PROMPTS[:3], ["", " ", "good"], ["good"] * 3, by_merit)
    assert found.n_empty == 2


# Scores


def scores(body, level=4):
    p = parts(body)
    row = {"score": 5 if "good" in p["answer"] else level, "reason": "so it is"}
    return json.dumps({"key": p["key"], "scores": dict.fromkeys(judge_prompts.RUBRIC, row)})


def test_scores_with_reasons():
    with serving(lambda body: scores(body, 2)) as server:
        found = score_answers(PROMPTS, GOOD[:30] + BAD[30:], model_judge(server))
    assert found.n_valid == 60 and set(found.means) == set(judge_prompts.RUBRIC) and not found.constant
    mean, (low, high) = found.means["clarity"]
    assert mean == 3.5 and low < 3.5 < high and found.rows[0]["clarity"] == {"score": 5, "reason": "so it is"}


def test_a_judge_who_always_gives_5_says_nothing():
    with serving(lambda body: scores(body, 5)) as server:
        found = score_answers(PROMPTS, BAD, model_judge(server))
    assert found.constant and "tell nothing" in found.lines()[-1]


def test_scores_that_are_none():
    with serving(lambda body: scores(body, 6)) as server:
        found = score_answers(PROMPTS[:4], BAD[:2] + GOOD[:2], model_judge(server))
    assert (found.n_valid, found.n_error, found.rows[:2]) == (2, 2, [None, None])
    with pytest.raises(LabsError, match="compares pairs"):
        score_answers(["p"], ["a"], by_merit)


# Trust


def labelled(n=200, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        merit = rng.random(), rng.random()
        label = "first" if merit[0] > merit[1] else "second"
        rows.append({"prompt": f"q{i}", "first": f"{merit[0]:.6f}", "second": f"{merit[1]:.6f}", "label": label})
    return rows


def greater(prompt, first, second):
    return "first" if float(first) > float(second) else "second"


def test_trust_wants_agreement_beyond_chance():
    rows = labelled()
    found = trust(greater, rows)
    assert found.kappa == 1.0 and found.trusted and found.n_valid == 200

    def noisy(prompt, first, second):
        right = hashlib.sha256(prompt.encode()).digest()[0] < 218  # 85 % right: κ about 0.7
        return greater(prompt, first, second) if right else greater(prompt, second, first)

    found = trust(noisy, rows)
    assert 0.5 < found.kappa < 0.85 and found.ci95[0] < found.kappa < found.ci95[1] and found.trusted
    for bad in (lambda *_: "first", lambda *_: "tie", lambda p, first, second: greater(p, second, first)):
        found = trust(bad, rows)
        assert not found.trusted and found.kappa <= 0.01
    assert not trust(greater, rows[:29]).trusted and "too few" in trust(greater, rows[:29]).reason
    assert "no verdict at all" in trust(lambda *_: None, rows).reason


def test_trust_where_people_always_chose_the_first():
    """As in files of chosen and rejected answers: agreement with a constant is no agreement beyond chance."""
    rows = labelled()
    turned = [row if row["label"] == "first" else llm_judge._turned(row) for row in rows]
    assert {row["label"] for row in turned} == {"first"}
    assert trust(greater, turned).kappa == 1.0
    assert not trust(lambda *_: "first", turned).trusted


def test_trust_of_a_judge_with_gaps_and_of_bad_rows():
    gaps = trust(lambda p, first, second: None if int(p[1:]) % 5 == 0 else greater(p, first, second), labelled())
    assert not gaps.trusted and gaps.n_error == 40 and "20%" in gaps.reason
    with pytest.raises(LabsError, match="pair 1: label 'x'"):
        trust(greater, [{"prompt": "p", "first": "1", "second": "2", "label": "x"}])
    with pytest.raises(LabsError, match="no labelled pair"):
        trust(greater, [])


# Offline judges


DETAILS = """The city lies on the river Seine in the north of the country, has about two million inhabitants within its
limits, and was founded in the third century before our era by a Celtic people. Visitors come for museums, cafés, bridges and
a tall iron tower, built for an exhibition in 1889, which engineers of that time thought could never stand."""


def test_the_reference_rubric_puts_truth_before_brevity():
    judge = ReferenceRubric({"capital of France?": "Paris"})
    prompt = "capital of France?"
    right, long, wrong = "It is Paris.", "It is Paris. " + DETAILS, "Lyon."
    refusal, gibberish = "I'm sorry, but I cannot help with that.", "Paris Paris Paris Paris Paris Paris Paris Paris"
    assert judge(prompt, right, long) == "first" and judge(prompt, wrong, long) == "second"
    assert judge(prompt, right, "In Paris, it is.") == "tie"
    for worse in (refusal, gibberish, wrong, "Parisian", ""):
        assert judge(prompt, worse, right) == "second", worse
    assert judge("unknown?", right, wrong) is None and judge.score("unknown?", right) is None
    found = score_answers([prompt] * 3, [right, long, wrong], judge)
    assert [row["correctness"]["score"] for row in found.rows] == [5, 5, 1]
    assert found.rows[1]["brevity"]["score"] < 5 and "Paris" in found.rows[2]["correctness"]["reason"]


def test_a_judge_from_scores():
    judge = pairwise_from_scores(lambda prompt, answer: {"a": 1.0, "b": 1.05, "c": 2.0}.get(answer), margin=0.1)
    assert [judge("p", *pair) for pair in ("ab", "ca", "ac", "ax")] == ["tie", "first", "second", None]


def test_the_reward_model_judges_in_batches(tmp_path, monkeypatch):
    import reward_model

    calls = []

    def rewards(model, tokenizer, prompts, replies, batch_size):
        calls.append(len(replies))
        return [float("good" in reply) for reply in replies]

    monkeypatch.setattr(reward_model, "rewards", rewards)
    found = compare_answers(PROMPTS, GOOD, BAD, RewardJudge(None, None))
    assert found.better == "a" and calls == [120]  # each answer once, though each is asked about twice
    with pytest.raises(LabsError, match="labs run reward"):
        RewardJudge.load(tmp_path)
