"""How many replicas a pool should have, from what its requests cost and how they fare.

Requests wait at gateways, where Serve's own count does not see them, and one request may cost a
thousand times another. So each gateway reports its demand in tokens of ``balance.Cost`` (where the
KV cache of a local-attention request is capped by its windows and chunks) to the engines of the
pool, they add their own figures, and Serve's controller hands all of it to :class:`TokenPolicy`.

:func:`desired_replicas` is the decision, pure: time is an argument and the state is a value.

- Up: the outstanding tokens over ``target_tokens_per_replica``; or one more while KV cache is
  nearly full, or requests are preempted; or in proportion while the time to first token is over
  its target. Taken after ``up_delay_s``. The last three say nothing new until the replicas asked
  for have come and the requests that waited for them have passed, so they are not read till then.
- Down: to the highest number wanted during ``down_delay_s``, where the tokens must fit with a
  quarter to spare, and so must the load at which the first token was last too late. The gap
  between the two, and the delay, keep a pool from flapping.
- To zero only when nothing at all is outstanding. From zero, the gateway that holds the request
  asks for a replica itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve_app.request import Demand, EngineLoad

_DOWN_SHARE = 0.75  # of the target that a smaller pool may be filled to
_KV_FULL = 0.9
_TTFT_STEP = 2.0  # the most that a slow first token multiplies a pool by
_ROOM_SHARE = 0.8  # of an engine's KV cache, where no target is configured
_SETTLE_S = 20.0  # after a change, until the time to first token is that of the new size
_DEMAND_TTL_S = 10.0  # a gateway that said nothing for so long is gone


@dataclass(frozen=True, slots=True)
class Settings:
    """The bounds and targets of one pool. Without any target, an engine's own KV cache is it."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_tokens_per_replica: int | None = None
    ttft_target_s: float | None = None
    up_delay_s: float = 5.0
    down_delay_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of a pool at one moment."""

    target: int  # replicas asked for
    running: int  # replicas that run
    tokens: float = 0.0  # outstanding cost: queued at gateways and under way in engines
    ttft_s: float = 0.0  # p95 of late, at the gateway that fares worst; 0 without requests
    kv_usage: float = 0.0  # mean over replicas, 0 to 1
    preemptions: int = 0  # since the engines started, over all of them
    room: int = 0  # KV tokens of one engine; 0 while unknown


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered between decisions. Times are of the clock that the caller uses."""

    up_since: float | None = None
    down_since: float | None = None
    peak: int = 0  # the most replicas wanted since ``down_since``
    running: int = 0  # replicas that ran at the last decision
    settled_at: float = -math.inf  # from when symptoms are read again
    preemptions: int = 0
    slow_tokens: float | None = None  # tokens of a replica when the first token was last too late


def desired_replicas(
    state: State, signals: Signals, now: float, settings: Settings
) -> tuple[int, State]:
    """The replicas to ask for now, within the bounds, and the state for the next call."""
    state = _observed(state, signals, now, settings)
    target = signals.target
    up = _bounded(_wanted_up(state, signals, now, settings), settings)
    down = _bounded(_wanted_down(state, signals, settings), settings)
    state = replace(state, preemptions=signals.preemptions)
    if up > target:
        since = now if state.up_since is None else state.up_since
        if now - since >= settings.up_delay_s or target < settings.min_replicas:
            return up, replace(state, up_since=None, down_since=None)
        return target, replace(state, up_since=since, down_since=None)
    if down < target:
        since = now if state.down_since is None else state.down_since
        peak = down if state.down_since is None else max(down, state.peak)
        if now - since >= settings.down_delay_s or target > settings.max_replicas:
            return peak, replace(state, up_since=None, down_since=None)
        return target, replace(state, up_since=None, down_since=since, peak=peak)
    return target, replace(state, up_since=None, down_since=None)


def _observed(state: State, signals: Signals, now: float, settings: Settings) -> State:
    """The state with what the signals tell of the pool's present size."""
    if signals.running != state.running:
        return replace(state, running=signals.running, settled_at=now + _SETTLE_S)
    slow = _is_slow(signals, settings) and signals.tokens and signals.running
    if slow and now >= state.settled_at:
        return replace(state, slow_tokens=signals.tokens / signals.running)
    return state


