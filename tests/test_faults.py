"""Faults on real engines: a replica killed under streams, and scaling under traffic."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp
import httpx
import pytest

from tests.serving import Server

COMPLETIONS = "/v1/completions"
RECOVERY_S = 150


@pytest.fixture(scope="module")
def pair(server: Server) -> Iterator[Server]:
    """The demo application with two replicas of the short pool, scaled up under traffic."""
    asyncio.run(scale_under_traffic(server, 2))
    with ThreadPoolExecutor(8) as clients:  # the first answer of a new engine takes seconds
        list(clients.map(lambda _: ask(server), range(8)))
    yield server
    server.scale(engine_short=1)


@pytest.fixture
async def http(pair: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=pair.url, timeout=120, trust_env=False, limits=limits
    ) as http:
        yield http


def ask(server: Server) -> None:
    httpx.post(server.url + COMPLETIONS, json=body(8), timeout=120).raise_for_status()


def wait_for_engines(server: Server, count: int) -> None:
    """Return when the short pool has exactly ``count`` engines that take requests."""
    deadline = time.monotonic() + RECOVERY_S
    while (ready := httpx.get(f"{server.url}/ready").json()["pools"]["short"]) != count:
        assert time.monotonic() < deadline, f"{ready} engines, not {count}:\n{server.log[-3000:]}"
        time.sleep(0.5)


def body(tokens: int, **extra: object) -> dict[str, object]:
    return {
        "model": "demo",
        "prompt": "once upon",
        "max_tokens": tokens,
        "ignore_eos": True,
        **extra,
    }


@dataclass
class Stream:
    """One streamed answer as it was received."""

    begun: asyncio.Event
    events: list[str]

    async def receive(self, session: aiohttp.ClientSession) -> None:
        request = body(900, stream=True)
        async with session.post(COMPLETIONS, json=request) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: "):
                    self.events.append(line.removeprefix(b"data: ").decode().strip())
                    self.begun.set()


async def test_a_killed_replica_cuts_its_streams_and_loses_nothing_else(
    pair: Server, http: httpx.AsyncClient
) -> None:
    victim, _survivor = pair.replicas("engine-short")
    streams = [Stream(asyncio.Event(), []) for _ in range(8)]
    # Not httpx: of streams this fast it keeps the event loop to itself for seconds.
    async with aiohttp.ClientSession(pair.url) as session:
        receiving = [asyncio.create_task(stream.receive(session)) for stream in streams]
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        plain = [asyncio.create_task(http.post(COMPLETIONS, json=body(300))) for _ in range(8)]
        await both_engines_have(http, 2 * 900)
        victim.send_signal(signal.SIGKILL)
        await asyncio.gather(*receiving)
    cut = [stream for stream in streams if "[DONE]" not in stream.events]
    assert 1 <= len(cut) <= 7
    for stream in cut:
        assert json.loads(stream.events[-1])["error"]["code"] == "engine_failed"
    for stream in streams:
        if stream not in cut:
            assert len(stream.events) >= 900 / 2  # nothing of it is missing
    for answer in await asyncio.gather(*plain):
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 300
    await asyncio.to_thread(wait_for_engines, pair, 2)


async def both_engines_have(http: httpx.AsyncClient, tokens: int) -> None:
    """Return when the gateway has so many tokens under way on both engines of the short pool."""
    async with asyncio.timeout(30):
        while True:
            lines = (await http.get("/metrics")).text.splitlines()
            outstanding = [
                float(line.split()[-1])
                for line in lines
                if line.startswith('engine_outstanding_tokens{pool="short"')
            ]
            if len(outstanding) == 2 and min(outstanding) >= tokens:
                return
            await asyncio.sleep(0.02)


async def test_scaling_down_loses_no_request(pair: Server) -> None:
    await asyncio.to_thread(wait_for_engines, pair, 2)
    await scale_under_traffic(pair, 1)


async def scale_under_traffic(server: Server, engines: int) -> None:
    """Give the short pool so many engines while clients ask; fails where one is not answered."""
    statuses: list[int] = []
    scaled = asyncio.Event()

    async def ask_on(session: aiohttp.ClientSession) -> None:
        while not scaled.is_set():
            async with session.post(COMPLETIONS, json=body(40)) as answer:
                await answer.read()
                statuses.append(answer.status)

    async with aiohttp.ClientSession(server.url) as session:
        asking = [asyncio.create_task(ask_on(session)) for _ in range(4)]
        try:
            await asyncio.to_thread(server.scale, engine_short=engines)
            await asyncio.to_thread(wait_for_engines, server, engines)
        finally:
            scaled.set()
            await asyncio.gather(*asking)
    assert set(statuses) == {200}
    assert len(statuses) > 10
