"""Costs are found again from the times that they led to."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from benchmarks.cost_fit import Replayed, Timed, fit, predicted, refine, with_cost
from serve_app.simulator import Arrival, CostModel, PoolPlan, generate, replay, simulate

COST = CostModel(step_s=0.004, prompt_token_s=4e-5, sequence_s=2e-4, context_token_s=2e-8)
PLAN = PoolPlan("only", max_model_len=8192, cost=COST, prefill_tokens=2048)
GROUPS = [
    [Arrival(0, 256, 1)],
    [Arrival(0, 7000, 1)],
    [Arrival(0, 32, 64)],
    [Arrival(0, 32, 64)] * 16,
    [Arrival(0, 4000, 64)] * 4,
]


def traffic(cost: CostModel, rate: float, seed: int) -> Replayed:
    arrivals = list(generate("azure-conversation", rate, 20, seed, PLAN.max_model_len))
    done = replay(arrivals, [with_cost(PLAN, cost)])
    timed = [Timed(r.first - r.arrival.time, r.done - r.arrival.time) for r in done]
    return Replayed(arrivals, timed)


def test_groups_give_back_the_costs_that_they_took() -> None:
    seconds = [simulate(group, [PLAN], 1).seconds for group in GROUPS]
    found = fit(PLAN, GROUPS, seconds)
    assert astuple(found) == pytest.approx(astuple(COST), rel=1e-6)
    assert predicted(PLAN, GROUPS, found) == pytest.approx(seconds)


def test_no_cost_is_negative() -> None:
    seconds = [simulate(group, [PLAN], 1).seconds for group in GROUPS]
    seconds[3] /= 3  # sixteen sequences faster than one: a sequence would cost less than nothing
    assert min(astuple(fit(PLAN, GROUPS, seconds))) >= 0


def test_traffic_mends_costs_that_were_wrong() -> None:
    wrong = CostModel(step_s=0.002, prompt_token_s=3.2e-5, sequence_s=4e-4, context_token_s=2.4e-8)
    seen = [traffic(COST, rate, seed=2) for rate in (1, 4)]
    found = refine(PLAN, wrong, seen)
    other = list(generate("azure-conversation", 4, 20, 1, PLAN.max_model_len))
    truly, simulated = (simulate(other, [with_cost(PLAN, cost)], 1) for cost in (COST, found))
    assert simulated.ttft_p50 == pytest.approx(truly.ttft_p50, rel=0.05)
    assert simulated.token_p50 == pytest.approx(truly.token_p50, rel=0.05)
    assert simulated.token_p95 == pytest.approx(truly.token_p95, rel=0.05)


def test_a_few_moments_of_other_work_change_little() -> None:
    seen = traffic(COST, 4, seed=2)
    timed = [
        replace(each, ttft=each.ttft * 5, done=each.done * 5) if number % 20 == 0 else each
        for number, each in enumerate(seen.timed)
    ]
    found = refine(PLAN, COST, [Replayed(seen.arrivals, timed)])
    assert found.step_s == pytest.approx(COST.step_s, rel=0.1)
    assert found.prompt_token_s == pytest.approx(COST.prompt_token_s, rel=0.1)


def test_a_cost_that_is_nothing_stays_nothing() -> None:
    free = replace(COST, context_token_s=0)
    assert refine(PLAN, free, [traffic(COST, 1, seed=2)]).context_token_s == 0
