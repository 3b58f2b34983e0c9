"""How many replicas a pool gets: single decisions, and whole days of arrivals in simulation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from load_tests.traffic import read_trace
from serve_app.autoscaling import (
    DemandLedger,
    Settings,
    Signals,
    State,
    TokenPolicy,
    desired_replicas,
    read_signals,
)
from serve_app.request import Demand, EngineLoad

SETTINGS = Settings(
    min_replicas=0, max_replicas=8, target_tokens_per_replica=1000, up_delay_s=5, down_delay_s=60
)


def held(signals: Signals, seconds: float, using: Settings = SETTINGS) -> list[int]:
    """What is asked for, second by second, while the signals stay and nothing starts."""
    state, answers = State(), []
    for now in range(int(seconds) + 1):
        wanted, state = desired_replicas(state, signals, now, using)
        answers.append(wanted)
    return answers


def test_load_that_fits_changes_nothing() -> None:
    assert set(held(Signals(2, 2, tokens=1900), 600)) == {2}


def test_more_tokens_ask_for_more_replicas_after_a_short_delay() -> None:
    answers = held(Signals(1, 1, tokens=3500), 10)
    assert answers[:5] == [1] * 5
    assert answers[5] == 4


def test_a_burst_that_passes_asks_for_nothing() -> None:
    state = State()
    for now, tokens in enumerate([5000, 5000, 900, 5000, 900]):
        wanted, state = desired_replicas(state, Signals(1, 1, tokens), now, SETTINGS)
        assert wanted == 1


def test_less_load_gives_replicas_back_slowly_and_to_the_most_that_was_wanted() -> None:
    state, asked = State(), 0
    for now in range(61):
        tokens = 2100 if now == 30 else 700
        asked, state = desired_replicas(state, Signals(6, 6, tokens), now, SETTINGS)
        assert asked == 6 or now == 60
    assert asked == 3  # what 2,100 tokens need with a quarter to spare


def test_a_pool_that_would_only_just_fit_is_kept() -> None:
    assert set(held(Signals(2, 2, tokens=990), 600)) == {2}


def test_idle_pools_stop_but_one_token_keeps_the_last_replica() -> None:
    assert held(Signals(1, 1, tokens=0), 60)[-1] == 0
    assert set(held(Signals(1, 1, tokens=1), 600)) == {1}


@pytest.mark.parametrize(
    "symptom",
    [{"kv_usage": 0.95}, {"preemptions": 3}],
)
def test_a_full_cache_asks_for_one_more(symptom: dict[str, Any]) -> None:
    state = State(running=2)
    signals = Signals(2, 2, tokens=100, **symptom)
    _, state = desired_replicas(state, signals, 0, SETTINGS)
    more = replace(signals, preemptions=signals.preemptions and signals.preemptions + 1)
    quick = replace(SETTINGS, up_delay_s=0)
    assert desired_replicas(state, more, 1, quick)[0] == 3
    starting = replace(more, target=3, preemptions=more.preemptions * 2)
    assert desired_replicas(state, starting, 2, quick)[0] == 3, "the third has yet to come"


def test_a_late_first_token_asks_for_more_at_most_twice_as_many() -> None:
    using = replace(SETTINGS, ttft_target_s=1, up_delay_s=0)
    state = State(running=2)
    assert desired_replicas(state, Signals(2, 2, 10, ttft_s=1.4), 0, using)[0] == 3
    assert desired_replicas(state, Signals(2, 2, 10, ttft_s=60), 0, using)[0] == 4


def test_the_load_at_which_the_first_token_was_late_is_remembered() -> None:
    """Otherwise the pool would shrink to where it was late, and grow again, for ever."""
    using = replace(SETTINGS, ttft_target_s=1, up_delay_s=0)
    state = State(running=1)
    asked, state = desired_replicas(state, Signals(1, 1, 100, ttft_s=2), 0, using)
    assert asked == 2
    for now in range(1, 600):
        asked, state = desired_replicas(state, Signals(2, 2, 100, ttft_s=0.2), now, using)
        assert asked == 2
    for now in range(600, 661):
        asked, state = desired_replicas(state, Signals(2, 2, 60, ttft_s=0.2), now, using)
    assert asked == 1


def test_without_a_target_the_engines_own_cache_is_it() -> None:
    using = replace(SETTINGS, target_tokens_per_replica=None)
    assert held(Signals(1, 1, tokens=2500, room=1000), 5, using)[-1] == 4
    assert held(Signals(1, 1, tokens=2500, room=0), 6, using)[-1] == 1


@given(
    target=st.integers(0, 20),
    running=st.integers(0, 20),
    tokens=st.floats(0, 1e9),
    kv=st.floats(0, 1),
    ttft=st.floats(0, 1e3),
    least=st.integers(0, 4),
    more=st.integers(1, 8),
)
def test_bounds_hold_whatever_happens(
    target: int, running: int, tokens: float, kv: float, ttft: float, least: int, more: int
) -> None:
    using = replace(SETTINGS, min_replicas=least, max_replicas=least + more, ttft_target_s=1)
    state = State()
    for now in range(0, 300, 10):
        asked, state = desired_replicas(
            state, Signals(target, running, tokens, ttft, kv), now, using
        )
    if target > using.max_replicas or target < using.min_replicas:
        assert using.min_replicas <= asked <= using.max_replicas


@dataclass
class Cluster:
    """Replicas that start slowly; a request is under way for a while even when nobody else is."""

    settings: Settings
    rate: float = 200.0  # tokens a second that a replica finishes at most
    hold_s: float = 20.0
    start_s: float = 40.0
    tokens: float = 0.0
    running: int = 0
    target: int = 0
    starting: deque[float] = field(default_factory=deque)
    state: State = field(default_factory=State)
    asked: list[int] = field(default_factory=list)
    worst: float = 0.0

    def second(self, now: float, arriving: float) -> None:
        while self.starting and self.starting[0] <= now:
            self.starting.popleft()
            self.running += 1
        self.tokens += arriving
        self.tokens -= min(self.running * self.rate, self.tokens / self.hold_s)
        self.tokens = 0.0 if self.tokens < 1 else self.tokens
        self.worst = max(self.worst, self.tokens)
        signals = Signals(self.target, self.running, self.tokens)
        wanted, self.state = desired_replicas(self.state, signals, now, self.settings)
        if not self.running and not self.target and self.tokens:
            wanted = max(1, wanted)  # the gateway's call that waits for a first replica
        for _ in range(wanted - self.target):
            self.starting.append(now + self.start_s)
        while self.running + len(self.starting) > wanted:
            if self.starting:
                self.starting.pop()
            else:
                self.running -= 1
        self.target = wanted
        self.asked.append(wanted)

    @property
    def turns(self) -> int:
        """How often it went down after up or up after down."""
        steps = [b - a for a, b in pairwise(self.asked) if b != a]
        return sum((a > 0) != (b > 0) for a, b in pairwise(steps))


def bursty(seed: int, seconds: int, mean: float) -> Iterator[float]:
    """Tokens a second with the burstiness of conversation traffic: gamma, coefficient 2."""
    import random

    draw = random.Random(seed)
    for _ in range(seconds):
        yield draw.gammavariate(0.25, mean / 0.25)


def recorded(seconds: int, mean: float) -> Iterator[float]:
    """Tokens a second of a load test's arrivals, again and again, scaled to their mean."""
    with (Path(__file__).parent / "data" / "arrivals.csv").open() as file:
        trace = read_trace(file)
    tokens = [0.0] * (int(trace[-1].at) + 1)
    for arrival in trace:
        tokens[int(arrival.at)] += arrival.prompt_tokens + arrival.output_tokens
    scale = mean * len(tokens) / sum(tokens)
    for now in range(seconds):
        yield scale * tokens[now % len(tokens)]


