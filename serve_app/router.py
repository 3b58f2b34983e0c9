"""Which pool, which replica, when, and what to do when that goes wrong.

A request goes to the smallest pool that holds it by estimate. There it waits, for milliseconds
while there is room, in the lane of its length (``batching``), and leaves for the replica with the
fewest outstanding tokens (``balance``). The engine counts exactly: when it finds the request too
long, the next larger pool is asked, before any token was produced. A replica that dies or stays
silent before the first token is replaced by another one, a bounded number of times.

This module is the asyncio shell: it holds futures, timers and the clock, and decides nothing that
the pure modules could decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from serve_app.balance import Balancer, Budget, Cost, Lease, Load, State
from serve_app.batching import Batcher, BatchingLimits, Waiting
from serve_app.capacity import kv_tokens
from serve_app.errors import (
    DeadlineExceeded,
    EngineError,
    EngineSilent,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from serve_app.pattern import FULL, LayerRule
from serve_app.request import Call, Demand, EngineInfo

log = logging.getLogger(__name__)

ATTEMPTS = 3  # engines that may fail before a request is given up
RETRY_AFTER_S = 5.0  # what a client is told while no engine is alive
_TTFT_WINDOW_S = 15.0  # of the time to first token that autoscaling is told
_TTFT_SAMPLES = 1024


class Reply(Protocol):
    """What the router needs of an engine's answer; see ``upstream.Reply``."""

    status: int
    content_type: str
    prompt_tokens: int
    refused: bool
    too_long: str | None

    def chunks(self) -> AsyncGenerator[bytes, None]: ...

    def close(self) -> None: ...


Open = Callable[[EngineInfo, Call], Awaitable[Reply]]
Probe = Callable[[EngineInfo], Awaitable[bool]]
Wake = Callable[[], Coroutine[Any, Any, None]]
# None where nobody could tell in time: what is known stays.
Discover = Callable[[], Awaitable[Sequence[EngineInfo] | None]]


