"""A vLLM server as a process: started, waited for, explained when it dies, stopped with all that it started.

vLLM is at least three processes (the HTTP server, the engine, a worker for each GPU). They are put into a process group of
their own, so that stopping means: ask the first one, and after a while end whatever is left of the group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx

from shared import REPO_ROOT, LabsError
from shared.profiles import runs_root
from shared.training import atomic_write_text, watched
from vllm_client import Client
from vllm_settings import Plan, Settings, plan

# "(EngineCore pid=12) ERROR 11-21 18:40:05 [core.py:1178] " before a line of the log.
_PREFIX = re.compile(r"^(?:\([\w -]+ pid=\d+\)\s*)?(?:(?:INFO|WARNING|ERROR|DEBUG) [\d-]+ [\d:]+ \[[\w.]+:\d+\]\s?)?")
_ERROR = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?\w*(?:Error|Exception|Interrupt|Exit): \S|^\S*error: \S")
# What follows from another error, further up.
_FOLLOWS = ("Engine core initialization failed", "WorkerProc initialization failed", "Failed core proc", "cancelled")
_STAGES = (
    ("Application startup", "answering"),
    ("KV cache size", "memory set aside"),
    ("Loading weights took", "weights loaded"),
    ("Initializing a V1 LLM engine", "engine started"),
    ("Starting vLLM server", "nearly there"),
    ("non-default args", "settings read"),
)
# Ends the server's group when the launcher is gone, however it went, even while the server still starts: then its standard
# input ends, of which the launcher holds the other end.
_WATCH = """
import os, signal, sys, time
sys.stdin.buffer.read()
for how, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):
    try:
        os.killpg(int(sys.argv[1]), how)
    except ProcessLookupError:
        break
    time.sleep(seconds)
"""


def free_port(host: str) -> int:
    """A port on which nobody listens now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises LabsError when the server could not listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LabsError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what runs there, choose another --port, or "
                "--port 0 for any free one"
            ) from None


