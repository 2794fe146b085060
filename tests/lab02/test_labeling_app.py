"""The labelling server's doors and manners, in this process: who gets in, what goes out, and what a wrong request gets."""

import json
import re
import socket
import threading
from dataclasses import fields

import pytest

pytest.importorskip("gradio", reason="the extra `label` is not installed: pip install -c constraints.txt -e '.[label]'")
from fastapi.testclient import TestClient

import labeling_app
from label_schema import DatabaseUnavailable
from label_store import LabelStore, Task
from labeling_app import COOKIE, LONGEST_BODY, create_app, serve
from shared import LabsError

EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
# What must never leave the server, each findable wherever it turns up.
SECRETS = ("secret-model-one", "secret-model-two", "secret-source")


def rows(n, **more):
    models = {"model_a": SECRETS[0], "model_b": SECRETS[1], "source": SECRETS[2]}
    return [
        {"prompt": f"Question {i}? {EVIL}", "response_a": f"first {i} {EVIL}", "response_b": f"second {i}"}
        | models
        | more
        for i in range(n)
    ]


class Current:
    """Stands for the store of the test that runs, so that the app is built once: Gradio takes seconds for it."""

    store = None

    def __getattr__(self, name):
        return lambda *arguments: getattr(self.store, name)(*arguments)


@pytest.fixture(scope="module")
def current():
    return Current()


@pytest.fixture(scope="module")
def app(current):
    return create_app(current)


@pytest.fixture
def store(tmp_path, current):
    current.store = LabelStore(str(tmp_path / "labels.db"), create=True, overlap_share=0, check_share=0)
    yield current.store
    current.store.close()


def pressed(row):
    """The button behind a row of `preferences()`, which speaks of the answers and not of the sides."""
    if row["preferred"] not in ("a", "b"):
        return row["preferred"]
    return "a" if row["preferred"] == row["left_was"] else "b"


class Browser:
    """Somebody logged in by cookie, as the page is; `press` does what the page does when a button is pressed."""

    def __init__(self, app, token):
        self.client = TestClient(app, base_url="http://127.0.0.1")
        self.client.__enter__()
        assert self.client.post("/login", data={"token": token}).status_code == 200  # after the redirect
        config = self.client.get("/label/config").json()
        self.names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {}
        for event in config["dependencies"]:
            if event["backend_fn"]:
                target, kind = event["targets"][0]
                self.events[self.names.get(target) or kind] = event
        self.shows = {"confidence": 3, "reasoning": ""}
        self.press("load")

    def press(self, button, **changed):
        """Press a button, with some boxes changed; `shows` is then what the page shows, by the boxes' names."""
        event, values = self.events[button], {**self.shows, **changed}
        data = [values[self.names[part]] for part in event["inputs"]]
        body = {"fn_index": event["id"], "data": data, "session_hash": "s"}
        answer = self.client.post("/label/gradio_api/run/predict", json=body)
        assert answer.status_code == 200, answer.text
        for part, value in zip(event["outputs"], answer.json()["data"], strict=True):
            if not isinstance(value, dict):  # a dict is an update of something else than the value, or of nothing
                self.shows[self.names[part]] = value
        return self.shows


@pytest.fixture
def log_in(app, store):
    opened = []

    def enter(name):
        opened.append(Browser(app, store.add_labeler(name)))
        return opened[-1]

    yield enter
    for browser in opened:
        browser.client.close()


@pytest.fixture
def api(app, store):
    """api("ana") → a client that sends ana's token."""

    def enter(name):
        headers = {"Authorization": f"Bearer {store.add_labeler(name)}"}
        return TestClient(app, headers=headers, base_url="http://127.0.0.1")

    return enter


def addresses(app):
    """Every (method, path) that the server knows, Gradio's included; parameters are filled with an x."""
    found = set()
    for route in app.routes:
        inner = getattr(getattr(route, "app", None), "routes", None)
        if inner:
            found |= {(method, route.path + path) for method, path in addresses(route.app)}
        else:
            path = re.sub(r"{[^}]*}", "x", route.path)
            found |= {(method, path) for method in getattr(route, "methods", None) or {"GET"}}
    return found


# ------------------------------------------------------------------------------------------------------------ the door


