"""The labelling server under load and under the axe: real processes over HTTP, on SQLite and on PostgreSQL."""

import http.client
import random
import signal
import threading
import time
from collections import Counter

import pytest
from label_server import MODELS, Client, Server, label, longer_side, pairs
from scipy.stats import binom

from label_files import training_rows
from label_store import LabelStore
from shared import LabsError

LABELERS, LABELS = 20, 100


def fill(database, rows, **settings):
    store = LabelStore(str(database), create=True, **settings)
    store.add_examples(rows)
    return store


def work(client, n, log, rule=longer_side, repeat_share=0.0, rng=None):
    """Label `n` pairs; `log` gets (presentation, choice) of each answer that the server has confirmed."""
    for _ in range(n):
        task = client.task()
        if "presentation_id" not in task:
            return
        choice = rule(task)
        status, receipt = client.answer(task, choice)
        assert status == 200, receipt
        log.append((task["presentation_id"], choice))
        if rng and rng.random() < repeat_share:  # a client that got no answer asks again
            status, again = client.answer(task, choice)
            assert status == 200 and again["seconds"] == receipt["seconds"]


def crowd(server, names, n):
    """Everybody labels at once; the confirmed answers, by labeler."""
    logs = {name: [] for name in names}
    failures = []

    def one(name):
        try:
            work(server.client(name), n, logs[name], repeat_share=0.2, rng=random.Random(name))
        except BaseException as error:
            failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return logs


def audit(store, logs):
    """Every confirmed answer is in the database exactly once, and nothing else is."""
    rows = store.preferences()
    confirmed = [answer for log in logs.values() for answer in log]
    assert len(confirmed) == len(set(confirmed)), "a pair was handed out twice"
    assert len(rows) == len(confirmed), f"{len(confirmed)} answers were confirmed, {len(rows)} are stored"
    assert len({(row["labeler"], row["example_id"]) for row in rows}) == len(rows)
    assert Counter(row["labeler"] for row in rows) == {name: len(log) for name, log in logs.items() if log}
    labels = Counter(row["example_id"] for row in rows)
    assert all(labels[row["example_id"]] <= row["raters"] for row in rows), "beyond the overlap"
    assert store.counts()["superseded"] == 0
    return rows


def balanced(rows):
    """Whether response_a stood left as often as a fair coin allows in 99.9 % of all cases."""
    low, high = binom.interval(0.999, len(rows), 0.5)
    return low <= sum(row["left_was"] == "a" for row in rows) <= high


def many_people(database):
    names = [f"labeler {number}" for number in range(LABELERS)]
    store = fill(database, pairs(LABELERS * LABELS, longer="a"), overlap_share=0.2)
    with Server(database, names) as server:
        logs = crowd(server, names, LABELS)
        assert server.stop() == 0
    rows = audit(store, logs)
    assert len(rows) == LABELERS * LABELS
    assert max(Counter(row["example_id"] for row in rows).values()) == 2  # there was an overlap
    assert balanced(rows)
    # All preferred the longer answer, wherever it stood. Were the sides mixed up anywhere, half would be wrong.
    exported, left_out = training_rows(rows)
    assert not left_out
    assert all(len(row["chosen"]) > len(row["rejected"]) and row["chosen_model"] == MODELS[0] for row in exported)
    assert not all(row["left_was"] == "a" for row in rows)
    store.close()


@pytest.mark.slow
def test_twenty_people_at_once_on_sqlite(tmp_path):
    many_people(tmp_path / "labels.db")


@pytest.mark.postgres
def test_twenty_people_at_once_on_postgresql(postgres):
    many_people(postgres())


def test_the_audit_finds_what_it_looks_for(tmp_path):
    store = fill(tmp_path / "labels.db", pairs(40), overlap_share=0)
    ana = store.labeler_of(store.add_labeler("ana"))
    log = []
    for _ in range(20):
        task = store.next_task(ana)
        store.submit(ana, task.presentation_id, "a")
        log.append((task.presentation_id, "a"))
    audit(store, {"ana": log})
    for wrong in (log[1:], [*log, ("lost", "a")], [*log[1:], log[1]]):
        with pytest.raises(AssertionError):
            audit(store, {"ana": wrong})
    assert not balanced([{"left_was": "a"}] * 20) and balanced([{"left_was": "a"}, {"left_was": "b"}] * 10)
    store.close()