@dataclass(frozen=True, slots=True)
class Share:
    """What one gateway may have under way: ``overcommit`` x the engines' room / ``gateways``.

    More than fits is sent because most answers end before their output budget.
    """

    gateways: int = 1
    overcommit: float = 2.0

    def of(self, engine: EngineInfo) -> Budget:
        whole = Budget(
            prefill=round(engine.prefill_tokens * self.overcommit),
            kv=round(engine.kv_tokens * self.overcommit),
        )
        return whole.share(self.gateways)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a waiting request waits for, and the replicas that it must not get."""

    lease: asyncio.Future[Lease]
    avoid: frozenset[str]
    patience: asyncio.Timeout  # runs while no replica is alive and one may be started

    def wait_until(self, at: float | None) -> None:
        if not self.lease.done() and not self.patience.expired():
            self.patience.reschedule(at)


_WHOLE = Share()
_LIMITS = BatchingLimits()


class Pool:
    """One pool as one gateway sees it: its replicas, and the requests that wait for them."""

    def __init__(
        self,
        name: str,
        limit: int,
        *,
        share: Share = _WHOLE,
        limits: BatchingLimits = _LIMITS,
        cold_start_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limit = limit  # prompt plus output budget, in tokens
        self.absence: str | None = None  # why no engine is here; kept by ``absence``
        self._share = share
        # How long a request waits for a first engine; None where none comes by being asked for.
        self._cold_start_s = cold_start_s
        self._clock = clock
        self._rules: tuple[LayerRule, ...] = (FULL,)  # of the engines that were last here
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_TTFT_SAMPLES)
        self._balancer = Balancer()
        self._batcher = Batcher(self._balancer, limits)
        self._engines: dict[str, EngineInfo] = {}
        self._waiting: dict[str, _Turn] = {}
        self._probing: set[str] = set()
        self._live: frozenset[str] = frozenset()  # at the last step
        self._timer: asyncio.TimerHandle | None = None
        self._numbers = itertools.count()  # clients may send the same request id twice

    @property
    def engines(self) -> tuple[EngineInfo, ...]:
        """Those that discovery lists, whether or not they answer."""
        return tuple(self._engines.values())

    @property
    def alive(self) -> int:
        """How many replicas take requests."""
        return self._balancer.alive

    @property
    def ready(self) -> bool:
        """Whether a request would be answered, if only after an engine has started for it."""
        return self.alive > 0 or self._cold_start_s is not None

    @property
    def wants_waking(self) -> bool:
        """Whether requests wait for an engine that has yet to be asked for."""
        return self._cold_start_s is not None and not self.alive and self.queued > 0

    @property
    def lacks_engine(self) -> bool:
        """Whether none is listed where one is expected: always, or while a request waits for it."""
        return not self._engines and (self._cold_start_s is None or self.queued > 0)

    @property
    def queued(self) -> int:
        return len(self._batcher)

    @property
    def queued_tokens(self) -> int:
        return self._batcher.queued_tokens

    def loads(self) -> dict[str, Load]:
        """What this gateway has under way on each replica."""
        return self._balancer.loads()

    def demand(self, gateway: str) -> Demand:
        """What this gateway asks of the pool now, for its autoscaling."""
        under_way = sum(load.prefill + load.kv for load in self.loads().values())
        since = self._clock() - _TTFT_WINDOW_S
        recent = sorted(seconds for at, seconds in self._first_tokens if at >= since)
        p95 = recent[int(0.95 * (len(recent) - 1))] if recent else 0.0
        return Demand(gateway, self.queued_tokens + under_way, p95)

    def update(self, engines: Iterable[EngineInfo]) -> None:
        """Take over what discovery found."""
        self._engines = {engine.replica: engine for engine in engines}
        if self._engines:
            self.absence = None
        self._rules = next((engine.rules for engine in self._engines.values()), self._rules)
        self._balancer.update(
            {engine.replica: self._share.of(engine) for engine in self._engines.values()}
        )
        self._step()

    def engine(self, lease: Lease) -> EngineInfo | None:
        return self._engines.get(lease.replica)

    def has_other_than(self, tried: frozenset[str]) -> bool:
        """Whether a replica takes requests that is not in ``tried``."""
        return not self._balancer.live() <= tried

    async def lease(self, call: Call, avoid: frozenset[str] = frozenset()) -> Lease:
        """Wait for room on a replica that is not in ``avoid``.

        Raises ``Overloaded`` when the lane is full, ``DeadlineExceeded`` when the call's deadline
        comes first and ``Unavailable`` when no such replica is alive; where one can be started,
        only after it did not come in time. A cancel leaves nothing behind.
        """
        if self._hopeless(avoid):
            raise self._unavailable(avoid)
        waiting = self._as_waiting(call, avoid)
        if avoid:  # it had its turn already
            self._batcher.requeue(waiting)
        else:
            self._batcher.add(waiting)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(None) as patience:
                self._waiting[waiting.id] = _Turn(future, avoid, patience)
                self._waiting[waiting.id].wait_until(self._patience_ends())
                self._step()
                return await future
        except (TimeoutError, asyncio.CancelledError) as error:
            # The lease may have come in the same turn of the loop.
            if future.done() and not future.cancelled() and future.exception() is None:
                self.finish(future.result())
            if isinstance(error, TimeoutError):
                raise self._unavailable(avoid) from None
            raise
        finally:
            self._waiting.pop(waiting.id, None)
            self._batcher.cancel(waiting.id)

    def prefilled(self, lease: Lease, ttft_s: float | None = None) -> None:
        """The first token came; after how long, where that says something of the engines."""
        if ttft_s is not None:
            self._first_tokens.append((self._clock(), ttft_s))
        self._balancer.prefilled(lease)
        self._step()

    def finish(self, lease: Lease) -> None:
        """The request ended, however; more than once is harmless."""
        self._batcher.finish(lease, self._clock())
        self._step()

    def fail(self, lease: Lease, error: EngineError) -> None:
        """Stop choosing the lease's replica until a probe of it is answered."""
        state = State.SILENT if isinstance(error, EngineSilent) else State.DEAD
        log.warning("engine %s of pool %s: %s (%s)", lease.replica, self.name, error, state)
        self._balancer.eject(lease.replica, state, self._clock())
        self._batcher.finish(lease, self._clock())
        self._step()

    async def probe(self, ask: Probe) -> None:
        """Ask each ejected replica whose time has come, and readmit those that answer."""
        due = self._balancer.probes_due(self._clock())
        free = [name for name in due if name in self._engines and name not in self._probing]
        await asyncio.gather(*(self._probe_one(name, ask) for name in free))

    async def _probe_one(self, name: str, ask: Probe) -> None:
        self._probing.add(name)
        try:
            answered = await ask(self._engines[name])
        finally:
            self._probing.discard(name)
        if answered:
            log.info("engine %s of pool %s answers again", name, self.name)
            self._balancer.readmit(name)
            self._step()

    def _as_waiting(self, call: Call, avoid: frozenset[str]) -> Waiting:
        kv = kv_tokens(self._rules, call.total_tokens)
        return Waiting(
            id=str(next(self._numbers)),
            tokens=call.total_tokens,
            cost=Cost(prefill=call.total_tokens - call.output_tokens, kv=round(kv)),
            arrived=call.arrived,
            priority=call.priority,
            deadline=call.deadline,
            key=call.prefix_key,
            avoid=avoid,
        )

    def _patience_ends(self) -> float | None:
        """When those who wait for a first engine have waited long enough, by the loop's clock."""
        if self.alive or self._cold_start_s is None:
            return None
        return asyncio.get_running_loop().time() + self._cold_start_s

    def _hopeless(self, avoid: frozenset[str]) -> bool:
        """Whether no replica outside ``avoid`` takes requests, and none is to be expected."""
        if not self.alive and self._cold_start_s is not None:
            return False
        return not self.has_other_than(avoid)

    def _unavailable(self, avoid: frozenset[str]) -> Unavailable:
        which = "No other engine" if avoid else "No engine"
        return Unavailable(
            f"{which} of pool {self.name} is alive; try again shortly.",
            retry_after=RETRY_AFTER_S,
        )

    def _step(self) -> None:
        """Let the batcher decide, wake those it released, and set the clock for its next turn."""
        now = self._clock()
        in_vain = True
        while in_vain:
            in_vain = False
            step = self._batcher.step(now)
            for waiting, lease in step.released:
                future = self._waiting[waiting.id].lease
                if future.done():  # its client left, and its task has not run since
                    in_vain = self._batcher.finish(lease, now) or in_vain
                else:
                    future.set_result(lease)
            for waiting in step.expired:
                _fail(
                    self._waiting[waiting.id],
                    DeadlineExceeded("The deadline passed before an engine had room."),
                )
            in_vain = self._dismiss_hopeless() or in_vain
        self._set_timer(now)

    def _dismiss_hopeless(self) -> bool:
        """Answer those whom no live replica may take any more. Whether there were some."""
        live = self._balancer.live()
        if live == self._live:
            return False
        lit = bool(live) != bool(self._live)  # or gone dark
        self._live = live
        dismissed = False
        for name, turn in self._waiting.items():
            if not turn.lease.done() and self._hopeless(turn.avoid):
                _fail(turn, self._unavailable(turn.avoid))
                dismissed = self._batcher.cancel(name) or dismissed
            elif lit:
                turn.wait_until(self._patience_ends())
        return dismissed

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._batcher.next_deadline(now)) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.001, at - now), self._step)


