"""Batches by length: requests wait in lanes of like length and leave as runs of one lane.

A lane is one length class of one priority, and first in is first out. ``step`` visits the lanes
and releases from each, in turn, a run of requests under a token budget, as far as the balancer
finds room for the head:

1. lanes whose head has waited longer than the bound, the one served longest ago first;
2. then interactive before batch, and short before long.

A short request therefore passes long ones that find no room, and no lane waits for ever: one
that was not served for a whole bound has a replica kept free for its head. With L lanes in use
and requests that run for at most S seconds, a head is released within ``bound + L x S``.

Usage, in the shell, one batcher for each pool and gateway::

    batcher = Batcher(balancer, BatchingLimits())
    batcher.add(waiting)                      # Overloaded, with retry_after, when its lane is full
    step = batcher.step(now)                  # after add, finish, cancel, a change of replicas,
                                              # and at batcher.next_deadline(now)
    for waiting, lease in step.released: ...  # send waiting to lease.replica
    for waiting in step.expired: ...          # answer it: it cost nothing yet
    balancer.prefilled(lease)                 # at the first token
    batcher.finish(lease, now)                # in ``finally``: done, failed or cancelled
    batcher.cancel(waiting.id)                # the client left before its release
    batcher.requeue(waiting)                  # its replica died before the first token
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from serve_app.balance import Balancer, Cost, Lease
from serve_app.errors import Overloaded

Priority = Literal["interactive", "batch"]

_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 600.0
_RATE_SAMPLE_S = 0.5
_RATE_MEMORY_S = 10.0


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """Times are seconds, lengths are tokens. ``edges`` are the upper ends of the length classes."""

    edges: tuple[int, ...] = tuple(2**power for power in range(9, 21))
    max_queued: int = 256  # requests in one lane
    run_tokens: int = 16_384  # cost of the requests that a lane releases in one turn
    max_wait_s: float = 2.0  # the bound for interactive requests
    batch_max_wait_s: float = 30.0

    def length_class(self, tokens: int) -> int:
        """The edge of the class that holds ``tokens``; the last class holds all beyond it."""
        return self.edges[min(bisect_left(self.edges, tokens), len(self.edges) - 1)]

    def bound(self, priority: Priority) -> float:
        return self.max_wait_s if priority == "interactive" else self.batch_max_wait_s


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that waits for room. ``deadline`` and ``arrived`` are times of the same clock.

    ``avoid`` names replicas that already failed it; it must leave at least one.
    """

    id: str
    tokens: int  # prompt plus output budget; picks the length class
    cost: Cost
    arrived: float
    priority: Priority = "interactive"
    deadline: float | None = None
    key: str | None = None  # of the prefix, for affinity
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step decided, in the order in which it did."""

    released: tuple[tuple[Waiting, Lease], ...]
    expired: tuple[Waiting, ...]


class _Lane:
    def __init__(self, edge: int, priority: Priority, bound: float) -> None:
        self.edge = edge
        self.priority = priority
        self.bound = bound
        self.queue: OrderedDict[str, Waiting] = OrderedDict()
        self.served = -math.inf  # when it last released

    @property
    def head(self) -> Waiting:
        return next(iter(self.queue.values()))

    @property
    def starved_at(self) -> float:
        """When it will have had no service for a whole bound."""
        return max(self.head.arrived, self.served) + self.bound

    def rank(self, now: float) -> tuple[float, ...]:
        """Where it stands among the lanes; the lowest is visited first."""
        if self.head.arrived + self.bound <= now:
            return (0, self.served, self.edge)
        return (1, 0 if self.priority == "interactive" else 1, self.edge)


class ServiceRate:
    """Tokens of finished requests per second, learned only while others waited for their room.

    At other times the rate says how much is asked for, not how much can be done.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._since: float | None = None  # when the current sample began
        self._tokens = 0

    @property
    def tokens_per_s(self) -> float | None:
        """None until it is known."""
        return self._rate

    def backlog(self, exists: bool, now: float) -> None:
        """Requests wait, or none does any more."""
        if not exists:
            self._since = None
        elif self._since is None:
            self._since, self._tokens = now, 0

    def add(self, tokens: int, now: float) -> None:
        """A request finished that had cost ``tokens``."""
        if self._since is None:
            return
        self._tokens += tokens
        elapsed = now - self._since
        if elapsed < _RATE_SAMPLE_S:
            return
        sample = self._tokens / elapsed
        weight = 1 - math.exp(-elapsed / _RATE_MEMORY_S)
        self._rate = sample if self._rate is None else self._rate + weight * (sample - self._rate)
        self._since, self._tokens = now, 0


