"""What a configuration would do with an arrival trace, without the machines that it names.

A discrete-event model of engines behind a gateway. Pure: no clock, no randomness but the seed of
:func:`generate`. What it keeps of the real system:

- each request goes to the smallest pool that holds it, and to the replica with the fewest
  outstanding tokens, in the costs of ``balance.Cost``;
- an engine works in steps. One step computes a token of every decoding sequence and as many prompt
  tokens as ``prefill_tokens`` leaves room for, in order of arrival, and takes the time that
  :class:`CostModel` gives it, fitted from measured steps;
- a sequence starts when a place and KV cache for all of it are free, counted under the pool's
  attention plan;
- replicas come and go by ``autoscaling.desired_replicas``, after ``start_s``.

What it leaves out: batching by length inside a pool, prefix caching, preemption, and the time of
network and gateway. While nothing but decoding happens, the steps up to the next event are taken
as one, with the mean context of each sequence: that is what makes a thousand engines feasible.
"""

from __future__ import annotations

import bisect
import csv
import functools
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from serve_app.autoscaling import Settings, Signals, State, desired_replicas
from serve_app.capacity import kv_tokens
from serve_app.errors import ConfigError
from serve_app.pattern import FULL, LayerRule

_DECIDE_S = 1.0  # between two decisions of the autoscaling policy
_TTFT_WINDOW_S = 15.0