def _is_slow(signals: Signals, settings: Settings) -> bool:
    return settings.ttft_target_s is not None and signals.ttft_s > settings.ttft_target_s


def _wanted_up(state: State, signals: Signals, now: float, settings: Settings) -> int:
    """Replicas without which the pool is too small."""
    wanted = _for_tokens(signals.tokens, _target(signals, settings))
    if signals.running < max(1, signals.target) or now < state.settled_at:
        return wanted
    if signals.kv_usage > _KV_FULL or signals.preemptions > state.preemptions:
        wanted = max(wanted, signals.running + 1)
    if settings.ttft_target_s is not None and signals.ttft_s > settings.ttft_target_s:
        times = min(_TTFT_STEP, signals.ttft_s / settings.ttft_target_s)
        wanted = max(wanted, math.ceil(signals.running * times))
    return wanted


def _wanted_down(state: State, signals: Signals, settings: Settings) -> int:
    """Replicas with which the pool is surely large enough."""
    if _is_slow(signals, settings) and signals.tokens:
        return signals.target
    target = min(_target(signals, settings), state.slow_tokens or math.inf)
    kv = math.ceil(signals.running * signals.kv_usage / (_DOWN_SHARE * _KV_FULL))
    return max(_for_tokens(signals.tokens, _DOWN_SHARE * target), kv)


def _target(signals: Signals, settings: Settings) -> float:
    """Tokens that a replica should have outstanding; infinite while nothing is known of it."""
    return settings.target_tokens_per_replica or signals.room * _ROOM_SHARE or math.inf


def _for_tokens(tokens: float, target: float) -> int:
    return max(1, math.ceil(tokens / target)) if tokens else 0


def _bounded(replicas: int, settings: Settings) -> int:
    return max(settings.min_replicas, min(settings.max_replicas, replicas))


class DemandLedger:
    """What each gateway last said of its demand, kept by every engine of the pool."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, Demand]] = {}

    def note(self, demand: Demand) -> None:
        self._heard[demand.gateway] = (self._clock(), demand)

    def stats(self, load: EngineLoad, room: int) -> dict[str, float]:
        """The figures of one replica, under the names that :func:`read_signals` looks for."""
        now = self._clock()
        self._heard = {
            name: (at, demand)
            for name, (at, demand) in self._heard.items()
            if now - at < _DEMAND_TTL_S
        }
        demands = [demand for _, demand in self._heard.values()]
        return {
            "tokens": sum(demand.tokens for demand in demands),
            "ttft_s": max((demand.ttft_s for demand in demands), default=0.0),
            "kv_usage": load.kv_usage,
            "preemptions": load.preemptions,
            "room": room,
        }


def read_signals(
    metrics: Mapping[str, Mapping[Any, float]], target: int, running: int
) -> Signals | None:
    """Signals from the newest value of each metric of each replica; None before any came.

    Every replica hears every gateway, so demand is the largest figure heard, not the sum.
    """
    usage = list(metrics.get("kv_usage", {}).values())
    if not usage:
        return None
    return Signals(
        target=target,
        running=running,
        tokens=_most(metrics.get("tokens", {}).values()),
        ttft_s=_most(metrics.get("ttft_s", {}).values()),
        kv_usage=sum(usage) / len(usage),
        preemptions=round(sum(metrics.get("preemptions", {}).values())),
        room=round(min(metrics.get("room", {}).values(), default=0)),
    )


def _most(values: Iterable[float]) -> float:
    return max(values, default=0.0)


class TokenPolicy:
    """Serve's custom policy for one pool: makes signals of Serve's context and asks the decision.

    Serve makes one of it in the controller, from ``policy_kwargs``, and keeps the state.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = Settings(**settings)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``context`` is ``ray.serve.config.AutoscalingContext``."""
        raw = context.raw_metrics or {}
        newest = {
            name: {replica: series[-1].value for replica, series in by_replica.items() if series}
            for name, by_replica in raw.items()
        }
        target, running = context.target_num_replicas, context.current_num_replicas
        signals = read_signals(newest, target, running)
        if signals is None:  # nothing runs, or it has not reported yet
            return _bounded(target, self._settings), dict(context.policy_state)
        known = context.policy_state.get("pool")
        state = State(**known) if known else State(preemptions=signals.preemptions)
        replicas, state = desired_replicas(state, signals, context.current_time, self._settings)
        return replicas, {"pool": asdict(state)}