def test_nobody_gets_anything_without_a_token(app, store):
    store.add_examples(rows(3))
    token = store.add_labeler("ana")
    known = addresses(app)
    assert len(known) > 60 and ("POST", "/label/gradio_api/run/x") in known and ("GET", "/api/task") in known
    known |= {("GET", "/label/config/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/")}
    wrong = [
        {},
        {"headers": {"Authorization": f"Bearer {token}x"}},
        {"headers": {"Authorization": f"Basic {token}"}},
        {"headers": {"Authorization": token}},
        {"headers": {"Cookie": f"{COOKIE}={token[:-1]}"}},
        {"headers": {"Cookie": f"{COOKIE}"}},
        {"headers": {"Cookie": f"other={token}"}},
    ]
    client = TestClient(app, follow_redirects=False)
    for method, path in known - {(m, p) for m, p in known if p in ("/login", "/health")}:
        for attempt in wrong if path.startswith("/api/") or path == "/label/" else wrong[:2]:
            answer = client.request(method, path, **attempt)
            if path in ("/", "/label", "/label/") and method in ("GET", "HEAD"):
                assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
            else:
                assert answer.status_code == 401, (method, path, attempt)
                assert answer.headers["www-authenticate"] == "Bearer"
            assert "Question" not in answer.text
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/label/").headers["location"] == "/login"
    assert store.counts()["presentations"] == 0


def test_a_token_opens_the_page_by_a_cookie_that_scripts_and_other_sites_cannot_use(app, store):
    token = store.add_labeler("ana")
    client = TestClient(app, follow_redirects=False, base_url="http://127.0.0.1")
    assert 'type="password"' in client.get("/login").text
    entered = client.post("/login", data={"token": f" {token}\n"})  # as it is copied from a terminal
    assert (entered.status_code, entered.headers["location"]) == (303, "/label/")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert (
        "Secure" not in cookie
        and "Secure"
        in TestClient(app, base_url="https://x", follow_redirects=False)
        .post("/login", json={"token": token})
        .headers["set-cookie"]
    )
    assert client.get("/label/").status_code == 200 and client.get("/api/task").status_code == 200
    assert client.get("/").headers["location"] == "/label/"
    assert client.get("/logout").headers["location"] == "/login"
    assert client.get("/label/").status_code == 303 and client.get("/api/task").status_code == 401


@pytest.mark.parametrize(
    "body", [b"", b"token=wrong", b"token=%FF%00", b"token=a&token=b", b"\xff\xfe", b"token=" + b"x" * 900]
)
def test_a_wrong_login_is_told_so_and_gets_no_cookie(app, store, body):
    for kind in ("application/x-www-form-urlencoded", "application/json", "multipart/form-data; boundary=x", "x"):
        answer = TestClient(app).post("/login", content=body, headers={"content-type": kind})
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
        assert "not known" in answer.text


@pytest.mark.parametrize("posted", [None, [], 3, {}, {"token": None}, {"token": 3}, {"token": "ü\r\nSet-Cookie: a=b"}])
def test_a_wrong_login_in_json(app, store, posted):
    answer = TestClient(app).post("/login", json=posted)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers


def test_a_new_token_ends_the_old_one(app, store):
    old = {"Authorization": f"Bearer {store.add_labeler('ana')}"}
    client = TestClient(app)
    assert client.get("/api/progress", headers=old).status_code == 200
    new = {"Authorization": f"Bearer {store.add_labeler('ana')}"}
    assert client.get("/api/progress", headers=old).status_code == 401
    assert client.get("/api/progress", headers=new).status_code == 200


def test_gradio_offers_nothing_that_the_page_does_not_need(app, api):
    client = api("ana")
    for path in ("upload", "file=/etc/passwd", "proxy=http://example.org/", "queue/join", "vibe-edit", "info", "runs"):
        for method in ("GET", "POST"):
            assert client.request(method, f"/label/gradio_api/{path}").status_code == 404, path


# ------------------------------------------------------------------------------------------------------------- the API


def test_labelling_to_the_end_by_the_api(store, api):
    store.add_examples(rows(3))
    client = api("ana")
    assert client.get("/api/progress").json() == {"done": 0, "total": 3}
    for number, choice in enumerate(("a", "tie", "both_bad")):
        task = client.get("/api/task").json()
        assert set(task) == {field.name for field in fields(Task)}
        assert (task["done"], task["total"]) == (number, 3)
        assert client.get("/api/task").json() == task  # a reload shows the same pair on the same sides
        answer = {
            "presentation_id": task["presentation_id"],
            "choice": choice,
            "confidence": number + 1,
            "reasoning": "why",
        }
        receipt = client.post("/api/preference", json=answer)
        assert receipt.status_code == 200
        again = client.post("/api/preference", json=answer)
        assert again.status_code == 200 and again.json()["seconds"] == receipt.json()["seconds"]
        assert client.post("/api/preference", json=answer | {"choice": "b"}).status_code == 409
    assert client.get("/api/task").json() == {"finished": True, "waiting": False, "done": 3, "total": 3}
    stored = store.preferences()
    assert [row["confidence"] for row in sorted(stored, key=lambda row: row["confidence"])] == [1, 2, 3]
    assert {row["preferred"] for row in stored} >= {"tie", "both_bad"} and len(stored) == 3
    assert {row["reasoning"] for row in stored} == {"why"}


