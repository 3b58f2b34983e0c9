"""Routing over fake engines that answer, refuse, die or find a request too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

import pytest

from serve_app.balance import Budget, Load, State
from serve_app.batching import BatchingLimits
from serve_app.errors import (
    DeadlineExceeded,
    EngineError,
    EngineSilent,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from serve_app.pattern import LocalAttention
from serve_app.request import Call, Demand, EngineInfo
from serve_app.router import Attempts, Pool, Router, Share, keep_fresh


class FakeReply:
    """An engine's answer, already whole."""

    content_type = "application/json"

    def __init__(
        self, *, refused: bool = False, too_long: str | None = None, dies: bool = False
    ) -> None:
        self.dies = dies
        self.status = 400 if too_long else 200
        self.prompt_tokens = 10
        self.refused = refused
        self.too_long = too_long
        self.closed = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        yield b"{}"
        if self.dies:
            raise EngineError("dead")

    def close(self) -> None:
        self.closed = True


Behaviour = Callable[[EngineInfo, Call], Awaitable[FakeReply]]


def engine(replica: str, pool: str = "short") -> EngineInfo:
    return EngineInfo(replica, pool, f"http://{replica}", "token")


def call(tokens: int = 100, fit: int | None = None) -> Call:
    return Call(
        id="r",
        path="/v1/completions",
        body=b"{}",
        fit_tokens=fit or tokens,
        total_tokens=tokens,
        output_tokens=10,
    )


def under_way(pool: Pool) -> dict[str, int]:
    """Requests on each replica."""
    return {name: load.requests for name, load in pool.loads().items()}


def two_pools() -> tuple[Pool, Pool]:
    short, long = Pool("short", 1000), Pool("long", 8000)
    short.update([engine("s1"), engine("s2")])
    long.update([engine("l1", "long")])
    return short, long


async def answers_probe(_engine: EngineInfo) -> bool:
    return True


async def answers(_engine: EngineInfo, _call: Call) -> FakeReply:
    return FakeReply()


@pytest.mark.parametrize(("fit", "pool"), [(1, "short"), (1000, "short"), (1001, "long")])
async def test_the_smallest_pool_that_holds_a_request_gets_it(fit: int, pool: str) -> None:
    router = Router(two_pools(), answers)
    assert (await router.route(call(fit=fit))).pool.name == pool


async def test_an_estimate_past_every_pool_still_asks_the_longest_engine() -> None:
    router = Router(two_pools(), answers)
    assert (await router.route(call(fit=9000))).pool.name == "long"


async def test_a_request_found_too_long_goes_to_the_next_pool_and_is_counted() -> None:
    asked: list[str] = []

    async def short_refuses(engine: EngineInfo, _call: Call) -> FakeReply:
        asked.append(engine.pool)
        return FakeReply(too_long="1200 tokens" if engine.pool == "short" else None)

    short, long = two_pools()
    attempts = Attempts()
    answer = await Router((short, long), short_refuses).route(call(), attempts)
    assert (answer.pool.name, asked) == ("long", ["short", "long"])
    assert (attempts.misroutes, attempts.failures) == (1, 0)
    assert under_way(short) == {"s1": 0, "s2": 0}
    assert under_way(long) == {"l1": 1}


