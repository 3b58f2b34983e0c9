"""The choice of a replica, and the exactness of what is counted on it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.balance import Balancer, Budget, Cost, Lease, State

BUDGET = Budget(prefill=8_000, kv=100_000)


def balancer(replicas: int = 2, budget: Budget = BUDGET) -> Balancer:
    made = Balancer()
    made.update({f"r{number}": budget for number in range(replicas)})
    return made


def take(pool: Balancer, request: str, prefill: int, edge: int = 4096, **options: object) -> Lease:
    lease = pool.acquire(request, Cost(prefill, prefill + 100), edge, **options)  # type: ignore[arg-type]
    assert lease is not None
    return lease


def test_load_is_counted_in_tokens_not_in_requests() -> None:
    pool = balancer()
    long = take(pool, "long", 50_000, edge=65536)
    short = [take(pool, f"short-{number}", 500) for number in range(10)]
    assert {lease.replica for lease in short} == {"r1"} != {long.replica}


def test_like_lengths_go_together_where_loads_tie() -> None:
    pool = balancer()
    first = take(pool, "a", 1000, edge=1024)
    pool.prefilled(first)
    second = take(pool, "b", 1000, edge=2048)
    pool.prefilled(second)
    assert first.replica != second.replica
    for number in range(4):  # both classes keep their replica while the loads stay alike
        for edge, home in ((1024, first.replica), (2048, second.replica)):
            lease = take(pool, f"{edge}-{number}", 1000, edge=edge)
            pool.prefilled(lease)
            assert lease.replica == home


def test_a_prefix_key_finds_its_replica_again() -> None:
    pool = balancer(5)
    homes = set()
    for number in range(20):
        lease = take(pool, f"{number}", 2000, key="session-7")
        homes.add(lease.replica)
        pool.release(lease)
    assert len(homes) == 1


def test_a_popular_prefix_makes_no_hot_spot() -> None:
    pool = balancer(4, Budget(10**9, 10**9))
    for number in range(400):
        take(pool, f"{number}", 1000, key="everybody")
    loads = [load.prefill + load.kv for load in pool.loads().values()]
    assert max(loads) <= 1.3 * sum(loads) / len(loads)


def test_keys_move_little_when_a_replica_leaves() -> None:
    before, after = balancer(5), balancer(4)
    moved = 0
    for number in range(300):
        lease = take(before, f"{number}", 1, key=f"key-{number}")
        before.release(lease)
        other = take(after, f"{number}", 1, key=f"key-{number}")
        after.release(other)
        moved += lease.replica not in (other.replica, "r4")
    assert moved == 0


def test_no_room_past_the_budget() -> None:
    pool = balancer(1)
    leases = [take(pool, f"{number}", 4000) for number in range(2)]
    assert pool.acquire("more", Cost(4000, 4100), 4096) is None
    pool.prefilled(leases[0])
    assert pool.acquire("more", Cost(4000, 4100), 4096) is not None
    assert pool.acquire("kv", Cost(0, 95_000), 4096) is None  # prefill fits, the KV cache not


def test_an_idle_replica_takes_what_exceeds_its_budget() -> None:
    pool = balancer(1)
    assert take(pool, "giant", 500_000, edge=2**19).replica == "r0"


def test_a_short_prefill_does_not_wait_for_a_long_one_but_the_reverse_holds() -> None:
    pool = balancer(1, Budget(prefill=8_000, kv=10**6))
    take(pool, "long", 50_000, edge=65536)
    assert pool.acquire("second long", Cost(50_000, 50_100), 65536) is None
    take(pool, "short", 7_000, edge=8192)
    assert pool.acquire("longer", Cost(9_000, 9_100), 16384) is None


def test_a_reservation_keeps_a_replica_until_the_large_request_fits() -> None:
    pool = balancer(1)
    running = [take(pool, f"{number}", 1000) for number in range(8)]
    large = Cost(60_000, 95_000)
    assert pool.acquire("large", large, 65536) is None
    pool.reserve("large")
    for lease in running[:4]:
        pool.release(lease)
        assert pool.acquire("small", Cost(10, 20), 4096) is None  # the room is kept
    for lease in running[4:]:
        pool.release(lease)
    assert pool.acquire("large", large, 65536) is not None
    assert pool.acquire("small", Cost(10, 20), 4096) is not None  # and given free again


@pytest.mark.parametrize("how", ["forget", "eject", "drain"])
def test_a_reservation_ends_with_its_request_or_replica(how: str) -> None:
    pool = balancer(1)
    lease = take(pool, "running", 1000)
    assert pool.acquire("large", Cost(0, 100_000), 65536) is None
    pool.reserve("large")
    assert pool.acquire("small", Cost(1, 1), 4096) is None
    if how == "forget":
        pool.forget("large")
    elif how == "eject":
        pool.eject("r0", State.SILENT, 0.0)
        pool.readmit("r0")
    else:
        pool.update({})
        pool.update({"r0": BUDGET})
    assert pool.acquire("small", Cost(1, 1), 4096) is not None
    assert pool.release(lease)


def test_replicas_already_tried_are_avoided() -> None:
    pool = balancer(2)
    assert take(pool, "a", 10, avoid={"r0"}).replica == "r1"
    assert pool.acquire("b", Cost(1, 1), 4096, avoid={"r0", "r1"}) is None


def test_a_silent_replica_is_probed_ever_less_often_until_it_answers() -> None:
    pool = balancer(1)
    lease = take(pool, "a", 10)
    assert pool.eject("r0", State.SILENT, now=100.0) == ()
    assert pool.alive == 0
    assert pool.acquire("b", Cost(1, 1), 4096) is None
    assert pool.probes_due(100.5) == ()
    now = 100.0
    for wait in (1, 2, 4, 8, 16, 30, 30, 30):
        assert pool.probes_due(now + wait - 0.1) == ()
        now += wait
        assert pool.probes_due(now) == ("r0",)
        assert pool.probes_due(now) == ()  # not twice at one time
    pool.readmit("r0")
    assert pool.probes_due(now + 1000) == ()
    assert pool.alive == 1
    assert pool.release(lease)
    assert not pool.release(lease)


def test_a_dead_replica_hands_back_its_leases_once() -> None:
    pool = balancer(2)
    leases = {take(pool, f"{number}", 3000) for number in range(4)}
    lost = pool.eject("r0", State.DEAD, now=0.0)
    assert {lease.replica for lease in lost} == {"r0"}
    assert pool.loads()["r0"].kv == pool.loads()["r0"].prefill == 0
    again = [take(pool, lease.request, 100) for lease in lost]
    assert {lease.replica for lease in again} == {"r1"}
    before = pool.loads()
    assert not any(pool.release(lease) for lease in lost)  # a late finally changes nothing
    assert pool.loads() == before
    assert all(pool.release(lease) for lease in (*again, *(leases - set(lost))))


def test_a_replica_that_is_no_longer_listed_finishes_first() -> None:
    pool = balancer(2)
    leases = [take(pool, f"{number}", 3000) for number in range(2)]
    pool.update({"r1": BUDGET})
    assert pool.loads()["r0"].state is State.DRAINING
    assert take(pool, "new", 10).replica == "r1"
    pool.release(next(lease for lease in leases if lease.replica == "r0"))
    assert set(pool.loads()) == {"r1"}


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 50))
def test_shares_of_all_gateways_never_exceed_the_budget(kv: int, prefill: int, count: int) -> None:
    share = Budget(prefill, kv).share(count)
    assert share.kv * count <= max(kv, count)
    assert share.prefill * count <= max(prefill, count)


@pytest.mark.parametrize("gateways", [1, 2, 5])
def test_several_gateways_together_stay_within_the_budget(gateways: int) -> None:
    rng = random.Random(gateways)
    budget = Budget(prefill=40_000, kv=400_000)
    pools = [balancer(3, budget.share(gateways)) for _ in range(gateways)]
    for number in range(3000):
        tokens = rng.randrange(10, 2000)
        rng.choice(pools).acquire(f"{number}", Cost(tokens, 2 * tokens), 2048)
    total: Counter[str] = Counter()
    for pool in pools:
        for name, load in pool.loads().items():
            total[name] += load.kv
    assert all(0 < tokens <= budget.kv for tokens in total.values())


class Accounting(RuleBasedStateMachine):
    """Any order of acquire, first token, release, death, silence, drain and return."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = balancer(3)
        self.listed = {"r0", "r1", "r2"}
        self.held: dict[Lease, int] = {}  # tokens still to be prefilled
        self.gone: list[Lease] = []
        self.count = 0

    @rule(
        prefill=st.integers(0, 12_000),
        kv=st.integers(0, 60_000),
        edge=st.sampled_from([1024, 4096, 65536]),
        key=st.none() | st.sampled_from("abc"),
        reserve=st.booleans(),
    )
    def acquire(self, prefill: int, kv: int, edge: int, key: str | None, reserve: bool) -> None:
        self.count += 1
        before = self.pool.loads()
        lease = self.pool.acquire(f"{self.count}", Cost(prefill, kv), edge, key=key)
        if lease is not None:
            assert before[lease.replica].state is State.LIVE
            assert before[lease.replica].requests == 0 or (
                before[lease.replica].kv + kv <= BUDGET.kv
            )
            self.held[lease] = prefill
        elif reserve:
            self.pool.reserve(f"{self.count}")
            if self.count % 2:
                self.pool.forget(f"{self.count}")

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.held)))
        self.pool.prefilled(lease)
        self.held[lease] = 0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.held)))
        assert self.pool.release(lease)
        del self.held[lease]
        self.gone.append(lease)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.gone))
        assert not self.pool.release(lease)
        self.pool.prefilled(lease)

    @rule(name=st.sampled_from(["r0", "r1", "r2"]), state=st.sampled_from(["silent", "dead"]))
    def eject(self, name: str, state: str) -> None:
        lost = self.pool.eject(name, State(state), now=float(self.count))
        there = {lease for lease in self.held if lease.replica == name}
        assert set(lost) == (there if state == "dead" else set())
        for lease in lost:
            del self.held[lease]
            self.gone.append(lease)

    @rule(name=st.sampled_from(["r0", "r1", "r2"]))
    def readmit(self, name: str) -> None:
        self.pool.readmit(name)

    @rule(names=st.sets(st.sampled_from(["r0", "r1", "r2", "r3"])))
    def discover(self, names: set[str]) -> None:
        self.pool.update(dict.fromkeys(names, BUDGET))
        self.listed = names

    @invariant()
    def outstanding_is_the_sum_of_what_is_held(self) -> None:
        loads = self.pool.loads()
        assert self.listed <= set(loads)
        assert all(loads[name].requests for name in loads.keys() - self.listed)
        for name, load in loads.items():
            there = [lease for lease in self.held if lease.replica == name]
            assert load.requests == len(there)
            assert load.kv == sum(lease.cost.kv for lease in there)
            assert load.prefill == sum(self.held[lease] for lease in there)
        assert {lease.replica for lease in self.held} <= set(loads)

    def teardown(self) -> None:
        for lease in list(self.held):
            assert self.pool.release(lease)
        assert all(
            (load.requests, load.prefill, load.kv) == (0, 0, 0)
            for load in self.pool.loads().values()
        )


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
