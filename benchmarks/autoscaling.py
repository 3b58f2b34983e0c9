"""A pool that load takes from no replica to two and back, while every request is answered.

Run from the repository's root: ``python -m pytest -s benchmarks/autoscaling.py``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serving import Server, demo_pool, write_deployment

DOWN_DELAY_S = 12


@pytest.fixture
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's long pool alone, with nothing running until somebody asks."""
    pool = demo_pool("long") | {
        "autoscaling": {
            "min_replicas": 0,
            "max_replicas": 2,
            "target_tokens_per_replica": 4000,
            "up_delay_s": 1,
            "down_delay_s": DOWN_DELAY_S,
        }
    }
    running = Server(write_deployment({"elastic": pool}, tmp_path_factory.mktemp("elastic")))
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


class Watch:
    """Counts the pool's replicas and prints when their number changes."""

    def __init__(self, server: Server, client: httpx.AsyncClient) -> None:
        self._server = server
        self._client = client
        self._began = time.monotonic()

    async def replicas(self) -> int:
        text = (await self._client.get("/metrics")).text
        return len(re.findall(r"^engine_running_requests\{", text, re.MULTILINE))

    async def until(self, count: int, limit_s: float = 120) -> None:
        deadline = time.monotonic() + limit_s
        while await self.replicas() != count:
            assert time.monotonic() < deadline, self._server.log[-4000:]
            await asyncio.sleep(0.2)
        print(f"{time.monotonic() - self._began:6.1f} s: {count} replicas")


async def test_load_takes_a_pool_from_zero_to_two_and_back(elastic: Server) -> None:
    async with httpx.AsyncClient(base_url=elastic.url, timeout=240) as client:
        watch = Watch(elastic, client)
        statuses: list[int] = []

        async def ask(max_tokens: int) -> None:
            body = {"model": "demo", "prompt": [65] * 1000, "max_tokens": max_tokens}
            answer = await client.post("/v1/completions", json=body | {"ignore_eos": True})
            statuses.append(answer.status_code)

        async def keep_asking(max_tokens: int, enough: asyncio.Event) -> None:
            while not enough.is_set():
                await ask(max_tokens)

        assert await watch.replicas() == 0
        asking = asyncio.create_task(ask(4))
        await watch.until(1)
        await asking
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as many:
            for _ in range(8):
                many.create_task(keep_asking(400, enough))
            await watch.until(2)
            enough.set()
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as few:
            few.create_task(keep_asking(20, enough))
            await watch.until(1)
            enough.set()
        await watch.until(0)
        assert set(statuses) == {200}, statuses
        print(f"{len(statuses)} requests, none lost")
