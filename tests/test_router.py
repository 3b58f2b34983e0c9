"""Routing over fake engines that answer, refuse, die or find a request too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from serve_app.errors import EngineError, PromptTooLong, Unavailable
from serve_app.request import Call, EngineInfo
from serve_app.router import Pool, Router, keep_fresh


class FakeReply:
    """An engine's answer, already whole."""

    content_type = "application/json"

    def __init__(self, *, refused: bool = False, too_long: str | None = None) -> None:
        self.status = 400 if too_long else 200
        self.prompt_tokens = 10
        self.refused = refused
        self.too_long = too_long
        self.closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        yield b"{}"

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


def two_pools() -> tuple[Pool, Pool]:
    short, long = Pool("short", 1000), Pool("long", 8000)
    short.update([engine("s1"), engine("s2")])
    long.update([engine("l1", "long")])
    return short, long


async def answers(_engine: EngineInfo, _call: Call) -> FakeReply:
    return FakeReply()


@pytest.mark.parametrize(("fit", "pool"), [(1, "short"), (1000, "short"), (1001, "long")])
async def test_the_smallest_pool_that_holds_a_request_gets_it(fit: int, pool: str) -> None:
    router = Router(two_pools(), answers)
    assert (await router.route(call(fit=fit))).pool == pool


async def test_an_estimate_past_every_pool_still_asks_the_longest_engine() -> None:
    router = Router(two_pools(), answers)
    assert (await router.route(call(fit=9000))).pool == "long"


async def test_a_request_found_too_long_goes_to_the_next_pool_and_is_counted() -> None:
    asked: list[str] = []

    async def short_refuses(engine: EngineInfo, _call: Call) -> FakeReply:
        asked.append(engine.pool)
        return FakeReply(too_long="1200 tokens" if engine.pool == "short" else None)

    short, long = two_pools()
    answer = await Router((short, long), short_refuses).route(call())
    assert (answer.pool, answer.misroutes, asked) == ("long", 1, ["short", "long"])
    assert [short.outstanding("s1"), short.outstanding("s2"), long.outstanding("l1")] == [0, 0, 100]


async def test_too_long_for_every_pool_names_the_limit_and_the_engines_count() -> None:
    async def refuse(_engine: EngineInfo, _call: Call) -> FakeReply:
        return FakeReply(too_long="the prompt has 9001 tokens")

    with pytest.raises(PromptTooLong, match=r"8000.*9001"):
        await Router(two_pools(), refuse).route(call())


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
    assert short.outstanding(answer.engine.replica) == 0


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
    assert [e.replica for e in short.engines] == [asked[1]]  # not chosen until it reports again
    assert short.outstanding(asked[0]) == 0


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
    with pytest.raises(EngineError):
        await Router([pool], die).route(call())
    assert len(asked) == len(set(asked)) == 3


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
    assert short.outstanding("s1") + short.outstanding("s2") == 100
    routing.cancel()
    await asyncio.gather(routing, return_exceptions=True)
    assert short.outstanding("s1") + short.outstanding("s2") == 0


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

    keeping = asyncio.create_task(keep_fresh(pool, discover, 0))
    await asked_twice.wait()
    assert [e.replica for e in pool.engines] == ["e2"]
    keeping.cancel()