def test_who_waits_for_others_is_told_so(store, api):
    store.add_examples(rows(1))
    ana, ben = api("ana"), api("ben")
    assert "prompt" in ana.get("/api/task").json()
    assert ben.get("/api/task").json() == {"finished": True, "waiting": True, "done": 0, "total": 1}


def test_undo_by_the_api(store, api):
    store.add_examples(rows(2))
    client = api("ana")
    assert client.post("/api/undo").json() == {"nothing_to_undo": True}
    first = client.get("/api/task").json()
    client.post("/api/preference", json={"presentation_id": first["presentation_id"], "choice": "a"})
    client.get("/api/task")
    assert client.post("/api/undo").json() == first  # the same pair on the same sides
    client.post("/api/preference", json={"presentation_id": first["presentation_id"], "choice": "b"})
    assert [pressed(row) for row in store.preferences()] == ["b"]
    assert store.counts()["superseded"] == 1


def test_time_is_measured_by_the_server(store, api):
    moment = [100.0]
    store.clock = lambda: moment[0]
    store.add_examples(rows(1))
    client = api("ana")
    task = client.get("/api/task").json()
    moment[0] += 12.5
    answer = {"presentation_id": task["presentation_id"], "choice": "a"}
    assert client.post("/api/preference", json=answer | {"seconds": 0.1}).status_code == 422
    assert client.post("/api/preference", json=answer).json()["seconds"] == 12.5


GOOD = {"presentation_id": "x", "choice": "a", "confidence": 3, "reasoning": ""}
BAD = [
    *[json.dumps(value) for value in (None, [], "a", 3, {}, {"choice": "a"}, GOOD | {"left": "a"}, GOOD | {"left_is": "a"})],
    *[json.dumps(GOOD | {"choice": value}) for value in (None, 1, ["a"], {}, True)],
    *[json.dumps(GOOD | {"confidence": value}) for value in (None, "3", 3.5, True, [], float("nan"), float("inf"))],
    *[json.dumps(GOOD | {"reasoning": value}) for value in (None, 1, {"a": 1})],
    *[json.dumps(GOOD | {"presentation_id": value}) for value in (None, 1, ["x"])],
    json.dumps(GOOD | {"\ud800": "\ud800"}), json.dumps(GOOD | {"reasoning": "\ud800"}), "{", "", "\0", "[" * 50_000,
    '{"confidence": ' + "9" * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=lambda body: body[:60])
