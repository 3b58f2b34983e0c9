"""The scheduler: what it releases, in which order, and how long anything can wait."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.balance import Balancer, Budget, Cost, Lease, State
from serve_app.batching import Batcher, BatchingLimits, Priority, Waiting
from serve_app.errors import Overloaded

LIMITS = BatchingLimits(edges=(1024, 4096, 65536), max_queued=100, max_wait_s=2, batch_max_wait_s=8)
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")
BUDGET = Budget(prefill=8_000, kv=100_000)


def pool(
    replicas: int = 1, budget: Budget = BUDGET, limits: BatchingLimits = LIMITS
) -> tuple[Batcher, Balancer]:
    balancer = Balancer()
    balancer.update({f"r{number}": budget for number in range(replicas)})
    return Batcher(balancer, limits), balancer


def waiting(
    name: str,
    tokens: int,
    arrived: float = 0.0,
    priority: Priority = "interactive",
    deadline: float | None = None,
) -> Waiting:
    return Waiting(name, tokens, Cost(tokens, tokens), arrived, priority, deadline)


def released(batcher: Batcher, now: float) -> list[str]:
    return [request.id for request, _ in batcher.step(now).released]


def fill(batcher: Batcher, tokens: int = 60_000) -> Lease:
    """Occupy the one replica, so that what comes next waits."""
    batcher.add(waiting("running", tokens))
    ((_, lease),) = batcher.step(0.0).released
    return lease


def test_a_request_that_finds_room_is_released_at_once() -> None:
    batcher, _ = pool()
    batcher.add(waiting("a", 100))
    assert released(batcher, 0.0) == ["a"]
    assert len(batcher) == 0
    assert batcher.next_deadline(0.0) is None


def test_short_before_long_interactive_before_batch_and_first_in_first_out() -> None:
    batcher, balancer = pool()
    lease = fill(batcher)
    balancer.eject("r0", State.SILENT, 0.0)
    batcher.add(waiting("batch", 100, 0.1, "batch"))
    batcher.add(waiting("long", 3000, 0.2))
    batcher.add(waiting("first", 900, 0.3))
    batcher.add(waiting("second", 100, 0.4))
    balancer.readmit("r0")
    batcher.finish(lease, 0.5)
    assert released(batcher, 0.5) == ["first", "second", "long", "batch"]


def test_runs_of_one_class_take_turns_under_the_token_budget() -> None:
    limits = BatchingLimits(edges=(1024, 4096), run_tokens=4000)
    batcher, _ = pool(1, Budget(10**6, 10**6), limits)
    for number in range(4):
        batcher.add(waiting(f"s{number}", 1000))
        batcher.add(waiting(f"l{number}", 2000))
    assert released(batcher, 0.0) == ["s0", "s1", "l0", "s2", "s3", "l1", "l2", "l3"]


def test_short_requests_pass_a_flood_of_long_ones() -> None:
    batcher, _ = pool(2)
    for number in range(40):
        batcher.add(waiting(f"long{number}", 60_000))
    assert len(released(batcher, 0.0)) == 2  # one for each replica; the others would queue there
    for number in range(5):
        batcher.add(waiting(f"short{number}", 500, 0.1))
        assert released(batcher, 0.1) == [f"short{number}"]


def test_a_starved_class_gets_a_replica_though_short_ones_keep_coming() -> None:
    """60 short ones are always in flight: they leave 40,000 tokens, and the long one needs more."""
    batcher, balancer = pool()
    running: list[tuple[float, Lease]] = []
    now, number, served_at = 0.0, 0, None
    while served_at is None:
        assert now < 10
        number += 1
        batcher.add(waiting(f"short{number}", 1000, now))
        if number == 60:
            batcher.add(waiting("long", 65_000, now))
        for request, lease in batcher.step(now).released:
            balancer.prefilled(lease)
            running.append((now + 1, lease))  # each runs for one second
            if request.id == "long":
                served_at = now
        now = number / 60
        while running and running[0][0] <= now:
            batcher.finish(running.pop(0)[1], now)
    assert 1 + LIMITS.max_wait_s <= served_at <= 1 + LIMITS.max_wait_s + 1


def test_a_full_lane_is_refused_with_the_time_that_the_queue_needs() -> None:
    limits = BatchingLimits(edges=(1024,), max_queued=10, run_tokens=10**9)
    batcher, _ = pool(1, Budget(10_000, 10_000), limits)
    running: list[Lease] = []
    number = 0
    for tick in range(100):  # 10 requests of 2,000 tokens in each second
        now = tick * 0.1
        while len(batcher) < 10:
            number += 1
            batcher.add(waiting(f"{number}", 1000, now))
        running += [lease for _, lease in batcher.step(now).released]
        batcher.finish(running.pop(0), now)
    while len(batcher) < 10:
        number += 1
        batcher.add(waiting(f"{number}", 1000, now))
    with pytest.raises(Overloaded, match="10 interactive requests of up to 1024") as caught:
        batcher.add(waiting("more", 1000, now))
    assert caught.value.retry_after == pytest.approx(1, abs=1)
    assert batcher.queued_tokens == 20_000
    for _ in range(40):  # the engine slows down to a tenth; the answer follows
        now += 1.0
        running += [lease for _, lease in batcher.step(now).released]
        batcher.finish(running.pop(0), now)
        while len(batcher) < 10:
            number += 1
            batcher.add(waiting(f"{number}", 1000, now))
    assert batcher.retry_after() == pytest.approx(10, abs=2)
    batcher.add(waiting("batch", 1000, now, "batch"))  # a full lane refuses no other


def test_one_past_its_deadline_is_dropped_before_it_costs_anything() -> None:
    batcher, balancer = pool()
    lease = fill(batcher)
    batcher.add(waiting("late", 3000, 0.0, deadline=1.0))
    batcher.add(waiting("later", 60_000, 0.0, deadline=1.5))
    batcher.step(0.5)
    assert batcher.next_deadline(0.5) == 1.5
    assert batcher.step(1.49).expired == ()
    step = batcher.step(1.5)
    assert [request.id for request in step.expired] == ["later"]
    assert step.released == ()
    batcher.finish(lease, 2.0)
    assert balancer.loads()["r0"].requests == 1  # "late" went at 0.5: short passes long
    assert len(batcher) == batcher.queued_tokens == 0


def test_a_client_that_left_is_skipped_and_its_reservation_ends() -> None:
    batcher, _ = pool()
    lease = fill(batcher)
    batcher.add(waiting("leaving", 60_000))
    batcher.add(waiting("staying", 60_000))
    assert released(batcher, 5.0) == []  # starved: the replica is now kept for it
    batcher.add(waiting("short", 10, 5.0))
    assert released(batcher, 5.0) == []
    assert batcher.cancel("leaving")
    assert not batcher.cancel("leaving")
    batcher.finish(lease, 5.1)
    assert released(batcher, 5.1) == ["staying", "short"]


def test_a_request_released_in_vain_returns_to_the_head() -> None:
    limits = BatchingLimits(edges=(65536,), max_queued=1)
    batcher, balancer = pool(1, limits=limits)
    request = waiting("first", 60_000)
    batcher.add(request)
    batcher.step(0.0)
    batcher.add(waiting("second", 60_000, 0.1))
    assert balancer.eject("r0", State.DEAD, 0.2)
    batcher.requeue(request)
    balancer.readmit("r0")
    assert released(batcher, 0.3) == ["first"]


def test_one_put_before_a_head_that_has_a_replica_kept_for_it_is_released() -> None:
    batcher, _ = pool()
    lease = fill(batcher)
    batcher.add(waiting("head", 60_000))
    assert released(batcher, 3.0) == []  # past the bound: the replica is kept for it
    batcher.requeue(waiting("misrouted", 60_000))
    batcher.finish(lease, 4.0)
    assert released(batcher, 4.0) == ["misrouted"]


def test_the_next_step_is_due_when_a_class_starves() -> None:
    batcher, _ = pool()
    fill(batcher)
    batcher.add(waiting("long", 60_000, 0.5))
    assert released(batcher, 0.5) == []
    assert batcher.next_deadline(0.5) == 2.5  # the bound, counted from its arrival
    batcher.step(2.5)
    assert batcher.next_deadline(2.5) is None  # its replica is kept; only events help now


@dataclass(frozen=True)
class Kind:
    """Requests of one lane that cost and run alike."""

    tokens: int
    priority: Priority
    runs: float  # seconds

    @property
    def lane(self) -> tuple[int, Priority]:
        return LIMITS.length_class(self.tokens), self.priority


def kinds(*tokens: int) -> st.SearchStrategy[Kind]:
    return st.builds(
        Kind, st.sampled_from(tokens), st.sampled_from(PRIORITIES), st.floats(0.05, 1.0)
    )


def longest_wait_over_bound(
    batcher: Batcher,
    arrivals: list[tuple[float, Kind]],
    always: Sequence[Kind] = (),
    until: float = math.inf,
) -> float:
    """How far beyond its bound the head of any lane waited, at most, in seconds.

    Of each kind in ``always`` two requests wait at every moment. The clock stops when everything
    is served, or at ``until``; what waits then has waited so long.
    """
    events = [(at, number, kind) for number, (at, kind) in enumerate(arrivals)]
    heapq.heapify(events)
    ends: list[tuple[float, int, Lease]] = []
    queued: dict[str, tuple[float, Kind]] = {}
    head_since: dict[tuple[int, Priority], float] = defaultdict(lambda: -math.inf)
    numbers = itertools.count()
    worst = -math.inf
    now = 0.0

    def add(kind: Kind) -> None:
        name = f"{next(numbers)}"
        queued[name] = (now, kind)
        batcher.add(waiting(name, kind.tokens, now, kind.priority))

    def over(name: str) -> float:
        arrived, kind = queued[name]
        return now - max(arrived, head_since[kind.lane]) - LIMITS.bound(kind.priority)

    for kind in always:
        add(kind)
        add(kind)
    while True:
        for request, lease in batcher.step(now).released:
            kind = queued[request.id][1]
            worst = max(worst, over(request.id))
            head_since[kind.lane] = now
            del queued[request.id]
            heapq.heappush(ends, (now + kind.runs, next(numbers), lease))
            if kind in always:
                add(kind)
        times = [queue[0][0] for queue in (events, ends) if queue]
        if (due := batcher.next_deadline(now)) is not None:
            times.append(due)
        if not times or min(times) > until:
            break
        now = max(now, min(times))
        while ends and ends[0][0] <= now:
            assert batcher.finish(heapq.heappop(ends)[2], now)
        while events and events[0][0] <= now:
            add(heapq.heappop(events)[2])
    assert times or not queued, "requests wait, but nothing will ever happen"
    return max([worst, *map(over, queued)])


def drain_of_each(kinds: Iterable[Kind]) -> float:
    """What the module promises beyond the bound: one drain for each lane."""
    kinds = list(kinds)
    return len({kind.lane for kind in kinds}) * max(kind.runs for kind in kinds) + 1e-6


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.floats(0, 1.5), kinds(50, 1000, 4000, 30_000, 90_000, 200_000)),
        min_size=1,
        max_size=60,
    ),
    replicas=st.integers(1, 3),
    flood=st.integers(1, 8),
)
def test_whatever_arrives_is_released_within_the_bound_and_nothing_gets_stuck(
    arrivals: list[tuple[float, Kind]], replicas: int, flood: int
) -> None:
    times = itertools.accumulate(gap / flood for gap, _ in arrivals)
    timed = [(at, kind) for at, (_, kind) in zip(times, arrivals, strict=True)]
    batcher, _ = pool(replicas)
    assert longest_wait_over_bound(batcher, timed) <= drain_of_each(kind for _, kind in timed)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([500, 1000]),
    gap=st.floats(0.02, 0.04),
    runs=st.floats(0.5, 1.0),
    others=st.lists(
        st.tuples(st.floats(1, 3), kinds(4000, 30_000, 90_000)), min_size=1, max_size=6
    ),
    replicas=st.integers(1, 2),
)
def test_a_stream_of_short_requests_that_never_ends_starves_no_longer_one(
    tokens: int, gap: float, runs: float, others: list[tuple[float, Kind]], replicas: int
) -> None:
    """Some short ones always run, so no replica is ever empty unless it is kept free."""
    short = Kind(tokens, "interactive", runs)
    until = 3 + LIMITS.batch_max_wait_s + 6
    stream = [(gap * number, short) for number in range(int(until / gap))]
    batcher, _ = pool(replicas, limits=replace(LIMITS, max_queued=10**6))
    drain = drain_of_each([short, *(kind for _, kind in others)])
    assert longest_wait_over_bound(batcher, [*stream, *others], until=until) <= drain


LANES = list(itertools.product((1000, 4000, 60_000), PRIORITIES))


@settings(max_examples=60, deadline=None)
@given(runs=st.lists(st.floats(0.5, 3.0), min_size=len(LANES), max_size=len(LANES)))
def test_where_every_lane_is_always_full_each_has_its_turn(runs: list[float]) -> None:
    """There is room for one request at a time, and two of each lane want it at every moment."""
    always = [Kind(*lane, seconds) for lane, seconds in zip(LANES, runs, strict=True)]
    batcher, _ = pool(1, Budget(prefill=1, kv=1))
    until = LIMITS.batch_max_wait_s + 2 * len(LANES) * max(runs)
    assert longest_wait_over_bound(batcher, [], always, until) <= drain_of_each(always)


def test_a_lane_held_back_by_a_reservation_goes_as_soon_as_that_is_used() -> None:
    batcher, balancer = pool()
    for name, tokens in (("short", 50), ("long", 4000), ("starved", 4000)):
        batcher.add(waiting(name, tokens))
    leases = {request.id: lease for request, lease in batcher.step(0.0).released}
    assert leases.keys() == {"short", "long"}
    assert released(batcher, 2.0) == []  # the replica is now kept for "starved"
    batcher.add(waiting("late", 50, arrived=2.0))
    assert released(batcher, 4.0) == []
    balancer.prefilled(leases["short"])
    assert set(released(batcher, 4.0)) == {"starved", "late"}


class Scheduling(RuleBasedStateMachine):
    """Any order of arrivals, cancels, first tokens, ends, deaths and the passing of time."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher, self.balancer = pool(2)
        self.now = 0.0
        self.count = 0
        self.queued: dict[str, Waiting] = {}
        self.running: dict[Lease, Waiting] = {}

    @rule(
        tokens=st.sampled_from([50, 1000, 4000, 30_000, 90_000, 200_000]),
        priority=st.sampled_from(["interactive", "batch"]),
        patience=st.none() | st.floats(0.01, 20),
    )
    def arrive(self, tokens: int, priority: Priority, patience: float | None) -> None:
        self.count += 1
        deadline = None if patience is None else self.now + patience
        request = waiting(f"{self.count}", tokens, self.now, priority, deadline)
        self.batcher.add(request)
        self.queued[request.id] = request
        self.step()

    @rule(
        tokens=st.sampled_from([50, 1000, 4000, 30_000]),
        earlier=st.sampled_from([0.0, 0.5, 5.0]),
    )
    def come_from_a_smaller_pool(self, tokens: int, earlier: float) -> None:
        self.count += 1
        request = waiting(f"{self.count}", tokens, self.now - earlier)
        self.batcher.requeue(request)
        self.queued[request.id] = request
        self.step()

    @rule(seconds=st.floats(0.01, 5))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.queued)))
        assert self.batcher.cancel(request)
        assert not self.batcher.cancel(request)
        del self.queued[request]
        self.step()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ends=st.booleans())
    def progress(self, data: st.DataObject, ends: bool) -> None:
        lease = data.draw(st.sampled_from(list(self.running)))
        self.balancer.prefilled(lease)
        if ends:
            assert self.batcher.finish(lease, self.now)
            assert not self.batcher.finish(lease, self.now)
            del self.running[lease]
        self.step()

    @rule(name=st.sampled_from(["r0", "r1"]))
    def die(self, name: str) -> None:
        for lease in self.balancer.eject(name, State.DEAD, self.now):
            request = self.running.pop(lease)
            self.batcher.requeue(request)
            self.queued[request.id] = request
        self.step()

    @rule(name=st.sampled_from(["r0", "r1"]))
    def come_back(self, name: str) -> None:
        self.balancer.readmit(name)
        self.step()

    def step(self) -> None:
        step = self.batcher.step(self.now)
        for request in step.expired:
            assert request.deadline is not None
            assert request.deadline <= self.now
            del self.queued[request.id]
        before = dict(self.queued)
        for request, lease in step.released:
            older = [
                other
                for other in before.values()
                if self.lane(other) == self.lane(request) and other.arrived < request.arrived
            ]
            assert not older, "first in, first out"
            del before[request.id]
            self.running[lease] = self.queued.pop(request.id)

    @staticmethod
    def lane(request: Waiting) -> tuple[int, Priority]:
        return LIMITS.length_class(request.tokens), request.priority

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.batcher) == len(self.queued)
        assert self.batcher.queued_tokens == sum(r.cost.total for r in self.queued.values())
        assert sum(load.requests for load in self.balancer.loads().values()) == len(self.running)

    @invariant()
    def none_waits_past_its_deadline(self) -> None:
        assert all(r.deadline is None or r.deadline > self.now for r in self.queued.values())

    @invariant()
    def no_head_waits_while_there_is_room_for_it(self) -> None:
        heads: dict[tuple[int, Priority], Waiting] = {}
        for request in self.queued.values():
            held = heads.setdefault(self.lane(request), request)
            if request.arrived < held.arrived:
                heads[self.lane(request)] = request
        for (edge, _), head in heads.items():
            trial = deepcopy(self.balancer)
            assert trial.acquire(head.id, head.cost, edge) is None

    def teardown(self) -> None:
        for name in ("r0", "r1"):
            self.balancer.readmit(name)
        self.step()
        while self.running:  # whatever waits is released as what runs ends
            lease = next(iter(self.running))
            assert self.batcher.finish(lease, self.now)
            del self.running[lease]
            self.step()
        assert not self.queued
        assert len(self.batcher) == self.batcher.queued_tokens == 0
        assert all(load.requests == load.kv == 0 for load in self.balancer.loads().values())
        assert self.batcher.next_deadline(self.now) is None


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_step_over_a_thousand_waiting_requests_is_cheap() -> None:
    """Few lanes are looked at, whatever waits in them: steps are taken at every event."""
    rng = random.Random(0)
    batcher, _ = pool(4, limits=BatchingLimits(max_queued=1000))
    for number in range(3000):
        batcher.add(waiting(f"{number}", rng.choice([500, 3000, 20_000, 90_000])))
    batcher.step(0.0)
    assert len(batcher) > 1000
    began = time.perf_counter()
    for _ in range(100):
        batcher.step(0.0)
    assert (time.perf_counter() - began) / 100 < 0.001


