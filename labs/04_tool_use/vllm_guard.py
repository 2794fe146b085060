"""What stands before vLLM inside the server's process: one key for everything, and checks on what is loaded while it runs.

vLLM's own key (0.32) guards paths that begin with /v1, /v2, /inference or /cohere, and nothing else: without any key
`/invocations` generates text, `/adapters` loads an adapter where loading is allowed, `/tokenize` and `/metrics` answer.
vLLM imports this class by the name in `--middleware` and lets every request pass through it first.

Loading an adapter goes through the same checks as at the start (base, rank, tensors), and on a CPU it is counted: each load
takes a LoRA slot for as long as the server lives, even one that is unloaded again, and the last slot must stay empty
(`vllm_adapters.slots_needed`).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from pathlib import Path
from typing import Any

from shared import LabsError
from vllm_adapters import check_adapter, check_name, content_hash, model_facts

OPEN = ("/health",)
SERVED = ("/v1/", "/metrics", "/version", "/tokenize", "/detokenize")
LOAD = "/v1/load_lora_adapter"
CONFIG = "adapter_config.json"
LARGEST_LOAD_REQUEST = 65536  # bytes


class Guard:
    """An ASGI middleware. Settings come as JSON in LABS_VLLM_GUARD, the key in VLLM_API_KEY; without them nothing starts."""

    def __init__(self, app) -> None:
        self.app = app
        settings = json.loads(os.environ["LABS_VLLM_GUARD"])
        self.key = os.environ["VLLM_API_KEY"].encode()
        self.key_env: str = settings["key_env"]
        self.base: str = settings["base"]
        self.base_name: str = settings["base_name"]
        self.max_lora_rank: int = settings["max_lora_rank"]
        self.loading: bool = settings["loading"]  # else vLLM has no such path
        self.most: int | None = settings["most"]
        self.loaded = len(settings["adapters"])
        self.facts = model_facts(self.base) if Path(self.base).is_dir() else None
        self.contents = {(name, path): content_hash(path, CONFIG) for name, path in settings["adapters"].items()}
        self.one_load = asyncio.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN:
            return await self.app(scope, receive, send)
        if not self._knows_key(scope["headers"]):
            message = f"this server wants a key: send what its variable {self.key_env} held as `Authorization: Bearer`"
            return await _refuse(scope, send, 401, message, "Unauthorized")
        if not path.startswith(SERVED):
            return await _refuse(
                scope, send, 404, f"{path} is not served here; the paths under /v1 are", "NotFoundError"
            )
        if path == LOAD and self.loading and scope["type"] == "http" and scope["method"] == "POST":
            return await self._load(scope, receive, send)
        return await self.app(scope, receive, send)

    def _knows_key(self, headers) -> bool:
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(given, self.key)
        return False

    async def _load(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > LARGEST_LOAD_REQUEST:
                return await _refuse(scope, send, 413, "the request is too long", "BadRequestError")
            if not message.get("more_body"):
                break
        async with self.one_load:  # two at a time could both take the last slot that may be taken
            try:
                seen, content = await asyncio.to_thread(self._check, body)
            except LabsError as error:
                return await _refuse(scope, send, 400, str(error), "AdapterRefused")
            status = 0

            async def replay():
                return {"type": "http.request", "body": body, "more_body": False}

            async def watch(message):
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            await self.app(scope, replay, watch)
            if status not in (400, 404):  # those come before a slot is taken
                self.loaded += 1
            if status == 200:
                self.contents[seen] = content

    def _check(self, body: bytes) -> tuple[tuple[str, str], str]:
        """((name, folder), hash of its weights). Raises LabsError for what must not be loaded."""
        try:
            request: Any = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            raise LabsError('the request must be a JSON object {"lora_name": …, "lora_path": …}')
        name, path = request.get("lora_name"), request.get("lora_path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise LabsError("lora_name and lora_path must both be given, as texts")
        if request.get("load_inplace"):
            # vLLM then reads the folder again for every batch, and keeps the cache of the old weights.
            raise LabsError(
                "load_inplace is not used here: load the new version by another name, then unload the old one"
            )
        check_name(name, self.base_name)
        check_adapter(name, path, self.base, self.facts, self.max_lora_rank)
        if self.most is not None and self.loaded >= self.most:
            raise LabsError(
                f"all {self.most} adapter slots of this server have been used (an unloaded adapter keeps its slot): "
                "restart it, with a higher runtime_adapters"
            )
        content = content_hash(path, CONFIG)
        if self.contents.get((name, path), content) != content:
            # vLLM keeps what it computed for a prompt under the adapter's name and path, not under its weights.
            raise LabsError(f"{path} has changed since it was loaded as {name}: load it by another name")
        return (name, path), content


async def _refuse(scope, send, status: int, message: str, kind: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
    error = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