def _fail(turn: _Turn, error: RequestError) -> None:
    if not turn.lease.done():
        turn.lease.set_exception(error)


@dataclass(slots=True)
class Attempts:
    """What became of the engines that one call asked so far, however the call ends.

    An engine that finds the call too long has not failed. It counts as a misroute where the
    estimate had said that the call fits, of which there is one for each pool at most.
    """

    failures: int = 0
    misroutes: int = 0
    asked: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Answer:
    """An engine's answer on its way to the client. Close it, whatever becomes of the client."""

    pool: Pool
    engine: EngineInfo
    reply: Reply
    lease: Lease
    waited_s: float

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes in order. Raises ``EngineError`` when the engine fails half way."""
        try:
            async with contextlib.aclosing(self.reply.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except EngineError as error:
            self.pool.fail(self.lease, error)
            raise

    def close(self) -> None:
        self.reply.close()
        self.pool.finish(self.lease)


class Router:
    """Routes calls over ``pools``; ``open_call`` sends one call to one engine."""

    def __init__(self, pools: Sequence[Pool], open_call: Open) -> None:
        self.pools = sorted(pools, key=lambda pool: pool.limit)
        self._open = open_call

    @property
    def ready(self) -> bool:
        """Whether every pool has a live replica, or starts one for whoever asks."""
        return all(pool.ready for pool in self.pools)

    @property
    def limit(self) -> int:
        """The most tokens, prompt and output budget together, that any pool holds."""
        return self.pools[-1].limit

    async def route(self, call: Call, attempts: Attempts | None = None) -> Answer:
        """Open ``call`` on an engine and return once its first bytes are here.

        A pool without a live engine is passed over for a larger one. Raises ``PromptTooLong``
        when no pool holds the call, ``EngineError`` when each engine asked has failed, and
        whatever :meth:`Pool.lease` raises. ``attempts`` is kept up to date, also where it raises.
        """
        attempts = attempts or Attempts()
        fitting = [pool for pool in self.pools if call.fit_tokens <= pool.limit]
        error: RequestError
        for pool in fitting or self.pools[-1:]:
            try:
                answer = await self._ask(pool, call, attempts)
            except Unavailable as dead:
                error = dead
                continue
            if answer.reply.too_long is None:
                return answer
            answer.close()
            attempts.misroutes += bool(fitting)  # else the estimate had said so
            error = self._too_long(call, answer.reply.too_long)
            if exact := answer.reply.prompt_tokens:
                call = replace(call, total_tokens=exact + call.output_tokens)
        raise error

    def _too_long(self, call: Call, sentence: str) -> PromptTooLong:
        return PromptTooLong(
            f"No pool holds this request: the longest takes {self.limit} tokens, prompt and "
            f"output budget ({call.output_tokens}) together. {sentence}",
            param="messages" if call.path.startswith("/v1/chat") else "prompt",
        )

    async def _ask(self, pool: Pool, call: Call, attempts: Attempts) -> Answer:
        """The answer of one of the pool's engines, whatever it says."""
        began = time.monotonic()
        while attempts.failures < ATTEMPTS:
            cold = not pool.alive
            lease = await pool.lease(call, frozenset(attempts.asked))
            waited = time.monotonic() - began
            attempts.asked.add(lease.replica)
            engine = pool.engine(lease)
            if engine is None:  # it left between the lease and now
                pool.finish(lease)
                continue
            reply = await self._try(pool, engine, lease, call)
            if reply is not None:
                pool.prefilled(lease, None if cold else time.monotonic() - began)
                return Answer(pool, engine, reply, lease, waited)
            attempts.failures += 1
        raise EngineError(
            f"{attempts.failures} engines failed to answer; the last was of {pool.name}."
        )

    async def _try(self, pool: Pool, engine: EngineInfo, lease: Lease, call: Call) -> Reply | None:
        """The engine's reply, or None if it failed and another may be asked."""
        try:
            reply = await self._open(engine, call)
        except EngineError as error:
            pool.fail(lease, error)
            return None
        except BaseException:
            pool.finish(lease)
            raise
        if reply.refused:
            reply.close()
            pool.fail(lease, EngineSilent("it refuses new requests"))
            return None
        return reply


async def keep_fresh(
    pool: Pool, discover: Discover, probe: Probe, interval_s: float, wake: Wake | None = None
) -> None:
    """Ask for the pool's live replicas every ``interval_s`` seconds, until cancelled.

    Where requests wait and nothing runs, ``wake`` asks for a first replica. It and probes run
    aside: a replica that is silent must not keep others from being found.
    """
    waking: asyncio.Task[None] | None = None
    async with asyncio.TaskGroup() as aside:
        while True:
            engines = await discover()
            if engines is not None:
                pool.update(engines)
            aside.create_task(pool.probe(probe))
            if wake and pool.wants_waking and (waking is None or waking.done()):
                waking = aside.create_task(wake())
            await asyncio.sleep(interval_s)
