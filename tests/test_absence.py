"""What is said of a pool whose engine does not come, when, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve_app.absence import LOOK_EVERY_S, PATIENCE_S, explain_absences
from serve_app.request import Call, EngineInfo
from serve_app.router import Pool

ENGINE = EngineInfo("e", "long", "http://e", "token")
CALL = Call("r", "/", b"", fit_tokens=40, total_tokens=40, output_tokens=8)


class Watch:
    """A watch over pools whose seconds pass when told; it counts what it asks for."""

    def __init__(self, *pools: Pool, says: str | None = "1 GPU is missing") -> None:
        self.now = 0.0
        self.says = says
        self.asked: list[str] = []
        self._watching = asyncio.create_task(
            explain_absences(
                pools, self._explain, patience_s=25, every_s=0, repeat_s=60, clock=lambda: self.now
            )
        )

    async def _explain(self, pool: str) -> str | None:
        self.asked.append(pool)
        return self.says

    async def at(self, now: float) -> None:
        """Return when the watch has looked at this moment."""
        self.now = now
        for _ in range(4):
            await asyncio.sleep(0)

    def stop(self) -> None:
        self._watching.cancel()


@asynccontextmanager
async def watching(*pools: Pool, says: str | None = "1 GPU is missing") -> AsyncIterator[Watch]:
    watch = Watch(*pools, says=says)
    await watch.at(0)
    yield watch
    watch.stop()


async def test_a_pool_without_an_engine_is_explained_in_time_and_until_it_has_one() -> None:
    assert PATIENCE_S + LOOK_EVERY_S <= 30
    pool = Pool("long", 64)
    async with watching(pool) as watch:
        await watch.at(24.9)
        assert pool.absence is None
        assert watch.asked == []
        await watch.at(25)
        assert pool.absence == "1 GPU is missing"
        pool.update([ENGINE])
        assert pool.absence is None
        await watch.at(100)
        pool.update([])
        await watch.at(101)
        assert pool.absence is None, "it counts from when the last engine left"
        await watch.at(126)
        assert pool.absence == "1 GPU is missing"


async def test_it_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool("long", 64)
    lines = []
    async with watching(pool) as watch:
        for now in (25, 30, 84.9, 85, 90):
            await watch.at(now)
            lines.append(len(caplog.messages))
    assert lines == [1, 1, 1, 2, 2]
    assert caplog.messages[0] == "no engine of pool long: 1 GPU is missing"


async def test_an_engine_that_is_placed_and_starts_is_not_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool("long", 64)
    async with watching(pool, says=None) as watch:
        await watch.at(25)
        assert watch.asked[-1] == "long"
        assert pool.absence is None
        assert not caplog.messages


async def test_a_pool_that_has_stopped_is_missed_only_while_a_request_waits() -> None:
    idle, asleep = Pool("idle", 64, cold_start_s=99), Pool("asked", 64, cold_start_s=99)
    async with watching(idle, asleep) as watch:
        waiting = asyncio.create_task(asleep.lease(CALL))
        await watch.at(1)
        await watch.at(25.9)
        assert asleep.absence is None
        await watch.at(26)
        assert asleep.absence == "1 GPU is missing"
        assert idle.absence is None
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await watch.at(27)
        assert asleep.absence is None