class Batcher:
    """The waiting requests of one pool in one gateway. Pure: time is an argument."""

    def __init__(self, balancer: Balancer, limits: BatchingLimits) -> None:
        self._balancer = balancer
        self._limits = limits
        self._lanes: dict[tuple[int, Priority], _Lane] = {}
        self._where: dict[str, _Lane] = {}  # the lane of each waiting request
        self._deadlines: list[tuple[float, str]] = []  # a heap; may name requests already gone
        self._rate = ServiceRate()
        self._queued_tokens = 0

    def __len__(self) -> int:
        return len(self._where)

    @property
    def queued_tokens(self) -> int:
        """Cost of all that waits."""
        return self._queued_tokens

    def add(self, waiting: Waiting) -> None:
        """Queue a request. Raises ``Overloaded`` if its lane is full."""
        lane = self._lane(waiting)
        if len(lane.queue) >= self._limits.max_queued:
            after = self.retry_after()
            raise Overloaded(
                f"{len(lane.queue)} {lane.priority} requests of up to {lane.edge} tokens already "
                f"wait, which is the limit; retry in {after:.0f} s.",
                retry_after=after,
            )
        self._put(waiting, lane)

    def requeue(self, waiting: Waiting) -> None:
        """Put a request back that was released in vain: to its old place, whatever the limit."""
        lane = self._lane(waiting)
        older = list(takewhile(lambda other: other.arrived < waiting.arrived, lane.queue.values()))
        if lane.queue and not older:
            # No longer the head: a replica kept for it would be kept from the new head, for ever.
            self._balancer.forget(lane.head.id)
        self._put(waiting, lane)
        for request in (waiting, *reversed(older)):
            lane.queue.move_to_end(request.id, last=False)

    def cancel(self, request: str) -> bool:
        """Drop a request whose client left. False if it does not wait here."""
        if request not in self._where:
            return False
        self._take(request)
        self._balancer.forget(request)
        return True

    def step(self, now: float) -> Step:
        """Release what finds room, like with like, and drop what is past its deadline."""
        expired = self._expire(now)
        released: list[tuple[Waiting, Lease]] = []
        # A release can end the reservation that held back a lane visited before it.
        while visited := self._visit_lanes(now):
            released += visited
        self._keep_room(now)
        self._rate.backlog(bool(self._where), now)
        return Step(tuple(released), expired)

    def _visit_lanes(self, now: float) -> list[tuple[Waiting, Lease]]:
        """Release from each lane in turn until none finds room."""
        released: list[tuple[Waiting, Lease]] = []
        lanes = self._ranked(now)
        while lanes:
            lane = lanes.pop(0)
            run = self._release_run(lane, now)
            released += run
            if run and lane.queue:
                lanes.append(lane)  # its next turn comes after the others'
        return released

    def _keep_room(self, now: float) -> None:
        """Have a replica kept free for the lane that starves longest, unless one is kept already.

        Only after all releases: one of them may have used the reservation, and the next belongs to
        the first in rank, not to whoever is visited after it.
        """
        for lane in self._ranked(now):
            if lane.starved_at <= now:
                self._balancer.reserve(lane.head.id, lane.head.avoid)

    def _ranked(self, now: float) -> list[_Lane]:
        used = (lane for lane in self._lanes.values() if lane.queue)
        return sorted(used, key=lambda lane: lane.rank(now))

    def finish(self, lease: Lease, now: float) -> bool:
        """Give back what a lease holds, however its request ended. False if done before."""
        if not self._balancer.release(lease):
            return False
        self._rate.add(lease.cost.total, now)
        return True

    def next_deadline(self, now: float) -> float | None:
        """When ``step`` must run next even if nothing happens until then, or None."""
        used = (lane for lane in self._lanes.values() if lane.queue)
        times = [lane.starved_at for lane in used if lane.starved_at > now]
        self._forget_past_deadlines()
        if self._deadlines:
            times.append(self._deadlines[0][0])
        return min(times, default=None)

    def retry_after(self) -> float:
        """Predicted seconds until all that waits now is released, in whole seconds."""
        rate = self._rate.tokens_per_s
        seconds = self._queued_tokens / rate if rate else _LEAST_RETRY_S
        return float(math.ceil(min(_MOST_RETRY_S, max(_LEAST_RETRY_S, seconds))))

    def _lane(self, waiting: Waiting) -> _Lane:
        edge = self._limits.length_class(waiting.tokens)
        key = (edge, waiting.priority)
        if key not in self._lanes:
            self._lanes[key] = _Lane(*key, self._limits.bound(waiting.priority))
        return self._lanes[key]

    def _put(self, waiting: Waiting, lane: _Lane) -> None:
        lane.queue[waiting.id] = waiting
        self._where[waiting.id] = lane
        self._queued_tokens += waiting.cost.total
        if waiting.deadline is not None:
            heapq.heappush(self._deadlines, (waiting.deadline, waiting.id))

    def _take(self, request: str) -> Waiting:
        waiting = self._where.pop(request).queue.pop(request)
        self._queued_tokens -= waiting.cost.total
        return waiting

    def _release_run(self, lane: _Lane, now: float) -> list[tuple[Waiting, Lease]]:
        """Release a lane's first requests, until its turn is used up or the head finds no room."""
        run: list[tuple[Waiting, Lease]] = []
        spent = 0
        while lane.queue and spent < self._limits.run_tokens:
            head = lane.head
            lease = self._balancer.acquire(
                head.id, head.cost, lane.edge, key=head.key, avoid=head.avoid
            )
            if lease is None:
                break
            self._take(head.id)
            lane.served = now
            spent += head.cost.total
            run.append((head, lease))
        return run

    def _expire(self, now: float) -> tuple[Waiting, ...]:
        expired = []
        self._forget_past_deadlines()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[1]
            expired.append(self._take(request))
            self._balancer.forget(request)
            self._forget_past_deadlines()
        return tuple(expired)

    def _forget_past_deadlines(self) -> None:
        """Pop the deadlines of requests that no longer wait, as far as they come first."""
        while self._deadlines and self._deadlines[0][1] not in self._where:
            heapq.heappop(self._deadlines)