def group_members(group: int) -> list[int]:
    """The ids of the living processes of a process group; on a system without /proc the leader stands for all."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        return [group]
    members = []
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":  # a zombie is only waiting to be counted
                members.append(int(stat.parent.name))
    return members


def cause_of(log: str) -> str:
    """Why the server died, from its log: the first error that does not follow from another, else the last lines."""
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    errors = [line for line in lines if _ERROR.match(line) and not any(words in line for words in _FOLLOWS)]
    if errors:
        return errors[0][:600]
    said = [line for line in lines if line.strip() and not line.startswith(("INFO:", "  warnings.warn"))]
    return " | ".join(said[-3:])[:600] or "it said nothing"


class Server:
    """A running vLLM. `url`, `key` and `client()` lead to it; `stop()` ends it and leaves no process."""

    def __init__(self, plan: Plan, log: Path):
        self.plan = plan
        self.log = log
        self.key = plan.key
        settings = plan.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        self.url = f"http://{host}:{settings.port}"
        environment = {**os.environ, **plan.environment, **plan.secret}
        environment.pop(settings.key_env, None)
        with log.open("wb") as output:
            # A session of its own is a process group of its own, which Ctrl-C in this terminal does not reach.
            self.process = subprocess.Popen(
                plan.command, env=environment, cwd=REPO_ROOT, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.group = self.process.pid
        self.watch = subprocess.Popen(
            [sys.executable, "-c", _WATCH, str(self.group)], stdin=subprocess.PIPE, start_new_session=True
        )
        self.seconds_to_start: float | None = None

    def client(self, **options) -> Client:
        return Client(self.url, self.key, **options)

    def members(self) -> list[int]:
        """Ids of the server's processes."""
        return group_members(self.group)

    def wait_until_healthy(self, timeout_s: float, on_progress: Callable[[float, str], None] | None = None) -> float:
        """Wait for the first answer; return the seconds it took. Raises LabsError with the cause when it dies or hangs."""
        start = time.monotonic()
        while True:
            elapsed = time.monotonic() - start
            if self.process.poll() is not None:
                raise LabsError(f"the server {self._ended()}: {cause_of(self._log_text())} (its log: {self.log})")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    self.seconds_to_start = elapsed
                    return elapsed
            if elapsed > timeout_s:
                raise LabsError(
                    f"the server did not answer within {timeout_s:.0f} s: {cause_of(self._log_text())} (its log: {self.log}); "
                    "a larger model needs a higher start_timeout_s"
                )
            if on_progress:
                on_progress(elapsed, next((name for mark, name in _STAGES if mark in self._log_text()), "starting"))
            time.sleep(0.3)

    def _ended(self) -> str:
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return "was killed by the system, most likely for want of memory"
        return f"died (exit code {code})"

    def _log_text(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def stop(self, timeout_s: float = 20) -> None:
        """End all processes of the server: first politely, after `timeout_s` seconds by force. May be called twice."""
        if self.process.poll() is None:
            self.process.terminate()
        elif self.members():  # orphans: nobody is left who would end them
            timeout_s = min(timeout_s, 2)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.members() and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            if self.members():
                os.killpg(self.group, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 10
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.watch.kill()
        self.watch.communicate()


class _ProgressLine:
    """One line that counts the seconds where somebody watches; in a log, a line for each new stage."""

    def __init__(self):
        self.stage = ""

    def __call__(self, elapsed: float, stage: str) -> None:
        if watched():
            print(f"\rvLLM is starting: {elapsed:3.0f} s, {stage:<20}", end="", file=sys.stderr, flush=True)
        elif stage != self.stage:
            print(f"vLLM is starting: {elapsed:.0f} s, {stage}", file=sys.stderr, flush=True)
        self.stage = stage

    def end(self) -> None:
        if watched() and self.stage:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def serve(settings: Settings | Plan, log: str | Path | None = None, quiet: bool = False) -> Iterator[Server]:
    """A server for the length of a `with` block:

        with serve(load_settings("cpu", ["port=0"])) as server:
            server.client().chat("weather", "How warm is it in Lima?")

    log: where vLLM's own output goes (default: a new file in the system's folder for temporary files, which is removed unless
    the server fails). Raises LabsError with the cause when it does not start. However the block ends, no process is left.
    """
    chosen = settings if isinstance(settings, Plan) else plan(settings)
    if chosen.settings.port == 0:
        chosen = with_port(chosen, free_port(chosen.settings.host))
    check_port(chosen.settings.host, chosen.settings.port)
    temporary = None
    if log is None:
        handle, temporary = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        os.close(handle)
    progress = _ProgressLine()
    server = Server(chosen, Path(temporary or log))
    try:
        server.wait_until_healthy(chosen.settings.start_timeout_s, None if quiet else progress)
        progress.end()
        yield server
    except BaseException as error:
        if isinstance(error, LabsError):
            temporary = None  # it names the log
        raise
    finally:
        progress.end()
        server.stop()
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def with_port(chosen: Plan, port: int) -> Plan:
    """The same plan on another port."""
    command = list(chosen.command)
    command[command.index("--port") + 1] = str(port)
    return replace(chosen, settings=replace(chosen.settings, port=port), command=command)


# ------------------------------------------------------------------------- how the other commands find a running server


def state_folder() -> Path:
    return runs_root() / "serving"


def remember(server: Server) -> Path:
    """Write where the server is, and its key, into a file that only this user can read."""
    path = state_folder() / f"{server.plan.settings.port}.json"
    state = {"url": server.url, "key": server.key, "pid": server.process.pid}
    previous = os.umask(0o077)
    try:
        atomic_write_text(path, json.dumps(state))
        os.chmod(path, 0o600)
    finally:
        os.umask(previous)
    return path


def find_server(url: str | None, key: str | None) -> tuple[str, str | None]:
    """(URL, key) of the server that is meant: the one named, else the one that runs here.

    Raises LabsError where none runs here, or several and none is named.
    """
    states = {}
    for path in sorted(state_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            if group_members(int(state["pid"])):
                states[state["url"]] = state["key"]
    if url is not None:
        return url, key or states.get(url.rstrip("/"))
    if not states:
        raise LabsError("no server runs here: start one with `vllm_multi_lora.py serve`, or name it with --url")
    if len(states) > 1:
        raise LabsError(f"several servers run here: choose one with --url: {', '.join(states)}")
    ((url, known),) = states.items()
    return url, key or known
