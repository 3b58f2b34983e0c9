"""An instant fake OpenAI server: it answers as told, so that what is left is the client's own time.

    python -m load_tests.null_server --port 8001 --ttft-ms 50 --itl-ms 5

One UTF-8 byte is one token. It can also misbehave on every Nth request, to prove that the client
notices: see ``FAULTS``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import uvicorn

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ROOT = Path(__file__).parents[1]
FAULTS = ("error-event", "no-done", "empty", "cut", "400", "429", "503", "hang")


@dataclass(frozen=True, slots=True)
class Manners:
    """How the server answers. ``tokens`` overrides the request's ``max_tokens``."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    tokens: int | None = None
    tokens_per_chunk: int = 1
    fault: str | None = None
    fault_every: int = 1
    retry_after_s: int = 1
    template_tokens: int = 0  # what a chat template adds to a prompt
    tokenize: bool = True  # whether there is a /tokenize route


class NullServer:
    """The ASGI application."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self._requests = count(1)
        self._under_way = 0  # each fills one part in a hundred of a KV cache that is not there

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = await _read(receive)
        path = scope["path"]
        if path in ("/v1/chat/completions", "/v1/completions"):
            self._under_way += 1
            try:
                await self._complete(json.loads(body), send, chat="chat" in path)
            finally:
                self._under_way -= 1
        elif path == "/tokenize" and self.manners.tokenize:
            await _answer(send, 200, {"count": self._count(json.loads(body))})
        elif path == "/v1/models":
            await _answer(send, 200, {"object": "list", "data": [{"id": "null"}]})
        elif path == "/metrics":
            gauge = f'vllm:kv_cache_usage_perc{{engine="0"}} {min(1.0, self._under_way / 100)}\n'
            await _start(send, 200, [(b"content-type", b"text/plain")])
            await send({"type": "http.response.body", "body": gauge.encode()})
        else:
            await _answer(send, 404, {"error": {"message": f"no route {path}"}})

    async def _complete(self, request: dict[str, Any], send: Send, *, chat: bool) -> None:
        arrived = perf_counter()
        manners = self.manners
        faulty = next(self._requests) % manners.fault_every == 0
        fault = manners.fault if faulty else None
        if fault in ("400", "429", "503"):
            wait = [(b"retry-after", str(manners.retry_after_s).encode())]
            await _answer(send, int(fault), {"error": {"message": f"told to say {fault}"}}, wait)
            return
        asked = request.get("max_completion_tokens") or request.get("max_tokens") or 16
        tokens = manners.tokens or int(asked)
        usage = {"prompt_tokens": self._count(request), "completion_tokens": tokens}
        if request.get("stream"):
            await self._stream(send, arrived, tokens, usage, fault, chat=chat)
        else:
            await asyncio.sleep((manners.ttft_ms + tokens * manners.itl_ms) / 1e3)
            answer = _event("x" * tokens, chat=chat, stream=False)
            await _answer(send, 200, {**answer, "usage": usage})

    def _count(self, request: dict[str, Any]) -> int:
        return self.manners.template_tokens + len(_prompt(request).encode())

    async def _stream(
        self,
        send: Send,
        arrived: float,
        tokens: int,
        usage: dict[str, int],
        fault: str | None,
        *,
        chat: bool,
    ) -> None:
        await _start(send, 200, [(b"content-type", b"text/event-stream")])
        if chat:
            await _chunk(send, _event("", chat=True))
        for first in range(0, 0 if fault == "empty" else tokens, self.manners.tokens_per_chunk):
            due = arrived + (self.manners.ttft_ms + first * self.manners.itl_ms) / 1e3
            await _until(due)
            text = "x" * min(self.manners.tokens_per_chunk, tokens - first)
            await _chunk(send, _event(text, chat=chat))
            if fault == "error-event":
                await _chunk(send, {"error": {"message": "told to fail", "code": 500}})
                break
            if fault == "hang":
                await asyncio.Event().wait()
            if fault == "cut":
                raise ConnectionAbortedError  # uvicorn closes the connection without an end
        await _chunk(send, {"choices": [], "usage": usage})
        done = b"" if fault == "no-done" else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": done})


async def _until(due: float) -> None:
    """Sleep until ``due`` (``perf_counter`` seconds). The event loop's own clock and timers may
    tick in milliseconds, so they are not to be trusted alone."""
    while (left := due - perf_counter()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(left)


def _prompt(request: dict[str, Any]) -> str:
    if "messages" in request:
        return "".join(str(message["content"]) for message in request["messages"])
    return str(request["prompt"])


def _event(text: str, *, chat: bool, stream: bool = True) -> dict[str, Any]:
    if not chat:
        return {"choices": [{"index": 0, "text": text}]}
    return {"choices": [{"index": 0, "delta" if stream else "message": {"content": text}}]}


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _chunk(send: Send, event: dict[str, Any]) -> None:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _answer(
    send: Send, status: int, body: dict[str, Any], extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    await _start(send, status, [(b"content-type", b"application/json"), *(extra or [])])
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


@contextmanager
def listening(*command: str) -> Iterator[str]:
    """Run a server of 127.0.0.1 that prints its port first; yields its base URL."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@contextmanager
def null_server(*arguments: str) -> Iterator[str]:
    """A null server in a process of its own, on a free port; yields its base URL."""
    command = (sys.executable, "-m", "load_tests.null_server", "--port", "0", *arguments)
    with listening(*command) as url:
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description="An instant fake OpenAI server.")
    parser.add_argument("--port", type=int, default=8001, help="0 picks a free one")
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    parser.add_argument("--itl-ms", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, help="whatever max_tokens says")
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--fault-every", type=int, default=1)
    parser.add_argument("--retry-after-s", type=int, default=1)
    parser.add_argument("--template-tokens", type=int, default=0)
    parser.add_argument("--no-tokenize", dest="tokenize", action="store_false")
    options = vars(parser.parse_args())
    port = options.pop("port")
    app = NullServer(Manners(**options))
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        timeout_keep_alive=75,  # longer than clients keep one: none finds it just closed
        timeout_graceful_shutdown=1,
    )
    listener = config.bind_socket()
    listener.listen()  # now, so that who reads the port may connect at once
    print(listener.getsockname()[1], flush=True)  # who started us reads the port here
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