def killed_half_way(database):
    """A server that is killed while people label, and its successor: everything confirmed is kept, and the rest is done."""
    names, n = ["ana", "ben", "cem"], 60
    store = fill(database, pairs(n), overlap_share=0)
    logs = {name: [] for name in names}
    killed = threading.Event()

    def one(server, name):
        try:
            work(server.client(name), n, logs[name])
        except (OSError, http.client.HTTPException):  # the connection broke
            assert killed.is_set()

    with Server(database, names) as server:
        threads = [threading.Thread(target=one, args=(server, name)) for name in names]
        for thread in threads:
            thread.start()
        while sum(map(len, logs.values())) < n // 2:
            time.sleep(0.01)
        killed.set()
        server.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        before = sum(map(len, logs.values()))
        assert n // 2 <= before < n
        tokens = server.tokens
    with Server(database, tokens=tokens) as server:  # the tokens are still good
        for name in names:
            work(server.client(name), n, logs[name])
        assert server.stop() == 0
    rows = store.preferences()
    confirmed = {answer for log in logs.values() for answer in log}
    # An answer may have been stored while its confirmation was lost; a confirmed one must be there.
    assert len(rows) == n == len({row["example_id"] for row in rows})
    assert 0 <= n - len(confirmed) <= len(names)
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in training_rows(rows)[0])
    store.close()


def test_a_killed_server_loses_nothing(tmp_path):
    killed_half_way(tmp_path / "labels.db")


@pytest.mark.postgres
def test_a_killed_server_loses_nothing_on_postgresql(postgres):
    killed_half_way(postgres())


@pytest.mark.postgres
def test_both_databases_behave_alike(postgres, tmp_path):
    """The same session on both: the same sides, pairs, receipts and rows."""

    def session(database):
        clock = iter(range(1000, 100_000))
        store = fill(database, pairs(30), overlap_share=0.5, clock=lambda: float(next(clock)))
        people = [store.labeler_of(store.add_labeler(name)) for name in ("ana", "ben")]
        seen = []
        for round_number in range(12):
            for person in people:
                task = store.next_task(person)
                store.submit(person, task.presentation_id, "ab"[(round_number + person) % 2], confidence=4)
                seen.append((task.prompt, task.left, task.right, task.done, task.total))
            if round_number % 4 == 3:
                store.undo(people[0])
        rows, counts = store.preferences(), store.counts()
        store.close()
        return seen, rows, counts

    assert session(postgres()) == session(tmp_path / "labels.db")


@pytest.mark.postgres
def test_postgresql_of_another_version_or_gone_is_one_line(postgres):
    from sqlalchemy import create_engine, text

    url = postgres()
    fill(url, pairs(3)).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE schema_info SET version = 99"))
    engine.dispose()
    with pytest.raises(LabsError, match="schema version 99, this program wants 1"):
        LabelStore(url)
    with pytest.raises(LabsError, match="cannot use the database .*(does not exist|failed)"):
        LabelStore(url.replace("/labels_", "/nothing_"))
    output = label("stats", "--database", "postgresql+psycopg://ana:hush-hush@127.0.0.1:9/labels", expect=1)
    assert output.startswith("error: cannot use the database") and output.count("\n") == 1 and "hush-hush" not in output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_server_stops_cleanly(tmp_path, how):
    store = fill(tmp_path / "labels.db", pairs(5))
    store.close()
    with Server(tmp_path / "labels.db") as server:
        client = server.client()
        client.answer(client.task(), "a")  # the connection stays open meanwhile
        assert server.stop(how) == 0
        assert "Traceback" not in server.printed and "stopped" in server.printed


def test_who_has_no_token_gets_nothing(tmp_path):
    fill(tmp_path / "labels.db", pairs(5)).close()
    with Server(tmp_path / "labels.db") as server:
        paths = [("GET", "/api/task"), ("GET", "/api/progress"), ("POST", "/api/undo"), ("POST", "/api/preference")]
        paths += [("GET", "/label/config"), ("GET", "/label/gradio_api/info"), ("GET", "/openapi.json")]
        for token in (None, "", "wrong", server.tokens["ana"] + "x", server.tokens["ana"][:-1]):
            for method, path in paths:
                assert Client(server.url, token).call(method, path, {} if method == "POST" else None)[0] == 401
        assert Client(server.url).call("GET", "/health") == (200, {"status": "ok"})
        assert server.client().call("GET", "/api/progress") == (200, {"done": 0, "total": 5})
