"""The gateway's HTTP: a FastAPI application made from a router, knowing nothing of Ray.

Each completion is served by one :class:`Relay`, which routes the call, passes bytes on as they
come, and closes everything when the client leaves, at whatever moment that is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import openapi
from serve_app.config import AppConfig
from serve_app.errors import (
    BodyTimeout,
    BodyTooLarge,
    EngineError,
    HeadersTooLarge,
    InvalidRequest,
    NotFound,
    RequestError,
)
from serve_app.guard.body import check_body
from serve_app.keys import ApiKey, KeyRing
from serve_app.lengths import Estimate, LengthEstimator
from serve_app.metrics import GatewayMetrics
from serve_app.pattern import FULL, LayerRule, in_words
from serve_app.request import Call, EngineInfo
from serve_app.router import Answer, Attempts, Router
from serve_app.tracing import Tracer, trace_headers

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_CLOSED = 499  # nginx's status for a client that left, which never sees it
_MAX_HEADERS = 100
_MAX_HEADER_BYTES = 32_768  # Serve's proxy has none of its own
_LARGE_BODY_BYTES = 2**20
_LOGGED_PATH = 128  # characters


def create_app(
    config: AppConfig,
    router: Router,
    metrics: GatewayMetrics,
    keys: KeyRing | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application of one gateway; ``keys`` is None where anybody may ask.

    The pools of ``router`` must be kept fresh by the caller.
    """
    app = FastAPI(title="local-attention-serve", docs_url=None, redoc_url=None)
    lengths = LengthEstimator(default_output_tokens=config.gateway.default_output_tokens)
    started = int(time.time())

    def admit(request: Request) -> ApiKey | None:
        _check_headers(request)
        key = keys.check(request.headers.get("authorization")) if keys else None
        request.state.key_name = key.name if key else "-"
        return key

    async def understand(raw: bytes, path: str) -> tuple[dict[str, Any], Estimate]:
        """Check, parse and measure a body: a large one aside, so that streams flow meanwhile."""

        def work() -> tuple[dict[str, Any], Estimate]:
            body = check_body(raw, path, config.gateway.limits)
            return body, lengths.estimate(body)

        return await asyncio.to_thread(work) if len(raw) > _LARGE_BODY_BYTES else work()

    @app.post("/v1/chat/completions", openapi_extra=openapi.completion("messages"))
    @app.post("/v1/completions", openapi_extra=openapi.completion("prompt"))
    async def complete(request: Request) -> Response:
        arrived = time.monotonic()
        key = admit(request)
        raw = await _read_body(request, config.max_body_bytes, config.gateway.body_timeout_s)
        body, estimate = await understand(raw, request.url.path)
        if keys and key:
            keys.charge(key, estimate.total_tokens, arrived)
        call = Call(
            id=_request_id(request.headers),
            path=request.url.path,
            body=raw,
            fit_tokens=estimate.fit_tokens,
            total_tokens=estimate.total_tokens,
            output_tokens=estimate.output_tokens,
            stream=body.get("stream") is True,
            arrived=arrived,
            priority=_priority(request),
            deadline=_deadline(request, arrived),
            prefix_key=body.get("prompt_cache_key") or request.headers.get("x-session-id"),
        )
        span = tracer.start(call.id, call.path, request.headers) if tracer else None
        if span:
            call = replace(call, trace=trace_headers(span))
        refund = partial(keys.refund, key) if keys and key else None
        name = request.state.key_name
        return Relay(call, name, estimate, router, lengths, metrics, span, refund)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        admit(request)
        model = {
            "id": config.served_model_name,
            "object": "model",
            "created": started,
            "owned_by": "local-attention-serve",
            "max_model_len": router.limit,
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        state: dict[str, Any] = {
            "ready": router.ready,
            "pools": {pool.name: pool.alive for pool in router.pools},
        }
        if missing := {pool.name: pool.absence for pool in router.pools if pool.absence}:
            state["missing"] = missing
        return JSONResponse(state, status_code=200 if router.ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        for pool in router.pools:
            metrics.show_pool(pool.name, pool.queued, pool.queued_tokens)
        metrics.show_engines(_engines(router))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(RequestError)
    async def explain(request: Request, error: RequestError) -> Response:
        metrics.sheds.labels(error.code).inc()
        _log_refusal(request, error.status, error.code)
        return _error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def note_absence(request: Request, _error: ClientDisconnect) -> Response:
        metrics.disconnects.inc()
        _log_refusal(request, _CLIENT_CLOSED, "client_closed")
        return Response(status_code=_CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def hide(_request: Request, _error: Exception) -> Response:
        # Starlette raises it again after this answer, so that the log has all of it.
        return _error_response(RequestError("The gateway failed on this request."))

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> Response:
        found = NotFound(f"There is no {request.method} {request.url.path} here.")
        _log_refusal(request, error.status_code, found.code)
        response = _error_response(found)
        response.status_code = error.status_code
        return response

    return app


def identified(app: ASGIApp) -> ASGIApp:
    """``app`` with ``x-request-id`` on every answer, as Serve's proxy has it."""

    async def identify(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        header = (b"x-request-id", _request_id(Headers(scope=scope)).encode())
        scope["headers"] = [*(h for h in scope["headers"] if h[0] != header[0]), header]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        await app(scope, receive, answer)

    return identify


def _engines(router: Router) -> Iterator[tuple[EngineInfo, int]]:
    """Every listed engine with the tokens that this gateway has under way on it."""
    for pool in router.pools:
        loads = pool.loads()
        for engine in pool.engines:
            load = loads[engine.replica]
            yield engine, load.prefill + load.kv


class Relay(Response):
    """Routes one call and passes the engine's bytes on to the client."""

    def __init__(
        self,
        call: Call,
        key_name: str,
        estimate: Estimate,
        router: Router,
        lengths: LengthEstimator,
        metrics: GatewayMetrics,
        span: Span | None = None,
        refund: Callable[[int], None] | None = None,
    ) -> None:
        self._call = call
        self._span = span
        self._refund = refund or (lambda _tokens: None)
        self._key_name = key_name
        self._estimate = estimate
        self._router = router
        self._lengths = lengths
        self._metrics = metrics
        self._pool = "none"
        self._attempts = Attempts()
        self._status = _CLIENT_CLOSED
        self._chunks = 0
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that leaves shows in one of two ways, whichever comes first: Serve, where its
        # proxy is in use, cancels this call, or the disconnect is received here.
        try:
            await _until_disconnect(receive, self._serve(scope, receive, send))
        except Exception:  # a fault of our own: the client did not leave
            self._status = RequestError.status
            raise
        finally:
            self._conclude()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._router.route(self._call, self._attempts)
        except RequestError as error:
            self._status = error.status
            self._refund(self._estimate.total_tokens)
            self._metrics.sheds.labels(error.code).inc()
            await _error_response(error)(scope, receive, send)
            return
        try:
            self._learn(answer)
            await self._pass_on(answer, send)
            self._status = answer.reply.status
        finally:
            answer.close()

    def _learn(self, answer: Answer) -> None:
        self._pool = pool = answer.pool.name
        self._metrics.time_to_first_token.labels(pool).observe(self._elapsed())
        self._metrics.queue_wait.labels(pool).observe(answer.waited_s)
        if exact := answer.reply.prompt_tokens:
            self._metrics.estimated_tokens.inc(self._estimate.prompt_tokens)
            self._metrics.exact_tokens.inc(exact)
            self._refund(self._estimate.prompt_tokens - exact)
            self._lengths.observe(self._estimate, exact)

    async def _pass_on(self, answer: Answer, send: Send) -> None:
        headers = [
            (b"content-type", answer.reply.content_type.encode("latin-1")),
            (b"x-pool", self._pool.encode("latin-1")),
            (b"cache-control", b"no-cache"),
        ]
        if plan := _local_plan(answer.engine.rules):
            headers.append((b"x-attention-plan", plan))
        status = answer.reply.status
        await send({"type": "http.response.start", "status": status, "headers": headers})
        between = self._metrics.time_between_chunks.labels(self._pool)
        last = time.monotonic()
        async with aclosing(_ending_in_words(answer.chunks(), self._call.id)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._chunks += 1
                now = time.monotonic()
                between.observe(now - last)
                last = now
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _conclude(self) -> None:
        if self._status == _CLIENT_CLOSED:
            self._metrics.disconnects.inc()
            self._metrics.wasted_chunks.inc(self._chunks)
        self._metrics.misroutes.inc(self._attempts.misroutes)
        self._metrics.retries.inc(self._attempts.failures)
        self._metrics.requests.labels(self._pool, str(self._status)).inc()
        self._metrics.duration.labels(self._pool).observe(self._elapsed())
        if self._span:
            self._span.set_attribute("pool", self._pool)
            self._span.set_attribute("http.response.status_code", self._status)
            self._span.end()
        log.info(
            "request id=%s key=%s path=%s pool=%s status=%d seconds=%.3f tokens=%d",
            self._call.id,
            self._key_name,
            self._call.path,
            self._pool,
            self._status,
            self._elapsed(),
            self._estimate.total_tokens,
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._call.arrived


@lru_cache
def _local_plan(rules: tuple[LayerRule, ...]) -> bytes:
    """The plan in words, for a header; empty where every layer is full."""
    return b"" if set(rules) == {FULL} else in_words(rules).encode()


async def _ending_in_words(
    chunks: AsyncIterator[bytes], request_id: str
) -> AsyncGenerator[bytes, None]:
    """``chunks``, or what came of them and then an error event, without ``[DONE]``."""
    try:
        async for chunk in chunks:
            yield chunk
    except EngineError as error:
        log.warning("request %s: %s", request_id, error)
        yield b"\n\ndata: " + json.dumps(error.body()).encode() + b"\n\n"


async def _until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``, but cancel it as soon as the client leaves."""
    serving = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        leaving.cancel()
        serving.cancel()
        await asyncio.gather(serving, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_headers(request: Request) -> None:
    headers = request.headers.raw
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > _MAX_HEADERS or size > _MAX_HEADER_BYTES:
        raise HeadersTooLarge(
            f"The request has {len(headers)} headers of {size} bytes, but the limits are "
            f"{_MAX_HEADERS} and {_MAX_HEADER_BYTES}."
        )


async def _read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    too_large = BodyTooLarge(f"The body is larger than the limit of {limit} bytes.")
    declared = request.headers.get("content-length", "")
    if re.fullmatch(r"\d{1,18}", declared) and int(declared) > limit:
        raise too_large
    parts = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"The body did not arrive within {timeout_s:g} s.") from error
    return b"".join(parts)


def _priority(request: Request) -> Literal["interactive", "batch"]:
    match request.headers.get("x-priority", "interactive"):
        case "interactive":
            return "interactive"
        case "batch":
            return "batch"
    raise InvalidRequest("The header x-priority must be interactive or batch.", param="x-priority")


def _deadline(request: Request, arrived: float) -> float | None:
    """The moment after which the client no longer wants an answer to begin."""
    given = request.headers.get("x-deadline-ms")
    if given is None:
        return None
    if not re.fullmatch(r"\d{1,9}", given):
        raise InvalidRequest(
            "The header x-deadline-ms must be a whole number of milliseconds.",
            param="x-deadline-ms",
        )
    return arrived + int(given) / 1000


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _log_refusal(request: Request, status: int, code: str) -> None:
    """The log line of a request that ended before an engine was looked for."""
    log.info(
        "request id=%s key=%s method=%s path=%s status=%d code=%s",
        _request_id(request.headers),
        getattr(request.state, "key_name", "-"),
        request.method,
        quote(request.url.path)[:_LOGGED_PATH],  # a client's own words: one line, and not for ever
        status,
        code,
    )


def _error_response(error: RequestError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
