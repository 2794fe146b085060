"""The labelling page as a person uses it, in a real browser: log in, read, press keys, take back."""

import json
import time

import pytest
from label_server import MODELS, Server, pairs

from label_store import LabelStore

pytestmark = pytest.mark.browser
EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
SHOWN = """const value = (id) => document.querySelector(`#${id} textarea`)?.value ?? "";
return {ready: document.body.dataset.labels === "ready", pair: value("shown"), prompt: value("prompt"),
        left: value("left"), right: value("right"), reasoning: value("reasoning"), page: document.body.innerText}"""
PAUSE = 0.4  # seconds; a little longer than the page ignores keys after a new pair


class Page:
    """What is on the screen, and the keyboard."""

    def __init__(self, driver):
        self.driver = driver

    def wait(self, condition, what, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = self.driver.execute_script(SHOWN)
            if condition(shown):
                return shown
            time.sleep(0.05)
        raise AssertionError(f"{what}; the page shows {shown}")

    def pair(self, but=""):
        """The pair on the screen, once it is another than `but` and keys are taken."""
        shown = self.wait(lambda shown: shown["ready"] and shown["pair"] not in ("", but), "no new pair came")
        time.sleep(PAUSE)
        return shown

    def press(self, keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(keys).perform()

    def log_in(self, server, name="ana"):
        self.driver.delete_all_cookies()
        self.driver.get(f"{server.url}/login#{server.tokens[name]}")
        return self.pair()


@pytest.fixture
def page(browser):
    return Page(browser)


@pytest.fixture
def server(tmp_path):
    rows = pairs(14)
    rows[3] |= {"prompt": f"Evil? {EVIL}", "response_a": EVIL, "response_b": f"<b>bold</b> & {EVIL}"}
    rows[12] |= {"gold": "a"}
    store = LabelStore(str(tmp_path / "labels.db"), create=True, overlap_share=0)
    store.add_examples(rows)
    with Server(tmp_path / "labels.db", ("ana", "ben"), "--check-share", "0") as running:
        running.store = store
        yield running
    store.close()


def test_ten_pairs_by_keyboard_and_one_taken_back(server, page, browser):
    shown = page.log_in(server)
    assert "#" not in browser.current_url and server.tokens["ana"] not in browser.page_source
    seen = {}
    for key, choice in zip("abtnsabtab", ("a", "b", "tie", "both_bad", "skip", "a", "b", "tie", "a", "b"), strict=True):
        sure = len(seen) % 5 + 1
        page.press(str(sure))
        page.press(key)
        seen[shown["prompt"]] = (shown, choice, sure)
        if EVIL in shown["prompt"]:  # text, as the model wrote it, and nothing that runs
            assert {shown["left"], shown["right"]} == {EVIL, f"<b>bold</b> & {EVIL}"}
            assert browser.execute_script("return window.pwned") is None
        shown = page.pair(but=shown["pair"])
    assert len(seen) == 10 and any(EVIL in prompt for prompt in seen)
    assert "10 of 13" in shown["page"]
    rows = {row["prompt"]: row for row in server.store.preferences()}
    assert rows.keys() == seen.keys()
    for prompt, (pair, choice, sure) in seen.items():
        row = rows[prompt]
        assert (row["confidence"], row["reasoning"]) == (sure, "")
        assert 0 < row["seconds"] < 60
        chosen = {"a": pair["left"], "b": pair["right"]}.get(choice)
        assert (row[f"response_{row['preferred']}"] == chosen) if chosen else row["preferred"] == choice

    before = shown
    page.press("u")
    again = page.pair(but=before["pair"])
    last = list(seen.values())[-1][0]
    assert [again[name] for name in ("pair", "left", "right")] == [last[name] for name in ("pair", "left", "right")]
    assert "9 of 13" in again["page"]
    assert server.store.counts() | {"live": 9, "superseded": 1} == server.store.counts()
    page.press("t")
    page.pair(but=again["pair"])
    assert {row["prompt"]: row["preferred"] for row in server.store.preferences()}[last["prompt"]] == "tie"

    # The detection works: this is what the page would do if it put a model's text in as HTML.
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", EVIL)
    end = time.monotonic() + 10
    while browser.execute_script("return window.pwned") is None and time.monotonic() < end:
        time.sleep(0.05)
    assert browser.execute_script("return window.pwned") == 1


def test_letters_in_a_reason_are_letters(server, page, browser):
    shown = page.log_in(server)
    box = browser.find_element("css selector", "#reasoning textarea")
    box.send_keys("about 5 nuns sat by <b>")
    time.sleep(PAUSE)
    assert server.store.counts()["live"] == 0
    box.send_keys("\ue00c")  # Escape
    page.press("b")
    page.pair(but=shown["pair"])
    [row] = server.store.preferences()
    assert row["reasoning"] == "about 5 nuns sat by <b>" and row["confidence"] == 3
    assert row[f"response_{row['preferred']}"] == shown["right"]


def test_a_key_held_down_answers_one_pair(server, page, browser):
    shown = page.log_in(server)
    page.press("aaaaa")
    page.pair(but=shown["pair"])
    assert server.store.counts()["live"] == 1


def test_another_labeler_another_pair_and_the_end(server, page, browser):
    shown = page.log_in(server, "ben")
    for _ in range(13):
        page.press("a")
        last, shown = shown, page.wait(lambda now, old=shown["pair"]: now["ready"] and now["pair"] != old, "stuck")
        time.sleep(PAUSE)
    assert shown["pair"] == "" and "13 of 13" in shown["page"] and "thank you" in shown["page"].lower()
    page.press("u")
    again = page.pair()
    assert again["pair"] == last["pair"]


def test_an_open_page_goes_on_after_a_restart(server, page, browser, tmp_path):
    shown = page.log_in(server)
    port = server.url.rsplit(":", 1)[1]
    assert server.stop() == 0
    with Server(tmp_path / "labels.db", (), "--port", port, tokens=server.tokens):
        page.press("a")
        time.sleep(1)
        page.pair(but=shown["pair"])
    assert server.store.counts()["live"] == 1


def test_the_page_loads_from_its_server_alone_and_learns_no_names(server, page, browser):
    browser.get_log("performance")  # forget what was before
    shown = page.log_in(server)
    page.press("a")
    page.pair(but=shown["pair"])
    requests, bodies = [], []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append((message["params"]["requestId"], message["params"]["request"]["url"]))
    foreign = [url for _, url in requests if not url.startswith((server.url, "data:", "blob:", "chrome"))]
    assert not foreign
    for number, url in requests:
        if url.startswith(server.url):
            try:
                bodies.append(browser.execute_cdp_cmd("Network.getResponseBody", {"requestId": number})["body"])
            except Exception:  # an answer without a body, as a redirect
                continue
    everything = "\n".join(bodies)
    assert shown["left"] in everything  # the pair was among them
    assert not [name for name in (*MODELS, '"gold"', '"left_is"', server.tokens["ana"]) if name in everything]