# Quantiles of lengths: minimum, 10 %, 50 %, 90 %, maximum, prompt and output. Between them, lengths
# are interpolated in logarithms.
# - azure: Azure's LLM inference traces of November 2023,
#   https://github.com/Azure/AzurePublicDataset (CC-BY), described in Patel et al., "Splitwise",
#   ISCA 2024.
# - lmsys: no quantiles are published. Fitted to the means of Zheng et al., "LMSYS-Chat-1M", ICLR
#   2024, Table 1 (69.5 tokens a prompt, 214.5 a response): the exponential distribution of that
#   mean, whose maximum makes the interpolated mean the published one. The few very long prompts
#   that such traffic has are not in it, and a prompt is one turn, without the turns before it.
_LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)
LENGTHS = {
    "azure-conversation": ((1, 207, 1020, 2735, 14050), (1, 54, 129, 424, 1000)),
    "azure-code": ((1, 147, 1469, 5194, 7437), (1, 7, 13, 55, 1899)),
    "lmsys-chat": ((1, 7, 48, 160, 329), (1, 23, 149, 494, 998)),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    time: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of one engine step, as a sum over what it computes; see ``benchmarks/cost_model.py``.

    ``context_token_s`` is for each key that a computed token attends to, averaged over layers.
    """

    step_s: float
    prompt_token_s: float
    sequence_s: float
    context_token_s: float

    def seconds(self, prompt: float, sequences: int, context: float) -> float:
        return (
            self.step_s
            + self.prompt_token_s * prompt
            + self.sequence_s * sequences
            + self.context_token_s * context
        )


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool to simulate. Lengths and rooms are tokens."""

    name: str
    max_model_len: int
    cost: CostModel
    replicas: int = 1
    gpus_per_replica: float = 1.0
    rules: tuple[LayerRule, ...] = (FULL,)
    prefill_tokens: int = 8192
    max_sequences: int = 256
    kv_tokens: int = 2**20
    start_s: float = 60.0
    scaling: Settings | None = None


@dataclass(slots=True)
class Request:
    """One request on its way."""

    arrival: Arrival
    kv: float
    context: float  # mean over its decoding, averaged over layers
    left: int  # prompt tokens still to compute
    first: float = math.nan
    done: float = math.nan

    @property
    def cost(self) -> float:
        return self.arrival.prompt_tokens + self.kv


class Engine:
    """One replica. ``advance`` is called at each event that concerns it."""

    def __init__(self, plan: PoolPlan, now: float) -> None:
        self.plan = plan
        self.started = now
        self.outstanding = 0.0
        self.kv_held = 0.0
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.steps = 0  # decode steps done
        self.ends: list[tuple[int, int, Request]] = []  # a heap: step at which a sequence ends
        self.context = 0.0
        self.draining = False
        self._numbers = itertools.count()
        self._began = now  # of the steps under way
        self._each = 0.0
        self._count = 0
        self._prompt: list[tuple[Request, int]] = []  # prompt tokens in the step under way

    @property
    def busy(self) -> bool:
        return self._count > 0

    @property
    def until(self) -> float:
        """When the steps under way end."""
        return self._began + self._count * self._each

    def add(self, request: Request, now: float) -> None:
        self.outstanding += request.cost
        self.waiting.append(request)
        if self.busy and not self._prompt:  # the new one joins after the step under way
            done = max(1, math.ceil((now - self._began) / self._each)) if self._each else 1
            self._count = min(self._count, done)

    def settle(self) -> list[Request]:
        """End the steps under way; returns each request once that got its first or last token."""
        now = self.until
        changed = []
        self.steps += self._count
        for request, tokens in self._prompt:
            request.left -= tokens
            if request.left == 0:
                self.prefilling.remove(request)
                changed.append(request)
                self._decode(request, now)
        self._prompt = []
        self._count = 0
        while self.ends and self.ends[0][0] <= self.steps:
            request = heapq.heappop(self.ends)[2]
            self.context -= request.context
            self._leave(request, now)
            changed.append(request)
        return changed

    def begin(self, now: float) -> None:
        """Start the next steps, if there is anything to do."""
        self._admit()
        self._began = now
        sequences = len(self.ends)
        budget = self.plan.prefill_tokens - sequences
        keys = 0.0
        for request in self.prefilling:
            if budget <= 0:
                break
            tokens = min(budget, request.left)
            budget -= tokens
            self._prompt.append((request, tokens))
            behind = request.arrival.prompt_tokens - request.left
            keys += tokens * kv_tokens(self.plan.rules, behind + tokens // 2 + 1)
        prompt = sum(tokens for _, tokens in self._prompt)
        if not prompt and not sequences:
            return
        self._count = 1 if prompt else self.ends[0][0] - self.steps
        self._each = self.plan.cost.seconds(prompt, sequences, self.context + keys)

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            alone = not self.ends and not self.prefilling
            full = len(self.ends) + len(self.prefilling) >= self.plan.max_sequences
            if not alone and (full or self.kv_held + request.kv > self.plan.kv_tokens):
                return
            self.kv_held += request.kv
            self.prefilling.append(self.waiting.popleft())

    def _decode(self, request: Request, now: float) -> None:
        request.first = now
        self.outstanding -= request.arrival.prompt_tokens
        if request.arrival.output_tokens <= 1:
            self._leave(request, now)
            return
        self.context += request.context
        end = self.steps + request.arrival.output_tokens - 1
        heapq.heappush(self.ends, (end, next(self._numbers), request))

    def _leave(self, request: Request, now: float) -> None:
        request.done = now
        self.kv_held -= request.kv
        self.outstanding -= request.kv


@dataclass
class Pool:
    """The replicas of one plan over time."""

    plan: PoolPlan
    engines: list[Engine] = field(default_factory=list)
    queue: deque[Request] = field(default_factory=deque)
    target: int = 0
    starting: int = 0
    most: int = 0
    gpu_seconds: float = 0.0
    state: State = field(default_factory=State)
    firsts: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def live(self) -> list[Engine]:
        return [engine for engine in self.engines if not engine.draining]

    def tokens(self) -> float:
        queued = sum(request.cost for request in self.queue)
        return queued + sum(engine.outstanding for engine in self.engines)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run came to. Times are seconds; NaN where nothing was answered."""

    requests: int
    refused: int  # longer than every pool
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    token_p50: float  # between two tokens of a request, its mean
    token_p95: float
    tokens_per_s: float  # generated, over the whole run
    goodput: float  # requests a second whose first token came within the target
    within: float  # the share of requests that did
    gpus: float  # the most at once
    gpu_hours: float
    seconds: float


def simulate(
    arrivals: Sequence[Arrival], plans: Sequence[PoolPlan], ttft_target_s: float
) -> Outcome:
    """Replay ``arrivals``, in order of time, against ``plans``."""
    return _Run(arrivals, plans).run(ttft_target_s)


def replay(arrivals: Sequence[Arrival], plans: Sequence[PoolPlan]) -> list[Request]:
    """As :func:`simulate`, but returns each request that a pool holds, in order of time."""
    run = _Run(arrivals, plans)
    run.run(0.0)
    return run.requests


class _Run:
    def __init__(self, arrivals: Sequence[Arrival], plans: Sequence[PoolPlan]) -> None:
        self._pools = [Pool(plan) for plan in sorted(plans, key=lambda plan: plan.max_model_len)]
        self._arrivals = arrivals
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._least: dict[int, list[tuple[float, int, Engine]]] = {}
        self.requests: list[Request] = []
        self._refused = 0
        self._open = 0  # requests that are not answered in full
        self._last = 0.0

    def run(self, ttft_target_s: float) -> Outcome:
        for pool in self._pools:
            scaling = pool.plan.scaling
            pool.target = scaling.min_replicas if scaling else pool.plan.replicas
            for _ in range(pool.target):
                self._start(pool, 0.0)
            if scaling:
                self._at(_DECIDE_S, functools.partial(self._decide, pool))
        coming = deque(self._arrivals)
        while coming or self._open:
            if coming and (not self._events or coming[0].time <= self._events[0][0]):
                self._arrive(coming.popleft())
            else:
                now, _, event = heapq.heappop(self._events)
                event(now)
        return self._outcome(ttft_target_s)

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def _arrive(self, arrival: Arrival) -> None:
        total = arrival.prompt_tokens + arrival.output_tokens
        pool = next((pool for pool in self._pools if total <= pool.plan.max_model_len), None)
        if pool is None:
            self._refused += 1
            return
        rules = pool.plan.rules
        middle = arrival.prompt_tokens + arrival.output_tokens // 2
        request = Request(
            arrival, kv_tokens(rules, total), kv_tokens(rules, middle), arrival.prompt_tokens
        )
        self.requests.append(request)
        self._open += 1
        self._send(pool, request, arrival.time)

    def _send(self, pool: Pool, request: Request, now: float) -> None:
        engine = self._choose(pool)
        if engine is None:
            pool.queue.append(request)
            if pool.target == 0:  # the gateway asks for a first replica itself
                pool.target = 1
                self._start_later(pool, now)
            return
        engine.add(request, now)
        self._rank(pool, engine)
        if engine.busy:
            self._at(engine.until, lambda at: self._step(pool, engine, at))
        else:
            self._begin(pool, engine, now)

    def _choose(self, pool: Pool) -> Engine | None:
        """The engine with the fewest outstanding tokens; a heap with entries out of date."""
        heap = self._least.setdefault(id(pool), [])
        while heap:
            load, _, engine = heap[0]
            if not engine.draining and load == engine.outstanding:
                return engine
            heapq.heappop(heap)
        return None

    def _rank(self, pool: Pool, engine: Engine) -> None:
        if not engine.draining:
            entry = (engine.outstanding, next(self._numbers), engine)
            heapq.heappush(self._least.setdefault(id(pool), []), entry)

    def _begin(self, pool: Pool, engine: Engine, now: float) -> None:
        engine.begin(now)
        if engine.busy:
            self._at(engine.until, lambda at: self._step(pool, engine, at))
        elif engine.draining:
            self._stop(pool, engine, now)

    def _step(self, pool: Pool, engine: Engine, now: float) -> None:
        if not engine.busy or now != engine.until:  # an arrival has cut these steps short
            return
        for request in engine.settle():
            if request.first == now:
                pool.firsts.append((now, now - request.arrival.time))
            if request.done == now:
                self._open -= 1
        self._last = max(self._last, now)
        self._rank(pool, engine)
        self._begin(pool, engine, now)

    def _start_later(self, pool: Pool, now: float) -> None:
        pool.starting += 1

        def come(at: float) -> None:
            pool.starting -= 1
            if len(pool.live) < pool.target:
                self._start(pool, at)

        self._at(now + pool.plan.start_s, come)

    def _start(self, pool: Pool, now: float) -> None:
        engine = Engine(pool.plan, now)
        pool.engines.append(engine)
        pool.most = max(pool.most, len(pool.engines))
        self._rank(pool, engine)
        waiting, pool.queue = pool.queue, deque()
        for request in waiting:
            self._send(pool, request, now)

    def _stop(self, pool: Pool, engine: Engine, now: float) -> None:
        pool.engines.remove(engine)
        pool.gpu_seconds += (now - engine.started) * pool.plan.gpus_per_replica

    def _decide(self, pool: Pool, now: float) -> None:
        assert pool.plan.scaling is not None
        live = pool.live
        signals = Signals(
            target=pool.target,
            running=len(live),
            tokens=pool.tokens(),
            ttft_s=_recent_p95(pool.firsts, now),
            kv_usage=sum(e.kv_held for e in live) / (len(live) * pool.plan.kv_tokens)
            if live
            else 0.0,
            room=pool.plan.kv_tokens,
        )
        if live or pool.target:
            pool.target, pool.state = desired_replicas(pool.state, signals, now, pool.plan.scaling)
        for _ in range(pool.target - len(live) - pool.starting):
            self._start_later(pool, now)
        for engine in sorted(live, key=lambda e: e.outstanding)[: max(0, len(live) - pool.target)]:
            engine.draining = True
            if not engine.busy:
                self._stop(pool, engine, now)
        self._at(now + _DECIDE_S, lambda at: self._decide(pool, at))

    def _outcome(self, ttft_target_s: float) -> Outcome:
        seconds = max(self._last, self._arrivals[-1].time if self._arrivals else 0.0)
        for pool in self._pools:
            for engine in list(pool.engines):
                self._stop(pool, engine, seconds)
        ttfts = sorted(r.first - r.arrival.time for r in self.requests)
        gaps = sorted(
            (r.done - r.first) / (r.arrival.output_tokens - 1)
            for r in self.requests
            if r.arrival.output_tokens > 1
        )
        good = bisect.bisect_right(ttfts, ttft_target_s)
        generated = sum(r.arrival.output_tokens for r in self.requests)
        return Outcome(
            requests=len(self.requests),
            refused=self._refused,
            ttft_p50=quantile(ttfts, 0.5),
            ttft_p95=quantile(ttfts, 0.95),
            ttft_p99=quantile(ttfts, 0.99),
            token_p50=quantile(gaps, 0.5),
            token_p95=quantile(gaps, 0.95),
            tokens_per_s=generated / seconds if seconds else 0.0,
            goodput=good / seconds if seconds else 0.0,
            within=good / len(ttfts) if ttfts else math.nan,
            gpus=sum(pool.most * pool.plan.gpus_per_replica for pool in self._pools),
            gpu_hours=sum(pool.gpu_seconds for pool in self._pools) / 3600,
            seconds=seconds,
        )


def _recent_p95(firsts: deque[tuple[float, float]], now: float) -> float:
    while firsts and firsts[0][0] < now - _TTFT_WINDOW_S:
        firsts.popleft()
    recent = sorted(seconds for _, seconds in firsts)
    return recent[int(0.95 * (len(recent) - 1))] if recent else 0.0


def quantile(ordered: Sequence[float], q: float) -> float:
    """The ``q`` quantile of ordered values, linear between ranks; NaN of nothing."""
    if not ordered:
        return math.nan
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def read_trace(file: TextIO) -> list[Arrival]:
    """A CSV of ``time,prompt_tokens,output_tokens``, with or without that header.

    Raises ``ConfigError`` with the number of a line that is none of these.
    """
    arrivals = []
    for number, row in enumerate(csv.reader(file), 1):
        if not row or (number == 1 and row[0].strip() == "time"):
            continue
        try:
            time, prompt, output = row
            arrival = Arrival(float(time), int(prompt), int(output))
        except ValueError as error:
            raise ConfigError(
                f"Line {number} of the trace is {','.join(row)!r}, but it must be a time in "
                "seconds, prompt tokens and output tokens."
            ) from error
        if arrival.prompt_tokens < 1 or arrival.output_tokens < 1 or arrival.time < 0:
            raise ConfigError(f"Line {number} of the trace has a number that is too small.")
        arrivals.append(arrival)
    return sorted(arrivals, key=lambda arrival: arrival.time)


def write_trace(arrivals: Iterable[Arrival], file: TextIO) -> None:
    writer = csv.writer(file)
    writer.writerow(("time", "prompt_tokens", "output_tokens"))
    for arrival in arrivals:
        writer.writerow((f"{arrival.time:.6f}", arrival.prompt_tokens, arrival.output_tokens))


def generate(
    lengths: str, rate: float, seconds: float, seed: int = 0, longest: int = 2**31
) -> Iterator[Arrival]:
    """Poisson arrivals of ``rate`` a second, with the lengths of one of :data:`LENGTHS`.

    Prompts are cut so that prompt and output together are at most ``longest`` tokens.
    """
    draw = random.Random(seed)
    prompts, outputs = LENGTHS[lengths]
    now = draw.expovariate(rate)
    while now < seconds:
        output = min(_length(outputs, draw.random()), longest - 1)
        prompt = min(_length(prompts, draw.random()), longest - output)
        yield Arrival(now, prompt, output)
        now += draw.expovariate(rate)


def _length(quantiles: Sequence[int], at: float) -> int:
    right = min(bisect.bisect_right(_LEVELS, at), len(_LEVELS) - 1)
    low, high = math.log(quantiles[right - 1]), math.log(quantiles[right])
    share = (at - _LEVELS[right - 1]) / (_LEVELS[right] - _LEVELS[right - 1])
    return round(math.exp(low + share * (high - low)))
