"""Sends requests without Locust's runner: on a schedule, or each stream after its last."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time

import gevent

from load_tests.client import send, sleep_until, user_agent
from load_tests.stream import Ask, Record

LEAD_S = 0.1  # to get every greenlet waiting before the first request is due


def open_loop(
    host: str, schedule: Sequence[tuple[float, Ask]], headers: dict[str, str]
) -> list[Record]:
    """Send each ask at its time (seconds from now), whatever became of the others before."""
    agent, origin = user_agent(), perf_counter() + LEAD_S

    def one(at: float, ask: Ask) -> Record:
        sleep_until(origin + at)
        return send(agent, host, ask, origin + at, origin=origin, headers=headers)

    return [each.get() for each in [gevent.spawn(one, at, ask) for at, ask in schedule]]


def closed_loop(
    host: str, asks: Sequence[Ask], streams: int, headers: dict[str, str]
) -> list[Record]:
    """Send all ``asks``, ``streams`` of them at a time."""
    agent, origin, left = user_agent(), perf_counter(), deque(asks)

    def stream() -> list[Record]:
        made = []
        while left:
            ask = left.popleft()
            made.append(send(agent, host, ask, perf_counter(), origin=origin, headers=headers))
        return made

    greenlets = [gevent.spawn(stream) for _ in range(streams)]
    return [record for each in greenlets for record in each.get()]


@contextmanager
def cpu_share() -> Iterator[list[float]]:
    """Put this process's share of one core during the block into the list it yields."""
    wall, cpu, share = perf_counter(), process_time(), list[float]()
    yield share
    share.append((process_time() - cpu) / (perf_counter() - wall))


def headers_of(header: str) -> dict[str, str]:
    """A request's headers, with ``Name: value`` added where given."""
    name, _, value = header.partition(":")
    extra = {name.strip(): value.strip()} if header else {}
    return {"Content-Type": "application/json", **extra}