async def test_too_long_for_every_pool_names_the_limit_and_the_engines_count() -> None:
    async def refuse(_engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(too_long="the prompt has 9001 tokens")

    attempts = Attempts()
    with pytest.raises(PromptTooLong, match=r"8000.*9001"):
        await Router(two_pools(), refuse).route(call(), attempts)
    assert attempts.misroutes == 2


async def test_a_request_that_was_estimated_too_long_for_all_is_no_misroute() -> None:
    async def refuse(_engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(too_long="the prompt has 9001 tokens")

    attempts = Attempts()
    with pytest.raises(PromptTooLong):
        await Router(two_pools(), refuse).route(call(fit=9000), attempts)
    assert attempts.misroutes == 0


async def test_misroutes_take_nothing_from_the_attempts_that_failures_have() -> None:
    """Four pools find the request too long, then two engines die, and the third answers."""
    pools = [Pool(f"p{number}", 1000 * 2**number) for number in range(5)]
    for pool in pools:
        names = ("a", "b", "c") if pool is pools[-1] else ("a",)
        pool.update(engine(f"{pool.name}{name}", pool.name) for name in names)
    asked: list[str] = []

    async def only_the_last(engine: EngineInfo, _call: Call) -> FakeReply:
        asked.append(engine.replica)
        if len(asked) in (5, 6):
            raise EngineError("dead")
        return FakeReply(too_long=None if engine.pool == "p4" else "too long")

    attempts = Attempts()
    answer = await Router(pools, only_the_last).route(call(), attempts)
    assert answer.pool.name == "p4"
    assert len(asked) == 7
    assert (attempts.misroutes, attempts.failures) == (4, 2)


async def test_a_misrouted_request_keeps_its_place_in_a_lane_that_is_full() -> None:
    short, long = Pool("short", 500), narrow("long", max_queued=1)
    short.update([engine("s1")])

    async def short_refuses(engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(too_long="too long" if engine.pool == "short" else None)

    router = Router([short, long], short_refuses)
    first = await router.route(call(100, fit=600))
    second = asyncio.create_task(router.route(replace(call(100, fit=600), arrived=2.0)))
    await asyncio.sleep(0)
    misrouted = asyncio.create_task(router.route(replace(call(100), arrived=1.0)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert long.queued == 2
    first.close()
    (await misrouted).close()
    (await second).close()


async def test_the_replica_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    router = Router(two_pools(), answers)
    first = await router.route(call(900))
    others = [await router.route(call(100)) for _ in range(3)]
    assert first.engine.replica not in {answer.engine.replica for answer in others}


async def test_closing_an_answer_twice_releases_its_tokens_once() -> None:
    short, long = two_pools()
    answer = await Router((short, long), answers).route(call(100))
    answer.close()
    answer.close()
    assert under_way(short) == {"s1": 0, "s2": 0}


async def test_a_replica_that_dies_before_the_first_token_is_replaced() -> None:
    asked: list[str] = []

    async def first_dies(engine: EngineInfo, _call: Call) -> FakeReply:
        asked.append(engine.replica)
        if len(asked) == 1:
            raise EngineError("connection reset")
        return FakeReply()

    short, long = two_pools()
    answer = await Router((short, long), first_dies).route(call(100))
    assert sorted(asked) == ["s1", "s2"]
    assert answer.engine.replica == asked[1]
    assert short.alive == 1  # the other is not chosen until a probe of it is answered
    assert under_way(short) == {asked[0]: 0, asked[1]: 1}


async def test_a_draining_replica_passes_the_request_on() -> None:
    async def one_drains(engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(refused=engine.replica == "s1")

    short, long = two_pools()
    router = Router((short, long), one_drains)
    assert (await router.route(call())).engine.replica == "s2"


async def test_attempts_are_bounded() -> None:
    asked: list[str] = []

    async def die(engine: EngineInfo, _call: Call) -> FakeReply:
        asked.append(engine.replica)
        raise EngineError("dead")

    pool = Pool("only", 1000)
    pool.update(engine(f"e{number}", "only") for number in range(10))
    attempts = Attempts()
    with pytest.raises(EngineError):
        await Router([pool], die).route(call(), attempts)
    assert len(asked) == len(set(asked)) == attempts.failures == 3


async def test_no_live_engine_says_when_to_try_again() -> None:
    with pytest.raises(Unavailable) as refused:
        await Router([Pool("only", 1000)], answers).route(call())
    assert refused.value.retry_after


async def test_a_cancelled_call_releases_its_tokens() -> None:
    entered = asyncio.Event()

    async def never(_engine: EngineInfo, _call: Call) -> FakeReply:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    short, long = two_pools()
    routing = asyncio.create_task(Router((short, long), never).route(call(100)))
    await entered.wait()
    assert sum(under_way(short).values()) == 1
    routing.cancel()
    await asyncio.gather(routing, return_exceptions=True)
    assert under_way(short) == {"s1": 0, "s2": 0}


async def test_ready_means_that_every_pool_has_an_engine() -> None:
    short, long = two_pools()
    router = Router((short, long), answers)
    assert router.ready
    long.update([])
    assert not router.ready


async def test_a_pool_is_kept_fresh() -> None:
    pool = Pool("only", 1000)
    rounds = iter(["e1", "e2"])
    asked_twice = asyncio.Event()

    async def discover() -> list[EngineInfo]:
        if replica := next(rounds, None):
            return [engine(replica)]
        asked_twice.set()
        return await asyncio.Future()

    keeping = asyncio.create_task(keep_fresh(pool, discover, answers_probe, 0))
    await asked_twice.wait()
    assert [e.replica for e in pool.engines] == ["e2"]
    keeping.cancel()


def narrow(name: str = "only", *, max_queued: int = 2) -> Pool:
    """A pool of one replica with room for one request of 100 tokens."""
    pool = Pool(name, 1000, share=Share(overcommit=1), limits=BatchingLimits(max_queued=max_queued))
    pool.update([replace(engine("e1", name), prefill_tokens=90, kv_tokens=100)])
    return pool


async def test_a_request_without_room_waits_and_goes_when_there_is_some() -> None:
    pool = narrow()
    router = Router([pool], answers)
    first = await router.route(call(100))
    second = asyncio.create_task(router.route(call(100)))
    await asyncio.sleep(0)
    assert (pool.queued, second.done()) == (1, False)
    first.close()
    assert (await second).engine.replica == "e1"
    assert pool.queued == 0


async def test_a_full_lane_is_refused_with_a_time_to_retry() -> None:
    pool = narrow(max_queued=1)
    router = Router([pool], answers)
    first = await router.route(call(100))
    waiting = asyncio.create_task(router.route(call(100)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await router.route(call(100))
    assert refused.value.retry_after
    first.close()
    (await waiting).close()
    assert under_way(pool) == {"e1": 0}


async def test_a_deadline_that_passes_in_the_queue_ends_the_request() -> None:
    pool = narrow()
    router = Router([pool], answers)
    first = await router.route(call(100))
    soon = asyncio.get_running_loop().time() + 0.02
    with pytest.raises(DeadlineExceeded):
        await router.route(replace(call(100), deadline=soon))
    first.close()
    assert (pool.queued, under_way(pool)) == (0, {"e1": 0})


async def test_clients_that_leave_the_queue_give_their_turn_to_the_next() -> None:
    pool = narrow(max_queued=8)
    router = Router([pool], answers)
    first = await router.route(call(100))
    gone, next_ = (asyncio.create_task(router.route(call(100))) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    first.close()  # before the cancelled task has run
    assert (await next_).engine.replica == "e1"
    assert under_way(pool) == {"e1": 1}


async def test_the_death_of_the_last_engine_answers_those_who_wait() -> None:
    pool = narrow()
    router = Router([pool], answers)
    first = await router.route(call(100))
    waiting = asyncio.create_task(router.route(call(100)))
    await asyncio.sleep(0)
    pool.fail(first.lease, EngineError("dead"))
    with pytest.raises(Unavailable):
        await waiting


async def test_an_engine_that_dies_half_way_is_not_chosen_until_a_probe_is_answered() -> None:
    async def die_half_way(_engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(dies=True)

    now = 0.0
    pool = Pool("only", 1000, clock=lambda: now)
    pool.update([engine("e1", "only")])
    answer = await Router([pool], die_half_way).route(call())
    with pytest.raises(EngineError):
        _ = [chunk async for chunk in answer.chunks()]
    answer.close()
    assert pool.alive == 0
    await pool.probe(answers_probe)  # too soon
    assert pool.alive == 0
    now = 10.0
    await pool.probe(answers_probe)
    assert pool.alive == 1


async def test_equal_request_ids_are_two_requests() -> None:
    pool = narrow(max_queued=8)
    router = Router([pool], answers)
    first = await router.route(call(100))
    others = [asyncio.create_task(router.route(call(100))) for _ in range(2)]
    await asyncio.sleep(0)
    assert pool.queued == 2
    first.close()
    (await others[0]).close()
    (await others[1]).close()
    assert under_way(pool) == {"e1": 0}


async def test_a_dead_pool_is_passed_over_for_a_larger_one() -> None:
    short, long = two_pools()
    short.update([])
    attempts = Attempts()
    answer = await Router((short, long), answers).route(call(), attempts)
    assert (answer.pool.name, attempts.misroutes) == ("long", 0)


async def test_an_engine_that_leaves_while_it_is_asked_still_answers() -> None:
    pool = narrow()

    async def leave_meanwhile(_engine: EngineInfo, _call: Call) -> FakeReply:
        pool.update([])
        return FakeReply()

    answer = await Router([pool], leave_meanwhile).route(call())
    assert answer.engine.replica == "e1"
    answer.close()
    assert pool.loads() == {}


async def test_who_waits_only_for_an_engine_that_dies_is_answered_though_another_lives() -> None:
    now = 0.0
    pool = Pool("only", 1000, share=Share(overcommit=1), clock=lambda: now)
    room = {"prefill_tokens": 90, "kv_tokens": 100}
    pool.update([replace(engine("e1"), **room), replace(engine("e2"), **room)])
    first_failed = asyncio.Event()

    async def e1_fails(engine: EngineInfo, _call: Call) -> FakeReply:
        if engine.replica == "e1":
            first_failed.set()
            raise EngineError("reset")
        return FakeReply()

    router = Router([pool], e1_fails)
    on_e2 = await pool.lease(call(), frozenset({"e1"}))
    waiting = asyncio.create_task(router.route(call()))
    await first_failed.wait()
    await asyncio.sleep(0)
    now = 10.0
    await pool.probe(answers_probe)
    assert pool.alive == 2
    pool.fail(on_e2, EngineError("dead"))
    with pytest.raises(Unavailable):
        await waiting


async def test_a_probe_that_hangs_holds_up_neither_discovery_nor_other_probes() -> None:
    now = 0.0
    pool = Pool("only", 1000, clock=lambda: now)
    pool.update([engine("e1"), engine("e2")])
    for name in ("e1", "e2"):
        pool.fail(await pool.lease(call(), frozenset({"e1", "e2"} - {name})), EngineError("dead"))
    now = 10.0
    rounds = 0
    twice = asyncio.Event()
    probed: list[str] = []

    async def discover() -> list[EngineInfo] | None:
        nonlocal rounds, now
        rounds += 1
        now += 60
        if rounds > 2:
            twice.set()
        return None

    async def e1_hangs(info: EngineInfo) -> bool:
        probed.append(info.replica)
        if info.replica == "e1":
            await asyncio.Event().wait()
        return True

    keeping = asyncio.create_task(keep_fresh(pool, discover, e1_hangs, 0))
    await twice.wait()
    assert pool.alive == 1
    assert sorted(probed) == ["e1", "e2"]  # one that is under way is not sent again
    assert len(pool.engines) == 2  # who could not tell changes nothing
    keeping.cancel()


async def test_a_request_waits_for_the_first_engine_of_a_pool_that_can_start_one() -> None:
    pool = Pool("a", 100, cold_start_s=30)
    assert pool.ready
    waiting = asyncio.create_task(pool.lease(call()))
    await asyncio.sleep(0)
    assert pool.wants_waking
    pool.update([engine("new")])
    lease = await waiting
    assert lease.replica == "new"
    assert not pool.wants_waking


async def test_waiting_for_a_first_engine_ends() -> None:
    pool = Pool("a", 100, cold_start_s=0.01)
    with pytest.raises(Unavailable):
        await pool.lease(call())
    assert pool.queued == 0
    assert pool.demand("g").tokens == 0


async def test_an_engine_that_stops_while_others_may_start_loses_no_request() -> None:
    pool = Pool("a", 100, cold_start_s=30)
    pool.update([engine("old")])
    lease = await pool.lease(call())
    pool.fail(lease, EngineSilent("it refuses new requests"))
    again = asyncio.create_task(pool.lease(call(), frozenset({"old"})))
    await asyncio.sleep(0)
    pool.update([])
    await asyncio.sleep(0)
    assert pool.wants_waking
    pool.update([engine("new")])
    assert (await again).replica == "new"


async def test_demand_is_all_that_waits_or_is_under_way_and_how_late_first_tokens_are() -> None:
    pool = Pool("a", 1000, share=Share(overcommit=1))
    pool.update([replace(engine("e"), prefill_tokens=10, kv_tokens=10)])
    first = await pool.lease(call(100))
    second = asyncio.create_task(pool.lease(call(100)))
    await asyncio.sleep(0)
    assert pool.queued == 1
    assert pool.demand("g") == Demand("g", tokens=2 * (90 + 100))
    pool.prefilled(first, 1.5)
    assert pool.demand("g") == Demand("g", tokens=100 + 190, ttft_s=1.5)
    pool.finish(first)
    pool.finish(await second)
    assert pool.demand("g").tokens == 0


async def test_a_replica_is_asked_for_once_while_requests_wait() -> None:
    pool = Pool("a", 100, cold_start_s=30)
    woken: list[int] = []
    started = asyncio.Event()

    async def discover() -> list[EngineInfo]:
        return [engine("new")] if started.is_set() else []

    async def wake() -> None:
        woken.append(1)
        await asyncio.sleep(0.05)
        started.set()

    async def probe(_engine: EngineInfo) -> bool:
        return True

    fresh = asyncio.create_task(keep_fresh(pool, discover, probe, 0.01, wake))
    await asyncio.sleep(0.03)
    assert not woken, "nobody waits yet"
    assert (await asyncio.wait_for(pool.lease(call()), 5)).replica == "new"
    assert woken == [1]
    fresh.cancel()


async def test_who_waits_when_the_last_engine_dies_waits_no_longer_than_one_takes_to_start() -> (
    None
):
    pool = Pool("only", 1000, share=Share(overcommit=1), cold_start_s=0.05)
    pool.update([replace(engine("e1", "only"), prefill_tokens=90, kv_tokens=100)])
    router = Router([pool], answers)
    first = await router.route(call(100))
    waiting = asyncio.create_task(router.route(call(100)))
    await asyncio.sleep(0)
    pool.fail(first.lease, EngineError("dead"))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 5)
    assert pool.queued == 0


async def test_a_client_that_leaves_in_the_turn_in_which_its_lease_comes_holds_nothing() -> None:
    pool = narrow()
    router = Router([pool], answers)
    first = await router.route(call(100))
    leaving = asyncio.create_task(router.route(call(100)))
    await asyncio.sleep(0)
    first.close()  # the lease is given
    assert under_way(pool) == {"e1": 1}
    leaving.cancel()  # before the task has run
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    assert under_way(pool) == {"e1": 0}


async def test_a_local_plan_bounds_the_kv_cache_that_a_request_costs() -> None:
    pool = Pool("only", 8000)
    plan = LocalAttention(sliding_window=512, full_attention_every=4).rules(8)
    pool.update([replace(engine("e1"), rules=plan)])
    await pool.lease(call(4000))
    assert pool.loads() == {"e1": Load(State.LIVE, 1, prefill=3990, kv=(6 * 512 + 2 * 4000) // 8)}


@pytest.mark.parametrize(
    ("error", "state", "left"),
    [(EngineSilent("no token"), State.SILENT, 1), (EngineError("reset"), State.DEAD, 0)],
)
async def test_a_silent_engine_keeps_what_it_may_yet_answer_and_a_dead_one_nothing(
    error: EngineError, state: State, left: int
) -> None:
    pool = Pool("only", 1000)
    pool.update([engine("e1", "only")])
    failed, other = await pool.lease(call()), await pool.lease(call())
    pool.fail(failed, error)
    assert pool.alive == 0
    load = pool.loads()["e1"]
    assert (load.state, load.requests) == (state, left)
    pool.finish(other)
    assert under_way(pool) == {"e1": 0}


async def test_two_gateways_share_what_an_engine_has() -> None:
    room = replace(engine("e1"), prefill_tokens=1000, kv_tokens=3000)
    assert Share(gateways=1, overcommit=2.0).of(room) == Budget(prefill=2000, kv=6000)
    assert Share(gateways=2, overcommit=2.0).of(room) == Budget(prefill=1000, kv=3000)