class Engine:
    """A model of an engine: first come, first served, with prefill in chunks, one step at a time.

    A step takes up to 8,192 tokens, at most 2,048 of one prompt while others run, and lasts as
    long as its tokens at 20,000 tokens a second.
    """

    def __init__(self) -> None:
        self.running: dict[str, int] = {}  # tokens of the prompt still to be prefilled
        self.free_at = 0.0

    def step(self, now: float) -> list[str]:
        """Begin a step; return the requests that have their first token when it ends."""
        budget, done = 8192, []
        for name, left in self.running.items():
            chunk = min(left, budget, 2048 if len(self.running) > 1 else budget)
            self.running[name] -= chunk
            budget -= chunk
            if self.running[name] == 0:
                done.append(name)
        for name in done:
            del self.running[name]
        self.free_at = now + (8192 - budget) / 20_000
        return done


def first_token_times(
    arrivals: list[tuple[float, str, int]], batcher: Batcher | None
) -> dict[str, float]:
    """Seconds to the first token of each request, on two engines.

    Without a batcher, each request goes at once to the engine with fewer requests.
    """
    engines = {"r0": Engine(), "r1": Engine()}
    pending = sorted(arrivals, reverse=True)
    arrived = {name: at for at, name, _ in arrivals}
    leases: dict[str, Lease] = {}
    firsts: list[tuple[float, str]] = []
    times: dict[str, float] = {}
    now = 0.0
    while len(times) < len(arrivals):
        while pending and pending[-1][0] <= now:
            at, name, tokens = pending.pop()
            if batcher is None:
                min(engines.values(), key=lambda engine: len(engine.running)).running[name] = tokens
            else:
                batcher.add(waiting(name, tokens, at))
        while firsts and firsts[0][0] <= now:
            at, name = heapq.heappop(firsts)
            times[name] = at - arrived[name]
            if batcher is not None:
                batcher.finish(leases.pop(name), now)
        if batcher is not None:
            for request, lease in batcher.step(now).released:
                leases[request.id] = lease
                engines[lease.replica].running[request.id] = request.tokens
        for engine in engines.values():
            if engine.running and engine.free_at <= now:
                for name in engine.step(now):
                    heapq.heappush(firsts, (engine.free_at, name))
        now += 0.005
    return times


def test_short_requests_under_a_flood_of_long_ones_have_their_first_token_early() -> None:
    """On a model of two engines: what is promised of the real ones, in seconds instead of hours."""
    rng = random.Random(7)
    arrivals = [(rng.uniform(0, 5), f"long{number}", 32_000) for number in range(40)]
    arrivals += [(number * 0.2, f"short{number}", 500) for number in range(150)]
    limits = BatchingLimits(max_queued=1000)
    ours, _ = pool(2, Budget(prefill=16_384, kv=400_000), limits)
    worst: dict[str, tuple[float, float]] = {}
    for name, batcher in (("plain", None), ("ours", ours)):
        times = first_token_times(arrivals, batcher)
        short = sorted(seconds for key, seconds in times.items() if key.startswith("short"))
        long = sorted(seconds for key, seconds in times.items() if key.startswith("long"))
        worst[name] = short[int(len(short) * 0.99)], long[int(len(long) * 0.99)]
    assert worst["ours"][0] * 5 <= worst["plain"][0]
    assert worst["ours"][1] <= 1.2 * worst["plain"][1]