def test_a_bad_body_gets_one_line_and_changes_nothing(store, api, body):
    store.add_examples(rows(1))
    client = api("ana")
    client.get("/api/task")
    answer = client.post("/api/preference", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert isinstance(answer.json()["detail"], str) and "\n" not in answer.json()["detail"]
    assert "Traceback" not in answer.text
    assert store.counts()["live"] == 0


@pytest.mark.parametrize("bad", [{"choice": "left"}, {"choice": "A"}, {"confidence": 0}, {"confidence": 6},
    {"confidence": 10**30}, {"reasoning": "x" * 20_000}, {"reasoning": "a\0b"}])  # fmt: skip
def test_a_value_out_of_range_gets_422_and_changes_nothing(store, api, bad):
    store.add_examples(rows(1))
    client = api("ana")
    task = client.get("/api/task").json()
    answer = {"presentation_id": task["presentation_id"], "choice": "a"} | bad
    assert client.post("/api/preference", json=answer).status_code == 422
    assert store.counts()["live"] == 0


@pytest.mark.parametrize("name", ["", "nothing", "0" * 32, "' OR 1=1 --", "\0", "é" * 40])
def test_an_unknown_pair_gets_404(store, api, name):
    store.add_examples(rows(1))
    answer = api("ana").post("/api/preference", json=GOOD | {"presentation_id": name})
    assert answer.status_code == 404, answer.text


def test_nobody_answers_for_somebody_else(store, api):
    store.add_examples(rows(2))
    ana, ben = api("ana"), api("ben")
    task = ana.get("/api/task").json()
    assert ben.post("/api/preference", json=GOOD | {"presentation_id": task["presentation_id"]}).status_code == 404
    assert store.counts()["live"] == 0


def test_a_request_has_a_bounded_length(app, api):
    client, stranger = api("ana"), TestClient(app)
    long = b"x" * (LONGEST_BODY + 1)
    parts = (b"x" * 1000 for _ in range(LONGEST_BODY // 1000 + 1))  # a body whose length is not announced
    for content in (long, parts):
        assert client.post("/api/preference", content=content).status_code == 413
    assert stranger.post("/login", content=long).status_code == 413
    assert stranger.post("/api/preference", content=long).status_code == 401


def test_a_database_that_is_gone_is_no_crash(store, api, monkeypatch):
    client = api("ana")

    def gone(*_):
        raise DatabaseUnavailable("cannot use the database; start the server")

    monkeypatch.setattr(store, "progress", gone)
    answer = client.get("/api/progress")
    assert answer.status_code == 503 and "start the server" in answer.json()["detail"]
    guarded = create_app(type("Gone", (), {"labeler_of": staticmethod(gone)})())
    assert TestClient(guarded).get("/api/progress", headers={"Authorization": "Bearer x"}).status_code == 503


def test_a_double_click_makes_one_row(store, api):
    """The same answer from several threads at the same moment, again and again."""
    store.add_examples(rows(10))
    client = api("ana")
    for _ in range(10):
        answer = {"presentation_id": client.get("/api/task").json()["presentation_id"], "choice": "b"}
        codes, start = [], threading.Barrier(4)

        def post(answer=answer, codes=codes, start=start):
            start.wait()
            codes.append(client.post("/api/preference", json=answer).status_code)

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [200] * 4
    assert store.counts()["live"] == 10 == len(store.preferences())


# ------------------------------------------------------------------------------------------------- what goes out


def test_no_model_name_and_no_known_answer_leaves_the_server(app, store, api, log_in):
    store.check_share = 0.5
    store.add_examples(rows(8))
    store.add_examples([row | {"prompt": f"check {row['prompt']}", "gold": "a"} for row in rows(3)])
    client, browser = api("ana"), log_in("ben")
    sent = []
    for method, path in sorted(addresses(app)):
        if method == "GET" and "heartbeat" not in path:  # that one never ends
            answer = client.get(path, follow_redirects=False)
            sent.append(f"{answer.headers} {answer.text}")
    client = api("ana")  # one of those addresses was /logout
    for choice in ("a", "b", "tie", "skip"):
        task = client.get("/api/task")
        answer = {"presentation_id": task.json()["presentation_id"], "choice": choice}
        calls = [client.post("/api/preference", json=answer) for _ in range(2)]
        calls += [client.post("/api/preference", json=answer | {"choice": "both_bad"}), client.post("/api/undo")]
        calls += [client.post("/api/preference", json=answer), client.get("/api/progress"), task]
        sent += [call.text for call in calls]
    for button in ("choice_a", "undo", "choice_b", "choice_skip"):
        sent.append(json.dumps(browser.press(button)))
    together = "\n".join(sent)
    assert "Question 0?" in together and "check Question" in together  # there was something to find
    assert not [secret for secret in SECRETS if secret in together]
    assert not re.search(
        r"gold|left_is|model_a|response_a", "\n".join(re.sub(r"<[^>]*>", "", text) for text in sent[-40:])
    )


def test_the_page_needs_nothing_from_the_network(app, api):
    client = api("ana")
    for path in ("/login", "/label/", "/label/theme.css"):
        text = client.get(path).text
        assert len(text) > 500
        loads = re.findall(
            r"(?:src|href|action)\s*=\s*[\"']?(https?:|//)[^\"' >]*|url\(\s*[\"']?(https?:|//)|@import", text
        )
        assert not [load for load in loads if load != "http://127.0.0.1"], path
        assert not re.search(r"fonts\.g|googletagmanager|cdnjs|jsdelivr|unpkg", text), path
    config = client.get("/label/config").json()
    assert config["analytics_enabled"] is False
    assert "stylesheets" not in config or not [sheet for sheet in config["stylesheets"] if sheet.startswith("http")]


def test_every_answer_forbids_the_browser_to_load_from_elsewhere(app, api):
    for client in (api("ana"), TestClient(app)):
        for path in ("/login", "/health", "/api/task", "/label/", "/nothing"):
            headers = client.get(path, follow_redirects=False).headers
            assert headers["content-security-policy"].startswith("default-src 'self'")
            assert "http" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


# -------------------------------------------------------------------------------------------------------- the page


def test_foreign_text_stands_only_in_text_boxes(app, store, api):
    store.add_examples(rows(2))
    config = api("ana").get("/label/config").json()
    kinds = {part["props"].get("elem_id"): part["type"] for part in config["components"]}
    assert {kinds[name] for name in ("shown", "prompt", "left", "right", "reasoning")} == {"textbox"}
    assert not set(kinds.values()) & {"markdown", "chatbot"}


def test_the_page_labels_undoes_and_ends(store, log_in):
    store.add_examples(rows(3))
    page = log_in("ana")
    assert EVIL in page.shows["prompt"] and "0 of 3" in page.shows["progress"]
    first = dict(page.shows)
    page.press("choice_a", confidence=5, reasoning="clear")
    assert "1 of 3" in page.shows["progress"] and page.shows["shown"] != first["shown"]
    assert (page.shows["confidence"], page.shows["reasoning"]) == (3, "")  # nothing is carried to the next pair
    page.press("undo")
    assert {name: page.shows[name] for name in ("shown", "left", "right")} == {
        name: first[name] for name in ("shown", "left", "right")
    }
    for button in ("choice_b", "choice_both_bad", "choice_skip"):
        page.press(button)
    assert "3 of 3" in page.shows["progress"] and "All done" in page.shows["message"]
    assert page.shows["prompt"] == page.shows["left"] == page.shows["right"] == page.shows["shown"] == ""
    assert [pressed(row) for row in store.preferences()] == ["b", "both_bad", "skip"]
    page.press("choice_a")  # a key pressed at the end does no harm
    assert store.counts()["live"] == 3


def test_a_button_pressed_twice_for_one_pair_stores_one_answer(store, log_in):
    store.add_examples(rows(3))
    page = log_in("ana")
    first = page.shows["shown"]
    page.press("choice_a")
    second = page.shows["shown"]
    page.press("choice_a", shown=first)  # the second click was sent before the first one's reply
    assert page.shows["shown"] == second and page.shows["message"] == ""
    page.press("choice_b", shown=first)
    assert "Not stored" in page.shows["message"] and page.shows["shown"] == second
    assert [pressed(row) for row in store.preferences()] == ["a"]


def test_two_labelers_pages_do_not_mix(store, log_in):
    store.add_examples(rows(8))
    ana, ben = log_in("ana"), log_in("ben")
    for _ in range(3):
        assert ana.shows["shown"] != ben.shows["shown"] and ana.shows["prompt"] != ben.shows["prompt"]
        ana.press("choice_a")
        ben.press("choice_b")
    stolen = ana.shows["shown"]
    ben.press("choice_b", shown=stolen)
    assert "Not stored" in ben.shows["message"]
    assert {(row["labeler"], pressed(row)) for row in store.preferences()} == {("ana", "a"), ("ben", "b")}
    assert store.counts()["live"] == 6
    ben.press("undo")
    assert sum(row["labeler"] == "ana" for row in store.preferences()) == 3


def test_a_message_of_the_page_is_text(store, log_in):
    store.add_examples(rows(1))
    page = log_in("ana")
    page.press("choice_a", shown=EVIL)
    assert "Not stored" in page.shows["message"] and "<script" not in page.shows["message"]
    assert "<img" not in page.shows["message"]


def test_what_a_labeler_wrote_stays_when_it_cannot_be_stored(store, log_in):
    store.add_examples(rows(1))
    page = log_in("ana")
    before, page.shows["reasoning"] = page.shows["shown"], "x" * 20_000
    page.press("choice_a")
    assert "Not stored" in page.shows["message"]
    assert page.shows["shown"] == before and page.shows["reasoning"] == "x" * 20_000
    assert store.counts()["live"] == 0


# --------------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def no_serving(monkeypatch):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)


def test_only_another_host_on_request_is_warned_about(store, no_serving, capsys):
    heard = []
    serve(store, port=0, announce=heard.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", heard[0]) and not capsys.readouterr().err
    serve(store, host="0.0.0.0", port=0, announce=heard.append)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: listening on 0.0.0.0") and warning.count("\n") == 1
    assert labeling_app.serve.__defaults__[0] == "127.0.0.1"


def test_an_address_that_cannot_be_used_is_one_line(store, no_serving):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabsError, match=f"cannot listen on 127.0.0.1, port {port} .*; choose another --port"):
            serve(store, port=port)
    for host, port in (("no-such-host.invalid", 0), ("127.0.0.1", 99999)):
        with pytest.raises(LabsError, match="cannot listen on"):
            serve(store, host=host, port=port)
