"""The gateway's HTTP: a FastAPI application made from a router, knowing nothing of Ray.

Each completion is served by one :class:`Relay`, which routes the call, passes bytes on as they
come, and closes everything when the client leaves, at whatever moment that is. The header
``x-request-id`` is read here; Serve's proxy writes it on every response.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve_app.config import AppConfig
from serve_app.errors import BodyTooLarge, EngineError, InvalidRequest, NotFound, RequestError
from serve_app.lengths import Estimate, LengthEstimator
from serve_app.metrics import GatewayMetrics
from serve_app.request import Call
from serve_app.router import Answer, Router

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_CLOSED = 499  # nginx's status for a client that left; it is only counted, never sent


def create_app(config: AppConfig, router: Router, metrics: GatewayMetrics) -> FastAPI:
    """The application of one gateway. ``router`` must be kept fresh by the caller."""
    app = FastAPI(title="local-attention-serve", docs_url=None, redoc_url=None)
    lengths = LengthEstimator(default_output_tokens=config.gateway.default_output_tokens)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        raw = await _read_body(request, config.gateway.max_body_bytes)
        body = _parse(raw)
        estimate = lengths.estimate(body, len(raw))
        call = Call(
            id=_request_id(request),
            path=request.url.path,
            body=raw,
            fit_tokens=estimate.fit_tokens,
            total_tokens=estimate.total_tokens,
            output_tokens=estimate.output_tokens,
        )
        return Relay(call, estimate, router, lengths, metrics)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
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
        pools = {pool.name: len(pool.engines) for pool in router.pools}
        return JSONResponse(
            {"ready": router.ready, "pools": pools}, status_code=200 if router.ready else 503
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        metrics.show_engines(
            (engine, pool.outstanding(engine.replica))
            for pool in router.pools
            for engine in pool.engines
        )
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(RequestError)
    async def explain(_request: Request, error: RequestError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> Response:
        found = NotFound(f"There is no {request.method} {request.url.path} here.")
        response = _error_response(found)
        response.status_code = error.status_code
        return response

    return app


class Relay(Response):
    """Routes one call and passes the engine's bytes on to the client."""

    def __init__(
        self,
        call: Call,
        estimate: Estimate,
        router: Router,
        lengths: LengthEstimator,
        metrics: GatewayMetrics,
    ) -> None:
        self._call = call
        self._estimate = estimate
        self._router = router
        self._lengths = lengths
        self._metrics = metrics
        self._pool = "none"
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = await _until_disconnect(receive, self._serve(scope, receive, send, started))
        if status is None:
            status = _CLIENT_CLOSED
            self._metrics.disconnects.inc()
        took = time.perf_counter() - started
        self._metrics.requests.labels(self._pool, str(status)).inc()
        self._metrics.duration.labels(self._pool).observe(took)
        log.info(
            "request id=%s path=%s pool=%s status=%d seconds=%.3f tokens=%d",
            self._call.id,
            self._call.path,
            self._pool,
            status,
            took,
            self._estimate.total_tokens,
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send, started: float) -> int:
        try:
            answer = await self._router.route(self._call)
        except RequestError as error:
            await _error_response(error)(scope, receive, send)
            return error.status
        try:
            self._learn(answer, time.perf_counter() - started)
            return await self._pass_on(answer, send)
        finally:
            answer.close()

    def _learn(self, answer: Answer, first_token_s: float) -> None:
        self._pool = answer.pool
        self._metrics.time_to_first_token.labels(answer.pool).observe(first_token_s)
        self._metrics.misroutes.inc(answer.misroutes)
        self._lengths.observe(self._estimate, answer.reply.prompt_tokens)

    async def _pass_on(self, answer: Answer, send: Send) -> int:
        reply = answer.reply
        headers = [
            (b"content-type", reply.content_type.encode("latin-1")),
            (b"x-pool", answer.pool.encode("latin-1")),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async with aclosing(_ending_in_words(reply.chunks(), self._call.id)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return reply.status


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


async def _until_disconnect(receive: Receive, work: Coroutine[Any, Any, int]) -> int | None:
    """The result of ``work``, or None if the client leaves first, which cancels it."""
    serving = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            return serving.result()
        return None
    finally:
        leaving.cancel()
        serving.cancel()
        await asyncio.gather(serving, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, limit: int) -> bytes:
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The body is larger than the limit of {limit} bytes.")
        parts.append(part)
    return b"".join(parts)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The body is not valid JSON.") from error
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return body


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _error_response(error: RequestError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
