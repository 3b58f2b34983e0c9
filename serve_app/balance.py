"""Which replica of a pool takes a request, and exactly what each one has under way.

Load is counted in tokens, not in requests: what is still to be prefilled plus the KV cache held
until the end. A replica has room while both stay within its budget, with two exceptions that keep
a large request from waiting for ever: a replica with nothing under way takes anything, and a
prefill waits only for prefills of its own length class or shorter. Without the second, a short
prompt would wait at the gateway for every long one.

Among replicas with room the least loaded is taken. Where loads tie (within the request's own
cost, or a quarter of the mean) a prefix key goes to the replica that its rendezvous hash names,
so that its KV cache is found again; without a key, like lengths go together.

Usage, in the shell, one balancer for each pool and gateway::

    balancer = Balancer()
    balancer.update({name: budget.share(gateways) for name in alive})          # each discovery
    lease = balancer.acquire("req-1", cost, length_class, key=prefix_key)      # None: no room
    balancer.reserve("req-1")         # it waited too long: the next room of one replica is its own
    balancer.prefilled(lease)         # at the first token
    balancer.release(lease)           # in ``finally``; more than once is harmless
    balancer.eject(name, State.SILENT, now)   # a watchdog fired; or State.DEAD: the call broke
    for name in balancer.probes_due(now):     # send one token; on an answer:
        balancer.readmit(name)
    balancer.forget("req-1")          # a waiting request's client left: drops its reservation
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

_TIE = 0.25  # loads tie within this share of the mean
_FIRST_PROBE_S = 1.0
_LAST_PROBE_S = 30.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens that one request asks of an engine.

    ``prefill`` is computed before the first token; ``kv`` is held until the last, under the
    pool's attention plan.
    """

    prefill: int
    kv: int

    @property
    def total(self) -> int:
        return self.prefill + self.kv


