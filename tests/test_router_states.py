"""Router and pools under arbitrary histories, in virtual time over fake engines.

Requests arrive, are cancelled, and are stalled, refused, misrouted and cut off; engines die, fall
silent, drain, come back, and are listed and unlisted. Whatever the order, each request ends in an
answer or in a ``RequestError``, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_app.batching import BatchingLimits
from serve_app.errors import EngineError, EngineSilent, PromptTooLong, RequestError, Unavailable
from serve_app.request import Call, EngineInfo
from serve_app.router import Pool, Router, Share, keep_fresh

FIRST_TOKEN_TIMEOUT_S = 20.0
INTER_TOKEN_TIMEOUT_S = 5.0
LIMITS = {"short": 1000, "long": 8000}
OUTPUT = 50


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__(_Jump(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _Jump(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everything waits for ever"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


@dataclass
class FakeEngine:
    """An engine that answers at its own pace until it is told to do something else."""

    info: EngineInfo
    listed: bool = True
    dead: bool = False
    silent: bool = False
    draining: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: set[FakeReply] = field(default_factory=set)

    def set(self, **states: bool) -> None:
        for name, value in states.items():
            setattr(self, name, value)
        self.changed.set()
        self.changed = asyncio.Event()

    async def work(self, seconds: float) -> None:
        """Compute for ``seconds``, not counting any silence. Raises when the engine dies."""
        loop = asyncio.get_running_loop()
        left = seconds
        while left > 0 or self.silent or self.dead:
            if self.dead:
                raise EngineError("connection reset")
            began, changed = loop.time(), self.changed
            try:
                async with asyncio.timeout(None if self.silent else left):
                    await changed.wait()
            except TimeoutError:
                return
            if not self.silent:
                left -= loop.time() - began


class FakeReply:
    content_type = "text/event-stream"

    def __init__(self, engine: FakeEngine, call: Call, exact: int, pace: float) -> None:
        self._engine = engine
        self._pace = pace
        fits = exact + call.output_tokens <= LIMITS[engine.info.pool]
        self.refused = engine.draining
        self.status = 503 if self.refused else 200 if fits else 400
        self.too_long = None if fits or self.refused else f"{exact} tokens"
        self.prompt_tokens = 0 if self.refused else exact
        engine.under_way.add(self)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        yield b"first"
        for _ in range(3):
            try:
                async with asyncio.timeout(INTER_TOKEN_TIMEOUT_S):
                    await self._engine.work(self._pace)
            except TimeoutError as error:
                raise EngineSilent("no token in time") from error
            yield b"next"

    def close(self) -> None:
        self._engine.under_way.discard(self)


@dataclass
class Request:
    """What one client asked, and what came of it."""

    call: Call
    exact: int
    pace: float
    task: asyncio.Task[int]
    cancelled: bool = False


class RouterStates(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.engines: dict[str, FakeEngine] = {}
        self.requests: dict[str, Request] = {}
        self.keepers: list[asyncio.Task[None]] = []

    @initialize(
        shorts=st.integers(1, 3),
        longs=st.integers(0, 2),
        max_queued=st.integers(1, 6),
        overcommit=st.sampled_from([0.5, 2.0]),
        cold_start_s=st.sampled_from([None, None, 30.0]),
    )
    def start(
        self,
        shorts: int,
        longs: int,
        max_queued: int,
        overcommit: float,
        cold_start_s: float | None,
    ) -> None:
        limits = BatchingLimits(max_queued=max_queued, max_wait_s=1.0, batch_max_wait_s=3.0)
        self.pools = {
            name: Pool(
                name,
                limit,
                share=Share(1, overcommit),
                limits=limits,
                cold_start_s=cold_start_s,
                clock=self.loop.time,
            )
            for name, limit in LIMITS.items()
        }
        self.router = Router(list(self.pools.values()), self._open)
        for pool, count in (("short", shorts), ("long", longs)):
            for _ in range(count):
                self._add(pool)
        self._do(self._keep())

    async def _keep(self) -> None:
        for pool in self.pools.values():
            keeping = keep_fresh(pool, lambda pool=pool: self._discover(pool), self._probe, 1.0)
            self.keepers.append(asyncio.create_task(keeping))
        await asyncio.sleep(0.01)

    def _do(self, work: Any) -> None:
        self.loop.run_until_complete(work)

    def _add(self, pool: str) -> None:
        name = f"{pool}-{len(self.engines)}"
        info = EngineInfo(
            name, pool, f"http://{name}", "t", prefill_tokens=600, kv_tokens=LIMITS[pool] + 500
        )
        self.engines[name] = FakeEngine(info)

    async def _discover(self, pool: Pool) -> list[EngineInfo] | None:
        engines = [engine for engine in self.engines.values() if engine.info.pool == pool.name]
        if any(engine.silent and engine.listed for engine in engines):
            await asyncio.sleep(5)  # as deployments' discovery, which waits for each one
            return None
        return [engine.info for engine in engines if engine.listed and not engine.dead]

    async def _probe(self, info: EngineInfo) -> bool:
        engine = self.engines[info.replica]
        try:
            async with asyncio.timeout(FIRST_TOKEN_TIMEOUT_S):
                await engine.work(0.05)
        except (EngineError, TimeoutError):
            return False
        return not engine.draining

    async def _open(self, info: EngineInfo, call: Call) -> FakeReply:
        request = self.requests[call.id]
        engine = self.engines[info.replica]
        try:
            async with asyncio.timeout(FIRST_TOKEN_TIMEOUT_S):
                await engine.work(0 if engine.draining else request.pace)
        except TimeoutError as error:
            raise EngineSilent("no first token in time") from error
        return FakeReply(engine, call, request.exact, request.pace)

    async def _serve(self, call: Call) -> int:
        answer = await self.router.route(call)
        try:
            return len([chunk async for chunk in answer.chunks()])
        finally:
            answer.close()

    @rule(
        guess=st.integers(1, 9000),
        error=st.floats(0.5, 1.5),
        pace=st.sampled_from([0.01, 0.3, 4.0]),
        priority=st.sampled_from(["interactive", "batch"]),
        deadline=st.sampled_from([None, None, 0.0, 0.5, 10.0]),
        many=st.integers(1, 4),
    )
    def arrive(
        self, guess: int, error: float, pace: float, priority: Any, deadline: Any, many: int
    ) -> None:
        now = self.loop.time()
        for _ in range(many):
            call = Call(
                id=str(len(self.requests)),
                path="/v1/completions",
                body=b"",
                fit_tokens=guess + OUTPUT,
                total_tokens=guess + OUTPUT,
                output_tokens=OUTPUT,
                arrived=now,
                priority=priority,
                deadline=None if deadline is None else now + deadline,
            )
            task = self.loop.create_task(self._serve(call))
            self.requests[call.id] = Request(call, max(1, int(guess * error)), pace, task)

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.4, 3.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self._do(asyncio.sleep(seconds))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        under_way = [name for name, request in self.requests.items() if not request.task.done()]
        if under_way:
            request = self.requests[data.draw(st.sampled_from(under_way))]
            request.cancelled = True
            request.task.cancel()

    @rule(
        data=st.data(),
        change=st.sampled_from(["dead", "silent", "draining", "listed"]),
        value=st.booleans(),
    )
    def engine_changes(self, data: st.DataObject, change: str, value: bool) -> None:
        engine = self.engines[data.draw(st.sampled_from(sorted(self.engines)))]
        if not engine.dead:  # a process that died is replaced, never revived
            engine.set(**{change: value})

    @rule(pool=st.sampled_from(sorted(LIMITS)))
    def scale_up(self, pool: str) -> None:
        if len(self.engines) < 12:
            self._add(pool)

    @invariant()
    def no_keeper_has_ended(self) -> None:
        for keeper in self.keepers:
            assert not keeper.done(), keeper.exception()

    def teardown(self) -> None:
        try:
            if self.keepers:
                self._finish()
        finally:
            self._do(self._stop())
            self.loop.close()

    def _finish(self) -> None:
        # Whatever capacity is left, enough time for one request after the other.
        for engine in self.engines.values():
            engine.set(silent=False)
        pending = [request.task for request in self.requests.values() if not request.task.done()]
        if pending:
            limit = 60 + sum(4 * request.pace + 1 for request in self.requests.values())
            self._do(asyncio.wait(pending, timeout=limit))
        for request in self.requests.values():
            self._check_end(request)
        for pool in self.pools.values():
            assert (pool.queued, pool.queued_tokens, pool._waiting) == (0, 0, {})
            for load in pool.loads().values():
                assert (load.requests, load.prefill, load.kv) == (0, 0, 0)
        assert not any(engine.under_way for engine in self.engines.values())
        for pool in LIMITS:
            self._add(pool)
        self._do(asyncio.sleep(6))
        assert self.router.ready

    def _check_end(self, request: Request) -> None:
        task = request.task
        assert task.done(), f"request {request.call.id} hangs"
        if task.cancelled():
            assert request.cancelled
            return
        error = task.exception()
        if error is None:
            assert task.result() == 4
            assert request.exact + OUTPUT <= LIMITS["long"]
            return
        assert isinstance(error, RequestError), repr(error)
        if isinstance(error, PromptTooLong):
            assert request.exact + OUTPUT > LIMITS["long"]
        if isinstance(error, Unavailable):
            assert error.retry_after

    async def _stop(self) -> None:
        tasks = [*self.keepers, *(request.task for request in self.requests.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


RouterStates.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRouterStates = RouterStates.TestCase
