"""The labelling server as its users meet it: a process of its own, and one HTTP connection a labeler."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from urllib.parse import urlsplit

from label_store import LabelStore
from shared import REPO_ROOT

CLI = REPO_ROOT / "labs" / "02_preference_alignment" / "label_cli.py"
MODELS = ("model-of-the-left-bank", "model-of-the-right-bank")  # what must never reach a browser


def pairs(n, longer="a", start=0):
    """`n` pairs of which response_a or response_b is always the longer one."""
    rows = []
    for number in range(start, start + n):
        answers = f"A long answer, which goes on and on, to question {number}.", f"Short {number}."
        first, second = answers if longer == "a" else answers[::-1]
        rows.append({"prompt": f"Question {number}?", "response_a": first, "response_b": second})
        rows[-1].update(model_a=MODELS[0], model_b=MODELS[1], source="test")
    return rows


def label(*arguments, expect=0, **environment):
    """`labs label …` as a process; what it printed on both streams."""
    command = [sys.executable, str(CLI), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


class Server:
    """`labs label serve` on a free port. `tokens`: one for each of the names, made before it starts."""

    def __init__(self, database, names=("ana",), *arguments, tokens=None):
        self.database = str(database)
        if tokens is None:
            store = LabelStore(self.database)
            tokens = {name: store.add_labeler(name) for name in names}
            store.close()
        self.tokens = tokens
        command = [sys.executable, str(CLI), "serve", "--database", self.database, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            found = re.search(r"labelling page: (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        else:
            self.stop()
            raise AssertionError(f"the server did not start: {self.printed}")

    def client(self, name="ana"):
        return Client(self.url, self.tokens[name])

    def stop(self, how=signal.SIGTERM):
        """End it with a signal; its exit code. What it still printed is added to `printed`."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.printed += self.process.communicate(timeout=30)[0] or ""
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGKILL)


class Client:
    """One labeler's connection, kept open. A call returns (status, JSON)."""

    def __init__(self, url, token=None):
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, method, path, body=None):
        headers = {**self.headers, **({"Content-Type": "application/json"} if body is not None else {})}
        self.connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")

    def task(self):
        status, task = self.call("GET", "/api/task")
        assert status == 200, task
        return task

    def answer(self, task, choice, **more):
        return self.call(
            "POST", "/api/preference", {"presentation_id": task["presentation_id"], "choice": choice, **more}
        )


def longer_side(task):
    """The rule by which a test's labelers judge: it is about texts, so turned sides would show."""
    return "a" if len(task["left"]) > len(task["right"]) else "b"
