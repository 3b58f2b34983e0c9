"""Finds the step costs with which the simulator takes as long as an engine did. Pure.

First from groups of requests sent together to an idle engine, whose steps are known without
knowing their costs: a linear fit. Then from traffic, in which what is under way at once depends on
the costs themselves: a few steps of Gauss and Newton, on the logarithms of costs and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serve_app.simulator import Arrival, CostModel, PoolPlan, replay, simulate

Floats = NDArray[np.float64]

PARTS = 4  # of a CostModel
UNITS = [CostModel(*(float(i == k) for i in range(PARTS))) for k in range(PARTS)]
_ROUNDS = 15
_NUDGE = 0.3  # of a logarithm, for the derivatives: small ones measure how requests fall into steps
_MOST = 0.5  # a cost changes by at most this logarithm in a round
_DAMPING = 1.0
_EXACT = 0.05  # relative errors below this count alike


@dataclass(frozen=True, slots=True)
class Timed:
    """One request as its client saw it: seconds to its first token and to its last."""

    ttft: float
    done: float


@dataclass(frozen=True, slots=True)
class Replayed:
    """Traffic and what its clients saw, in the same order."""

    arrivals: Sequence[Arrival]
    timed: Sequence[Timed]


def with_cost(plan: PoolPlan, cost: CostModel) -> PoolPlan:
    """One engine of the plan, with these costs."""
    return replace(plan, cost=cost, replicas=1, scaling=None)


def fit(plan: PoolPlan, groups: Sequence[Sequence[Arrival]], seconds: Sequence[float]) -> CostModel:
    """Relative least squares over groups that took ``seconds`` each, without negative costs."""
    table = _steps(plan, groups) / np.array(seconds)[:, None]
    used = list(range(PARTS))
    while True:
        solution = np.linalg.lstsq(table[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (solution >= 0).all():
            break
        used.pop(int(solution.argmin()))
    return _model(used, solution)


def predicted(plan: PoolPlan, groups: Sequence[Sequence[Arrival]], cost: CostModel) -> list[float]:
    """Seconds of each group under ``cost``."""
    return [float(each) for each in _steps(plan, groups) @ np.array(astuple(cost))]


def _steps(plan: PoolPlan, groups: Sequence[Sequence[Arrival]]) -> Floats:
    """How many of each part a group takes: its length with a cost of one for each in turn."""
    units = [with_cost(plan, unit) for unit in UNITS]
    rows = [[simulate(group, [unit], 1).seconds for unit in units] for group in groups]
    return np.array(rows, dtype=np.float64)


def refine(plan: PoolPlan, cost: CostModel, traffic: Sequence[Replayed]) -> CostModel:
    """Costs nearer to how long ``traffic`` took. Those that are nothing stay nothing.

    The times are each request's to its first token and between two tokens. Large errors count by
    less than their square, so that a moment in which the machine did something else decides little.
    """
    real = np.concatenate([_measured(each) for each in traffic])
    used = [index for index, part in enumerate(astuple(cost)) if part > 0]
    logs = np.log(np.array(astuple(cost))[used])

    def simulated(logs: Floats) -> Floats:
        plans = [with_cost(plan, _model(used, np.exp(logs)))]
        times = np.concatenate([_simulated(each.arrivals, plans) for each in traffic])
        return np.asarray(np.log(times))

    best, least = logs, np.inf
    for _ in range(_ROUNDS):
        here = simulated(logs)
        errors = np.log(real) - here
        if np.abs(errors).mean() < least:
            best, least = logs, float(np.abs(errors).mean())
        slopes = np.stack(
            [(simulated(logs + _NUDGE * row) - here) / _NUDGE for row in np.eye(len(logs))], axis=1
        )
        weights = 1 / np.sqrt(np.maximum(np.abs(errors), _EXACT))
        damping = _DAMPING * np.eye(len(logs))
        change = np.linalg.lstsq(
            np.vstack([slopes * weights[:, None], damping]),
            np.concatenate([errors * weights, np.zeros(len(logs))]),
            rcond=None,
        )[0]
        logs = logs + np.clip(change, -_MOST, _MOST)
    return _model(used, np.exp(best))


def _model(used: Sequence[int], values: Floats) -> CostModel:
    """The costs at ``used``, and nothing elsewhere."""
    parts = [0.0] * PARTS
    for index, value in zip(used, values, strict=True):
        parts[index] = float(value)
    return CostModel(*parts)


def _measured(run: Replayed) -> Floats:
    pairs = zip(run.arrivals, run.timed, strict=True)
    return np.array([time for arrival, timed in pairs for time in _two(arrival, timed)])


def _simulated(arrivals: Sequence[Arrival], plans: Sequence[PoolPlan]) -> Floats:
    times: list[float] = []
    for request in replay(arrivals, plans):
        at = request.arrival.time
        times += _two(request.arrival, Timed(request.first - at, request.done - at))
    return np.array(times)


def _two(arrival: Arrival, timed: Timed) -> list[float]:
    if arrival.output_tokens == 1:
        return [timed.ttft]
    return [timed.ttft, (timed.done - timed.ttft) / (arrival.output_tokens - 1)]
