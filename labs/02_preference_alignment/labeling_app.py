"""Collecting human preferences: a page and an API on one FastAPI server, for one or many labelers at once.

Every labeler has a token (`labs label token NAME`). The API takes it as `Authorization: Bearer TOKEN`; the page asks for it
once and keeps it in a cookie that scripts cannot read and other sites cannot send. Nothing but the login page and /health
answers without it. The server decides who sees which pair on which side and measures the time; names of models and known
answers stay in the database (label_store.py).

    labs label import pairs.jsonl && labs label token ana && labs label serve
"""

from __future__ import annotations

import html
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from http.cookies import CookieError, SimpleCookie
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from label_schema import DatabaseUnavailable
from label_store import Conflict, LabelStore, UnknownPresentation
from shared import LabsError

COOKIE = "labs_label_token"
LONGEST_BODY = 100_000  # bytes of a request; a reason has at most 10,000 characters
PUBLIC = {"/login", "/health"}
PAGES = {"/", "/label", "/label/"}
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
# Gradio can take uploads, hand out files and fetch other sites. This page needs none of it.
GRADIO_API = "/label/gradio_api/"
GRADIO_NEEDS = ("run/", "heartbeat/", "startup-events")
# A second fence behind escaping and local fonts: the browser loads from this server alone, whatever a text contains.
HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'self'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# The token of a login link stands behind #, which browsers do not send: no log has it. The script hands it in.
LOGIN_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Log in</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 26rem; margin: 15vh auto; padding: 0 1rem; }}
input, button {{ font: inherit; padding: 0.5rem; width: 100%; box-sizing: border-box; margin-top: 0.5rem; }}
p.error {{ color: #b00020; font-weight: 600; }}
</style></head><body><h1>Labelling</h1>{error}<form method="post" action="/login"><label for="token">Your token</label>
<input id="token" name="token" type="password" autocomplete="off" autofocus required><button>Log in</button></form>
<p>You got it from the person who runs this server (<code>labs label token NAME</code> makes one).</p>
<script>
const token = decodeURIComponent(location.hash.slice(1));
if (token) {{
  history.replaceState(null, "", location.pathname);
  document.getElementById("token").value = token;
  document.querySelector("form").submit();
}}
</script></body></html>"""


class Answer(BaseModel):
    """The body of POST /api/preference. The choices and the range of confidence are checked by the store."""

    model_config = ConfigDict(extra="forbid")
    presentation_id: StrictStr
    choice: StrictStr
    confidence: StrictInt = 3
    reasoning: StrictStr = ""


def create_app(store: LabelStore) -> FastAPI:
    """The server for the labels in `store`: the API, and the page under /label."""
    import gradio

    from label_page import build_page, page_settings

    # No generated documentation: its page would load scripts from another site.
    app = FastAPI(title="Preference labels", docs_url=None, redoc_url=None, openapi_url=None)
    _add_api(app, store)
    _add_login(app, store)
    app = gradio.mount_gradio_app(
        app,
        build_page(store),
        "/label",
        auth_dependency=lambda request: request.scope.get("labeler"),
        **page_settings(),
    )
    app.add_middleware(Guard, labeler_of=store.labeler_of)
    return app


def labeler_number(request: Request) -> int:
    return int(request.scope["labeler"])  # Guard has set it, or the request would not be here


Labeler = Annotated[int, Depends(labeler_number)]


def _add_api(app: FastAPI, store: LabelStore) -> None:
    def task_or_end(task, labeler: int) -> dict:
        if task is not None:
            return asdict(task)
        done, total = store.progress(labeler)
        # Waiting: what is left is with other labelers just now.
        return {"finished": True, "waiting": done < total, "done": done, "total": total}

    @app.get("/api/task")
    def next_task(labeler: Labeler) -> dict:
        return task_or_end(store.next_task(labeler), labeler)

    @app.post("/api/preference")
    def submit(answer: Answer, labeler: Labeler) -> dict:
        return store.submit(labeler, answer.presentation_id, answer.choice, answer.confidence, answer.reasoning)

    @app.post("/api/undo")
    def undo(labeler: Labeler) -> dict:
        task = store.undo(labeler)
        return {"nothing_to_undo": True} if task is None else asdict(task)

    @app.get("/api/progress")
    def progress(labeler: Labeler) -> dict:
        done, total = store.progress(labeler)
        return {"done": done, "total": total}

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(LabsError)
    def mistake(_request: Request, error: LabsError) -> JSONResponse:
        kinds = {Conflict: 409, UnknownPresentation: 404, DatabaseUnavailable: 503}
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), 422)
        return JSONResponse({"detail": str(error)}, code)

    @app.exception_handler(RequestValidationError)
    def bad_body(_request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats the input, which may not even be encodable.
        problems = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": "; ".join(problems).encode("utf-8", "replace").decode()}, 422)


def _add_login(app: FastAPI, store: LabelStore) -> None:
    @app.get("/")
    def root() -> Response:
        return RedirectResponse("/label/", 303)

    @app.get("/login")
    def login_page() -> Response:
        return HTMLResponse(LOGIN_PAGE.format(error=""))

    @app.post("/login")
    async def login(request: Request) -> Response:
        token = _posted_token(await request.body(), request.headers.get("content-type", ""))
        if await run_in_threadpool(store.labeler_of, token) is None:
            note = "This token is not known. Copy it whole, or ask for a new one."
            return HTMLResponse(LOGIN_PAGE.format(error=f'<p class="error">{html.escape(note)}</p>'), 401)
        response = RedirectResponse("/label/", 303)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, max_age=30 * 24 * 3600)
        return response

    @app.get("/logout")
    def logout() -> Response:
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response


def _posted_token(body: bytes, content_type: str) -> str:
    try:
        if content_type.startswith("application/json"):
            posted = json.loads(body)
            token = posted.get("token") if isinstance(posted, dict) else None
        else:
            token = parse_qs(body.decode()).get("token", [""])[0]
    except (ValueError, RecursionError):
        return ""
    # Only what can stand in a cookie: a token is URL-safe text. A copied one may bring the end of its line along.
    token = token.strip() if isinstance(token, str) else ""
    return token if token.isascii() and token.isprintable() else ""


class Guard:
    """Lets only labelers in, and says so to the rest: 401 for the API, the login page for pages.

    It stands in front of everything, Gradio's own addresses included, so that nothing is forgotten. It also bounds the
    length of a request and adds HEADERS to every response.
    """

    def __init__(self, app: Callable[..., Awaitable], labeler_of: Callable[[str | None], int | None]):
        self.app, self.labeler_of = app, labeler_of

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # there are no web sockets here
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                extra = {**HEADERS, **({} if _may_be_cached(path) else {"cache-control": "no-store"})}
                kept = [
                    (name, value) for name, value in message.get("headers", []) if name.decode().lower() not in extra
                ]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in extra.items()]
            await send(message)

        path = scope["path"]
        refusal = None
        try:
            if path not in PUBLIC:
                labeler = await run_in_threadpool(self.labeler_of, _token(scope))
                scope["labeler"] = None if labeler is None else str(labeler)  # Gradio wants a user to be text
                refusal = _refusal(path, scope["method"], labeler)
            if refusal is None:
                receive = await _bounded(receive)
        except LabsError as error:
            refusal = JSONResponse({"detail": str(error)}, 503)
        except _TooLong:
            refusal = JSONResponse({"detail": f"a request has at most {LONGEST_BODY} bytes"}, 413)
        await (refusal or self.app)(scope, receive, send_with_headers)


class _TooLong(Exception):
    pass


async def _bounded(receive: Callable) -> Callable:
    """Read the request's body, at most LONGEST_BODY bytes of it, and hand it on whole."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # gone before the body was whole
            parts = [b""]
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
        if sum(map(len, parts)) > LONGEST_BODY:
            raise _TooLong
    waiting = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def replay() -> dict:
        return waiting.pop() if waiting else await receive()

    return replay


def _token(scope) -> str | None:
    """The token of a request: from its Authorization header if there is one, else from the cookie."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if b"authorization" in headers:
        scheme, _, token = headers[b"authorization"].partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None
    try:
        found = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def _refusal(path: str, method: str, labeler: int | None) -> Response | None:
    if labeler is None:
        if path in PAGES and method in ("GET", "HEAD"):
            return RedirectResponse("/login", 303)
        detail = {"detail": "no valid token: send `Authorization: Bearer TOKEN`, or log in at /login"}
        return JSONResponse(detail, 401, {"WWW-Authenticate": "Bearer"})
    inner = path.removeprefix(GRADIO_API)
    if inner != path and not inner.startswith(GRADIO_NEEDS):
        return JSONResponse({"detail": "not here"}, 404)
    return None


def _may_be_cached(path: str) -> bool:
    return path.startswith(("/label/assets/", "/label/static/"))


def serve(
    store: LabelStore,
    host: str = "127.0.0.1",
    port: int = 7861,
    announce: Callable[[str], None] = lambda url: print(f"labelling page: {url}  (Ctrl-C stops it)", flush=True),
) -> None:
    """Serve until Ctrl-C or SIGTERM. Port 0 takes a free one; `announce` is given the address once requests are taken.

    `ADDRESS/login#TOKEN` is a link that logs in. Raises LabsError when the address cannot be used.
    """
    import uvicorn

    if host not in LOOPBACK:
        print(
            f"warning: listening on {host}: everybody who can reach this machine sees the login page, and tokens travel "
            "unencrypted; put a server with HTTPS in front of it",
            file=sys.stderr,
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LabsError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from error
        # A page that is open holds a connection: it is cut after a moment, or the server would never stop.
        config = uvicorn.Config(create_app(store), log_level="warning", timeout_graceful_shutdown=2)
        name = f"[{host}]" if ":" in host else host
        listening.listen(128)  # who reads the address may come at once, and waits a moment
        # uvicorn stops on these signals and then raises them again; here they have been heard.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            announce(f"http://{name}:{listening.getsockname()[1]}")
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            store.close()
    print("stopped; every answer is stored", flush=True)
