"""Another configuration takes the place of a running one, while every request is answered.

A gateway and an engine, each of which has its successor at its side before it goes. A client whose
connection closes before an answer asks again, once, as OpenAI's own clients do; how often that was
is printed.

Run from the repository's root: ``python -m pytest -s benchmarks/rolling_update.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serving import Server, demo_pool, write_deployment

CLIENTS = 4
UPDATED_S = 500


@pytest.fixture
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's long pool alone."""
    deploy = write_deployment({"all": demo_pool("long")}, tmp_path_factory.mktemp("before"))
    running = Server(deploy)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def pids(server: Server) -> set[int]:
    return {replica.pid for replica in server.replicas("")}


async def test_an_update_loses_no_request(
    single: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = pids(single)
    while len(before) < 2:
        await asyncio.sleep(0.5)
        before = pids(single)
    shorter = demo_pool("long") | {"max_surge_percent": 100, "max_model_len": 4096}
    after = write_deployment({"all": shorter}, tmp_path_factory.mktemp("after"))
    statuses: list[int] = []
    again = 0
    updated = asyncio.Event()

    async def keep_asking(client: httpx.AsyncClient) -> None:
        nonlocal again
        body = {"model": "demo", "prompt": [65] * 300, "max_tokens": 20, "ignore_eos": True}
        while not updated.is_set():
            try:
                answer = await client.post("/v1/completions", json=body)
            except httpx.TransportError:
                again += 1
                answer = await client.post("/v1/completions", json=body)
            statuses.append(answer.status_code)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=single.url, timeout=240, limits=limits) as client:
        asking = [asyncio.create_task(keep_asking(client)) for _ in range(CLIENTS)]
        began = time.monotonic()
        await asyncio.to_thread(single.deploy, after)
        while (now := pids(single)) & before or len(now) < 2:
            assert time.monotonic() < began + UPDATED_S, single.log[-4000:]
            assert not any(task.done() for task in asking), [t.exception() for t in asking]
            await asyncio.sleep(0.5)
        single.wait_ready()
        updated.set()
        await asyncio.gather(*asking)
        too_long = {"model": "demo", "prompt": [65] * 5000, "max_tokens": 1}
        assert (await client.post("/v1/completions", json=too_long)).status_code == 400
    assert set(statuses) == {200}, statuses
    seconds = time.monotonic() - began
    print(f"updated in {seconds:.0f} s: {len(statuses)} requests, none lost, {again} asked again")
