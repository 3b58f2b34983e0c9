"""The simulated engines do by arithmetic what can be checked by hand."""

from __future__ import annotations

import io
import math
import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.autoscaling import Settings
from serve_app.errors import ConfigError
from serve_app.pattern import FULL, LayerRule
from serve_app.simulator import (
    Arrival,
    CostModel,
    PoolPlan,
    generate,
    read_trace,
    simulate,
    write_trace,
)

COST = CostModel(step_s=0.01, prompt_token_s=0.001, sequence_s=0.002, context_token_s=0)
PLAN = PoolPlan("only", max_model_len=10_000, cost=COST, prefill_tokens=1000)


def test_one_request_takes_one_prefill_and_a_step_for_each_further_token() -> None:
    outcome = simulate([Arrival(5, 100, 11)], [PLAN], ttft_target_s=1)
    assert outcome.ttft_p50 == pytest.approx(0.01 + 0.1)
    assert outcome.token_p50 == pytest.approx(0.012)
    assert outcome.seconds == pytest.approx(5 + 0.11 + 10 * 0.012)
    assert outcome.within == 1
    assert outcome.gpu_hours == pytest.approx(outcome.seconds / 3600)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    outcome = simulate([Arrival(0, 2500, 1)], [PLAN], 1)
    assert outcome.ttft_p50 == pytest.approx(3 * 0.01 + 2.5)


def test_a_late_prompt_joins_after_the_step_under_way_and_slows_the_other() -> None:
    both = simulate([Arrival(0, 100, 101), Arrival(0.5, 100, 1)], [PLAN], 1)
    alone = simulate([Arrival(0, 100, 101)], [PLAN], 1)
    joined = 0.11 + math.ceil((0.5 - 0.11) / 0.012) * 0.012 - 0.5
    assert both.ttft_p99 >= 0.01 + 0.1 + 0.002 + joined - 0.01
    assert both.seconds == pytest.approx(alone.seconds + 0.1)


def test_context_costs_what_the_plan_lets_be_seen() -> None:
    seen = replace(COST, context_token_s=1e-5)
    full = replace(PLAN, cost=seen)
    local = replace(full, rules=(FULL, LayerRule("sliding_attention", span=100)))
    arrival = [Arrival(0, 900, 101)]
    per_token = [simulate(arrival, [plan], 1).token_p50 for plan in (full, local)]
    assert per_token[0] == pytest.approx(0.012 + 950e-5)
    assert per_token[1] == pytest.approx(0.012 + (950 + 100) / 2 * 1e-5)


def test_what_does_not_fit_the_cache_waits() -> None:
    small = replace(PLAN, kv_tokens=250)
    two = [Arrival(0, 100, 100), Arrival(0, 100, 100)]
    assert simulate(two, [small], 1).ttft_p99 > 1.2
    assert simulate(two, [replace(PLAN, kv_tokens=400)], 1).ttft_p99 < 0.3


def test_each_request_goes_to_the_smallest_pool_that_holds_it() -> None:
    slow = replace(COST, step_s=1)
    pools = [replace(PLAN, cost=slow), replace(PLAN, name="short", max_model_len=200)]
    outcome = simulate([Arrival(0, 100, 1), Arrival(0, 300, 1), Arrival(0, 10_000, 9)], pools, 0.5)
    assert outcome.requests == 2
    assert outcome.refused == 1
    assert outcome.within == 0.5


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_engines_in_proportion_to_load_keep_the_latency(replicas: int) -> None:
    load = list(generate("azure-conversation", 0.4 * replicas, 400, seed=1, longest=4000))
    outcome = simulate(load, [replace(PLAN, replicas=replicas)], 2)
    assert outcome.ttft_p50 < 2
    assert outcome.gpu_hours == pytest.approx(replicas * outcome.seconds / 3600)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.integers(1, 3000), st.integers(1, 300)),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
def test_every_request_is_answered_once_in_order(
    rows: list[tuple[float, int, int]], scaled: bool
) -> None:
    load = sorted((Arrival(*row) for row in rows), key=lambda arrival: arrival.time)
    scaling = Settings(min_replicas=0, max_replicas=3, target_tokens_per_replica=2000)
    plan = replace(PLAN, kv_tokens=5000, scaling=scaling if scaled else None, start_s=10)
    outcome = simulate(load, [plan], 1)
    assert outcome.requests == len(load)
    assert not math.isnan(outcome.ttft_p99)
    assert outcome.ttft_p50 > 0.0109
    generated = sum(arrival.output_tokens for arrival in load)
    assert outcome.tokens_per_s * outcome.seconds == pytest.approx(generated)


def test_autoscaling_uses_fewer_gpu_hours_than_the_most_it_needs() -> None:
    quiet = generate("azure-conversation", 0.2, 1200, seed=1, longest=4000)
    busy = generate("azure-conversation", 3, 600, seed=2, longest=4000)
    load = [*quiet, *(replace(arrival, time=1200 + arrival.time) for arrival in busy)]
    scaling = Settings(1, 8, target_tokens_per_replica=6000, down_delay_s=120)
    outcome = simulate(load, [replace(PLAN, scaling=scaling, start_s=30)], 5)
    assert 3 <= outcome.gpus <= 8
    assert outcome.gpu_hours < 0.7 * outcome.gpus * outcome.seconds / 3600
    cold = replace(scaling, min_replicas=0)
    first = simulate(load[:1], [replace(PLAN, scaling=cold, start_s=30)], 5)
    assert first.ttft_p50 > 30


def test_a_thousand_engines_take_seconds() -> None:
    load = list(generate("azure-conversation", 400, 30, longest=4000))
    began = time.monotonic()
    outcome = simulate(load, [replace(PLAN, replicas=1000)], 2)
    assert outcome.requests == len(load)
    assert outcome.gpus == 1000
    assert time.monotonic() - began < 60


def test_generated_lengths_have_the_published_quantiles() -> None:
    load = list(generate("azure-code", 100, 300, seed=3))
    assert len(load) == pytest.approx(30_000, rel=0.03)
    prompts = sorted(arrival.prompt_tokens for arrival in load)
    assert statistics.median(prompts) == pytest.approx(1469, rel=0.05)
    assert prompts[int(0.9 * len(prompts))] == pytest.approx(5194, rel=0.05)
    assert statistics.median(arrival.output_tokens for arrival in load) == pytest.approx(13, abs=1)
    assert (
        max(a.prompt_tokens + a.output_tokens for a in generate("azure-code", 9, 99, 1, 500)) <= 500
    )


def test_fitted_lengths_have_the_published_means() -> None:
    load = list(generate("lmsys-chat", 100, 600, seed=4))
    assert statistics.mean(a.prompt_tokens for a in load) == pytest.approx(69.5, rel=0.03)
    assert statistics.mean(a.output_tokens for a in load) == pytest.approx(214.5, rel=0.03)


def test_a_trace_survives_its_file() -> None:
    load = list(generate("azure-conversation", 2, 20))
    file = io.StringIO()
    write_trace(load, file)
    file.seek(0)
    read = read_trace(file)
    assert [(a.prompt_tokens, a.output_tokens) for a in read] == [
        (a.prompt_tokens, a.output_tokens) for a in load
    ]
    with pytest.raises(ConfigError, match="Line 2 of the trace is '1,2'"):
        read_trace(io.StringIO("0,1,1\n1,2\n"))
