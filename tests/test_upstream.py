"""The gateway's HTTP client against a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from serve_app.errors import EngineError, EngineSilent
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
        app.router.add_post("/{path:.*}", handler)
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
        assert request.headers["x-request-id"] == "r1"
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
        (
            '{"error": {"message": "max_tokens must be at least 1", "param": "max_tokens"}}',
            "The prompt fills the context of the engine and leaves nothing for an answer.",
        ),
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


async def test_a_dead_and_a_cut_engine_are_engine_errors(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream
) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    with pytest.raises(EngineError) as dead:
        await upstream.open(EngineInfo("e1", "short", "http://127.0.0.1:9", "t"), CALL)
    reply = await upstream.open(await serve(cut), CALL)
    with pytest.raises(EngineError) as died:
        _ = [chunk async for chunk in reply.chunks()]
    reply.close()
    assert not isinstance(dead.value, EngineSilent)
    assert not isinstance(died.value, EngineSilent)


@pytest.fixture
async def stalling(
    serve: Callable[[Handler], Awaitable[EngineInfo]],
) -> AsyncIterator[Callable[[bytes], Awaitable[EngineInfo]]]:
    """Starts engines that send so much of a stream and then nothing, connected as before."""
    over = asyncio.Event()

    def start(sent: bytes) -> Awaitable[EngineInfo]:
        async def stall(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            if sent:
                await response.write(sent)
            await over.wait()
            return response

        return serve(stall)

    yield start
    over.set()


LONG_S = 60.0  # a limit that is not the one under test


async def test_an_engine_without_a_first_token_in_time_is_silent(
    stalling: Callable[[bytes], Awaitable[EngineInfo]],
) -> None:
    upstream = Upstream("m", first_token_timeout_s=0.05, inter_token_timeout_s=LONG_S)
    with pytest.raises(EngineSilent, match="no first token"):
        await asyncio.wait_for(upstream.open(await stalling(b""), CALL), 10)
    await upstream.close()


async def test_an_engine_that_stops_between_two_tokens_is_silent(
    stalling: Callable[[bytes], Awaitable[EngineInfo]],
) -> None:
    upstream = Upstream("m", first_token_timeout_s=LONG_S, inter_token_timeout_s=0.05)
    reply = await upstream.open(await stalling(b"data: 1\n\n"), CALL)
    async with aclosing(reply.chunks()) as chunks:
        assert await anext(chunks) == b"data: 1\n\n"
        with pytest.raises(EngineSilent, match="fell silent"):
            await asyncio.wait_for(anext(chunks), 10)
    reply.close()
    await upstream.close()


async def test_an_answer_that_is_not_streamed_may_take_as_long_as_all_of_its_tokens(
    serve: Callable[[Handler], Awaitable[EngineInfo]],
) -> None:
    async def slow(_request: web.Request) -> web.Response:
        await asyncio.sleep(0.3)  # longer than a first token may take, shorter than nine tokens
        return web.json_response({})

    upstream = Upstream("m", first_token_timeout_s=0.1, inter_token_timeout_s=1.0)
    engine = await serve(slow)
    assert (await upstream.open(engine, replace(CALL, stream=False))).status == 200
    with pytest.raises(EngineSilent):
        await upstream.open(engine, CALL)
    await upstream.close()


@pytest.mark.parametrize(("status", "alive"), [(200, True), (500, False), (503, False)])
async def test_a_probe_asks_for_one_token_and_says_whether_it_came(
    serve: Callable[[Handler], Awaitable[EngineInfo]], upstream: Upstream, status: int, alive: bool
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append((request.path, await request.json()))
        return web.json_response({}, status=status)

    assert await upstream.probe(await serve(handler)) is alive
    assert asked == [("/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1})]


async def test_a_probe_of_a_silent_engine_is_not_answered(
    stalling: Callable[[bytes], Awaitable[EngineInfo]],
) -> None:
    upstream = Upstream("m", first_token_timeout_s=0.05, inter_token_timeout_s=0.05)
    assert not await asyncio.wait_for(upstream.probe(await stalling(b"")), 10)
    await upstream.close()