@dataclass(frozen=True, slots=True)
class Budget:
    """What a replica should have under way at most, in the tokens of ``Cost``."""

    prefill: int
    kv: int

    def share(self, gateways: int) -> Budget:
        """One gateway's part. Shares of all gateways together never exceed the whole."""
        return Budget(max(1, self.prefill // gateways), max(1, self.kv // gateways))


class State(StrEnum):
    LIVE = "live"
    SILENT = "silent"  # connected, but no token came in time
    DEAD = "dead"  # the call broke
    DRAINING = "draining"  # no longer listed: finishes what it has


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """One attempt of one request on one replica. Two attempts are never the same lease."""

    request: str
    replica: str
    length_class: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica has under way, for metrics."""

    state: State
    requests: int
    prefill: int
    kv: int


class _Replica:
    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self.budget = budget
        self.state = State.LIVE
        self.leases: dict[Lease, int] = {}  # tokens still to be prefilled, for each
        self.prefill: Counter[int] = Counter()  # the same, for each length class
        self.kv: Counter[int] = Counter()  # tokens held, for each length class
        self.load = 0  # tokens of both kinds
        self.probe_at = 0.0
        self.probe_wait = _FIRST_PROBE_S

    def has_room(self, cost: Cost, length_class: int) -> bool:
        if not self.leases:
            return True
        ahead = sum(tokens for edge, tokens in self.prefill.items() if edge <= length_class)
        return (
            ahead == 0 or ahead + cost.prefill <= self.budget.prefill
        ) and self.kv.total() + cost.kv <= self.budget.kv

    def unlike(self, length_class: int) -> int:
        """Tokens held here by requests of other length classes."""
        return self.kv.total() - self.kv[length_class]

    def add(self, lease: Lease) -> None:
        self.leases[lease] = lease.cost.prefill
        self.prefill[lease.length_class] += lease.cost.prefill
        self.kv[lease.length_class] += lease.cost.kv
        self.load += lease.cost.total

    def prefilled(self, lease: Lease) -> None:
        left = self.leases[lease]
        self.leases[lease] = 0
        self.prefill[lease.length_class] -= left
        self.load -= left

    def remove(self, lease: Lease) -> None:
        self.prefilled(lease)
        del self.leases[lease]
        self.kv[lease.length_class] -= lease.cost.kv
        self.load -= lease.cost.kv


class Balancer:
    """The replicas of one pool as one gateway sees them. Pure: time is an argument."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._reserved: tuple[str, str] | None = None  # a request, and the replica kept for it

    @property
    def alive(self) -> int:
        """How many replicas take requests."""
        return len(self.live())

    def live(self) -> frozenset[str]:
        """The replicas that take requests."""
        replicas = self._replicas.items()
        return frozenset(name for name, replica in replicas if replica.state is State.LIVE)

    def loads(self) -> dict[str, Load]:
        return {
            name: Load(
                replica.state,
                len(replica.leases),
                replica.prefill.total(),
                replica.kv.total(),
            )
            for name, replica in self._replicas.items()
        }

    def update(self, budgets: Mapping[str, Budget]) -> None:
        """Take over what discovery lists. One that it no longer lists finishes and then goes."""
        for name, budget in budgets.items():
            replica = self._replicas.setdefault(name, _Replica(name, budget))
            replica.budget = budget
            if replica.state is State.DRAINING:
                replica.state = State.LIVE
        for name in self._replicas.keys() - budgets.keys():
            self._replicas[name].state = State.DRAINING
            self._unreserve(replica=name)
            self._drop_if_drained(name)

    def acquire(
        self,
        request: str,
        cost: Cost,
        length_class: int,
        *,
        key: str | None = None,
        avoid: Collection[str] = (),
    ) -> Lease | None:
        """Take room for a request, or return None where no replica has any.

        ``avoid`` names replicas already tried.
        """
        able = [r for r in self._open_to(request, avoid) if r.has_room(cost, length_class)]
        if not able:
            return None
        replica = _choose(able, cost, length_class, key)
        lease = Lease(request, replica.name, length_class, cost)
        replica.add(lease)
        self.forget(request)
        return lease

    def reserve(self, request: str, avoid: Collection[str] = ()) -> None:
        """Keep one replica from taking others, so that this request will find room there.

        A pool has one reservation at most: nothing happens while there is one.
        """
        open_ = self._open_to(request, avoid)
        if open_ and self._reserved is None:
            self._reserved = (request, min(open_, key=lambda replica: replica.load).name)

    def _open_to(self, request: str, avoid: Collection[str]) -> list[_Replica]:
        kept = self._reserved[1] if self._reserved and self._reserved[0] != request else None
        return [
            replica
            for replica in self._replicas.values()
            if replica.state is State.LIVE and replica.name not in avoid and replica.name != kept
        ]

    def prefilled(self, lease: Lease) -> None:
        """The first token came: the prefill is done."""
        replica = self._replicas.get(lease.replica)
        if replica is not None and lease in replica.leases:
            replica.prefilled(lease)

    def release(self, lease: Lease) -> bool:
        """Give back what a lease holds. False if it held nothing any more."""
        replica = self._replicas.get(lease.replica)
        if replica is None or lease not in replica.leases:
            return False
        replica.remove(lease)
        self._drop_if_drained(lease.replica)
        return True

    def forget(self, request: str) -> None:
        """Drop the reservation of a request that no longer waits."""
        if self._reserved and self._reserved[0] == request:
            self._reserved = None

    def eject(self, name: str, state: State, now: float) -> tuple[Lease, ...]:
        """Stop choosing a replica: it is silent, or dead.

        Returns the leases of a dead one, already released: those before their first token may be
        tried elsewhere. A silent one keeps its leases; their own watchdogs will release them.
        """
        replica = self._replicas.get(name)
        if replica is None:
            return ()
        if replica.state is not State.DRAINING:
            replica.state = state
            replica.probe_wait = _FIRST_PROBE_S
            replica.probe_at = now + replica.probe_wait
        self._unreserve(replica=name)
        if state is not State.DEAD:
            return ()
        lost = tuple(replica.leases)
        for lease in lost:
            replica.remove(lease)
        self._drop_if_drained(name)
        return lost

    def probes_due(self, now: float) -> tuple[str, ...]:
        """Ejected replicas to ask for one token now. The next time is twice as far away."""
        due = [
            replica
            for replica in self._replicas.values()
            if replica.state in (State.SILENT, State.DEAD) and replica.probe_at <= now
        ]
        for replica in due:
            replica.probe_wait = min(_LAST_PROBE_S, 2 * replica.probe_wait)
            replica.probe_at = now + replica.probe_wait
        return tuple(replica.name for replica in due)

    def readmit(self, name: str) -> None:
        """A probe was answered: choose this replica again."""
        replica = self._replicas.get(name)
        if replica is not None and replica.state is not State.DRAINING:
            replica.state = State.LIVE

    def _unreserve(self, replica: str) -> None:
        if self._reserved and self._reserved[1] == replica:
            self._reserved = None

    def _drop_if_drained(self, name: str) -> None:
        replica = self._replicas[name]
        if replica.state is State.DRAINING and not replica.leases:
            del self._replicas[name]


def _choose(able: list[_Replica], cost: Cost, length_class: int, key: str | None) -> _Replica:
    least = min(replica.load for replica in able)
    mean = sum(replica.load for replica in able) / len(able)
    tied = [replica for replica in able if replica.load <= least + max(cost.total, _TIE * mean)]
    if key is not None:
        return max(tied, key=lambda replica: _rendezvous(key, replica.name))
    return min(tied, key=lambda replica: (replica.unlike(length_class), replica.load, replica.name))


def _rendezvous(key: str, name: str) -> bytes:
    """Each key ranks the replicas in its own order; one that leaves moves only its own keys."""
    return blake2b(f"{key}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
