"""The gateway's HTTP client against a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from serve_app.errors import EngineError
from serve_app.request import Call, EngineInfo
from serve_app.upstream import Upstream

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CALL = Call(
    id="r1",
    path="/x",
    body=b'{"a":1}',
    fit_tokens=1,
    total_tokens=1,
    output_tokens=9,
    stream=True,
    trace=(("traceparent", "00-trace"),),
)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[EngineInfo]]]:
    servers: list[TestServer] = []

    async def start(handler: Handler) -> EngineInfo:
        app = web.Application()
        app.router.add_post("/x", handler)
        server = TestServer(app, host="127.0.0.1")
        await server.start_server()
        servers.append(server)
        return EngineInfo("e1", "short", f"http://127.0.0.1:{server.port}", "secret")

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    client = Upstream("m", first_token_timeout_s=0.5, inter_token_timeout_s=0.5)
    yield client
    await client.close()


async def test_the_body_token_and_budget_arrive_and_the_count_comes_back(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert await request.read() == CALL.body
        assert request.headers["x-engine-token"] == "secret"
        assert request.headers["x-output-budget"] == "9"
        assert request.headers["traceparent"] == "00-trace"
        return web.json_response({"ok": 1}, headers={"x-prompt-tokens": "42"})

    reply = await upstream.open(await serve(handler), CALL)
    assert (reply.status, reply.prompt_tokens, reply.refused) == (200, 42, False)
    assert [chunk async for chunk in reply.chunks()] == [b'{"ok": 1}']


async def test_a_stream_is_open_at_its_first_bytes(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await response.write(b"data: 2\n\n")
        return response

    reply = await upstream.open(await serve(handler), CALL)
    assert b"".join([chunk async for chunk in reply.chunks()]) == b"data: 1\n\ndata: 2\n\n"


async def test_a_slow_reader_gets_the_end_of_a_stream_that_came_before_it_read_on(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await ended.wait()
        await response.write(b"data: 2\n\ndata: [DONE]\n\n")
        return response

    reply = await upstream.open(await serve(handler), CALL)
    chunks = reply.chunks()
    first = await anext(chunks)
    arrived = asyncio.Event()
    reply._response.content.on_eof(arrived.set)
    ended.set()
    await arrived.wait()  # the whole answer is here, unread
    rest = b"".join([chunk async for chunk in chunks])
    assert first + rest == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_an_error_event_before_the_first_token_gets_its_status_back(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"error": {"message": "no", "param": "x", "code": 400}}\n\n')
        return response

    reply = await upstream.open(await serve(handler), CALL)
    assert (reply.status, reply.content_type) == (400, "application/json")
    assert [chunk async for chunk in reply.chunks()] == [reply.first]


@pytest.mark.parametrize(
    ("body", "too_long"),
    [
        ('{"error": {"message": "m", "param": "input_tokens"}}', "m"),
        ('{"error": {"message": "m", "param": "input_text"}}', "m"),
        ('{"error": {"message": "m", "param": "temperature"}}', None),
        ("not json", None),
        ("[]", None),
    ],
)
async def test_only_vllms_own_words_mean_too_long(
    serve: Callable[[Handler], Awaitable[EngineInfo]],
    upstream: Upstream,
    body: str,
    too_long: str | None,
) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(status=400, text=body)

    reply = await upstream.open(await serve(handler), CALL)
    assert reply.too_long == too_long


async def test_a_door_that_refuses_is_told_from_an_answer(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(status=503, headers={"x-engine-refused": "1"})

    reply = await upstream.open(await serve(handler), CALL)
    assert reply.refused


async def test_a_dead_a_silent_and_a_cut_engine_are_engine_errors(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await request.content.readany()
        await request.app["never"].wait()
        return response

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    with pytest.raises(EngineError):
        await upstream.open(EngineInfo("e1", "short", "http://127.0.0.1:9", "t"), CALL)
    with pytest.raises(EngineError):
        await upstream.open(await serve(silent), CALL)
    reply = await upstream.open(await serve(cut), CALL)
    with pytest.raises(EngineError):
        _ = [chunk async for chunk in reply.chunks()]
    reply.close()