SIMULATED = replace(SETTINGS, target_tokens_per_replica=3000, down_delay_s=300)


@pytest.mark.parametrize("seed", range(5))
def test_steady_bursty_arrivals_do_not_make_the_pool_flap(seed: int) -> None:
    cluster = Cluster(SIMULATED, running=3, target=3)
    for now, arriving in enumerate(bursty(seed, 3 * 3600, mean=450)):
        cluster.second(now, arriving)
    assert cluster.turns <= 12, "in three hours of the same load"
    assert cluster.worst < 5 * 450 * 20


def test_recorded_arrivals_do_not_make_the_pool_flap_and_would_without_its_delays() -> None:
    turns = []
    for using in (SIMULATED, replace(SIMULATED, up_delay_s=0, down_delay_s=0)):
        cluster = Cluster(using, running=3, target=3)
        for now, arriving in enumerate(recorded(3 * 3600, mean=450)):
            cluster.second(now, arriving)
        turns.append(cluster.turns)
        assert cluster.worst < 5 * 450 * 20
    steady, nervous = turns
    assert steady <= 12
    assert nervous > 100


def test_a_day_with_a_peak_is_followed_up_and_down() -> None:
    cluster = Cluster(SIMULATED)
    day = 6 * 3600
    for now, noise in enumerate(bursty(1, day, mean=1)):
        level = max(0.0, 1200 * math.sin(math.pi * (now / day * 1.5 - 0.25)))
        cluster.second(now, level * noise)
    assert max(cluster.asked) >= 6
    assert cluster.asked[0] == 0
    assert cluster.asked[-1] == 0, "the night ends with nothing outstanding"
    assert cluster.tokens == 0, "every token was worked off"
    assert cluster.turns <= 12
    used = sum(cluster.asked) / (8 * day)
    assert used < 0.6, f"{used:.0%} of the replica-hours of a fixed pool of eight"


@settings(max_examples=30, deadline=None)
@given(load=st.lists(st.floats(0, 1500), min_size=5, max_size=40))
def test_any_load_is_worked_off_and_then_nothing_runs(load: list[float]) -> None:
    cluster = Cluster(SIMULATED)
    now = 0
    for level in load:
        for _ in range(60):
            cluster.second(now, level)
            now += 1
    for _ in range(1500):
        cluster.second(now, 0)
        now += 1
    assert cluster.tokens == 0
    assert cluster.target == 0
    assert cluster.turns <= 2 * len(load)


def test_engines_add_up_what_gateways_say_until_those_fall_silent() -> None:
    now = [0.0]
    ledger = DemandLedger(clock=lambda: now[0])
    ledger.note(Demand("a", tokens=100, ttft_s=0.5))
    now[0] = 6
    ledger.note(Demand("b", tokens=40, ttft_s=0.2))
    ledger.note(Demand("b", tokens=50, ttft_s=0.2))
    load = EngineLoad(kv_usage=0.25, preemptions=2)
    assert ledger.stats(load, room=9) == {
        "tokens": 150,
        "ttft_s": 0.5,
        "kv_usage": 0.25,
        "preemptions": 2,
        "room": 9,
    }
    now[0] = 11
    assert ledger.stats(load, room=9)["tokens"] == 50


def test_what_all_replicas_hear_is_counted_once() -> None:
    metrics = {
        "tokens": {"r1": 100.0, "r2": 120.0},
        "ttft_s": {"r1": 0.1, "r2": 0.3},
        "kv_usage": {"r1": 0.2, "r2": 0.4},
        "preemptions": {"r1": 1.0, "r2": 2.0},
        "room": {"r1": 50.0, "r2": 60.0},
    }
    signals = read_signals(metrics, target=3, running=2)
    assert signals == Signals(3, 2, 120, 0.3, pytest.approx(0.3), 3, 50)
    assert read_signals({}, target=1, running=0) is None


def test_the_policy_reads_serves_context_and_keeps_its_state_there() -> None:
    policy = TokenPolicy(**{"max_replicas": 4, "target_tokens_per_replica": 10, "up_delay_s": 5})

    def context(now: float, state: dict[str, Any], tokens: float) -> SimpleNamespace:
        series = {"tokens": [1.0, tokens], "kv_usage": [0.0]}
        raw = {
            name: {"r": [SimpleNamespace(timestamp=i, value=v) for i, v in enumerate(values)]}
            for name, values in series.items()
        }
        return SimpleNamespace(
            raw_metrics=raw,
            target_num_replicas=1,
            current_num_replicas=1,
            current_time=now,
            policy_state=state,
        )

    replicas, state = policy(context(0, {}, 35))
    assert replicas == 1
    assert policy(context(4, state, 35))[0] == 1
    assert policy(context(5, state, 35))[0] == 4
    nothing = context(0, {}, 0)
    nothing.raw_metrics = {}
    assert policy(nothing)[0] == 1
