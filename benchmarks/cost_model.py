"""Fits the step times of one engine, for ``local-attention simulate``, and checks the simulator.

    python -m benchmarks.cost_model configs/demo-cpu.yaml long --out configs/demo-cpu.cost.json
    python -m benchmarks.cost_model configs/demo-cpu.yaml long --check configs/demo-cpu.cost.json \\
        --rates 1 4

The same on GPUs, with any configuration whose weights are there, or with ``load_format: dummy`` in
its ``engine_args`` and ``--shape``. Run it while the machine does nothing else.

An engine of the named pool is started in this process and asked through its own HTTP port, so that
tokenizing and streaming are in the times. Prompts are random, so that no prefix is cached. The
first fit is to groups of requests on an idle engine; with ``--rates``, it is refined on traffic of
these rates, and then checked on other traffic of the same. See ``benchmarks/cost_fit.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import aiohttp

from benchmarks import shape
from benchmarks.cost_fit import Replayed, Timed, fit, predicted, refine, with_cost
from serve_app.config import AppConfig, load_config
from serve_app.model_config import read_model_config
from serve_app.request import TOKEN_HEADER, EngineInfo
from serve_app.simulate import Measured, plans, read_measured
from serve_app.simulator import Arrival, CostModel, PoolPlan, generate, quantile, simulate

SHAPES = {"0.6b": shape.QWEN3_06B, "8b": shape.LLAMA_8B}
LENGTHS = "azure-conversation"
# Traffic to fit and traffic to check take turns, so that a machine that slows down slows both.
FIT, CHECK, FIT_TOO = 2, 1, 3
REPEATS = 5
PROMPTS = (32, 256, 1024, 2048, 4096, 7680, 16384, 65536)
BATCHES = ((1, 32), (4, 32), (16, 32), (64, 128), (1, 2048), (4, 1024), (16, 512), (4, 16384))


def groups(longest: int) -> list[list[Arrival]]:
    """Requests that are sent together: prompts alone, then decoding in batches."""
    prompts = [[Arrival(0, length, 1)] for length in PROMPTS]
    decodes = [[Arrival(0, length, 64)] * count for count, length in BATCHES]
    return [group for group in prompts + decodes if group[0].prompt_tokens + 64 <= longest]


@dataclass(frozen=True)
class Target:
    """One engine behind its own HTTP port."""

    session: aiohttp.ClientSession
    info: EngineInfo
    model: str

    async def ask(self, arrival: Arrival) -> Timed:
        body = {
            "model": self.model,
            "prompt": [random.randint(32, 126) for _ in range(arrival.prompt_tokens)],
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        began = time.monotonic()
        first = None
        url, headers = f"{self.info.url}/v1/completions", {TOKEN_HEADER: self.info.token}
        async with self.session.post(url, json=body, headers=headers) as reply:
            reply.raise_for_status()
            async for _ in reply.content.iter_any():
                first = first or time.monotonic()
        assert first is not None
        return Timed(first - began, time.monotonic() - began)

    async def send(self, arrivals: Sequence[Arrival]) -> Replayed:
        """Send each request at its time."""
        began = time.monotonic()

        async def one(arrival: Arrival) -> Timed:
            await asyncio.sleep(arrival.time - (time.monotonic() - began))
            return await self.ask(arrival)

        return Replayed(arrivals, await asyncio.gather(*(one(arrival) for arrival in arrivals)))


async def measure(target: Target, plan: PoolPlan) -> CostModel:
    """Time each group a few times and fit the medians.

    Groups take turns, so that a busy moment does not hit all the times of one.
    """
    sent = groups(plan.max_model_len)
    walls: list[list[float]] = []
    for group in sent:
        await target.send(group)  # warm-up
        walls.append([])
    for _ in range(REPEATS):
        for group, times in zip(sent, walls, strict=True):
            times.append(max(timed.done for timed in (await target.send(group)).timed))
    seconds = [median(times) for times in walls]
    cost = fit(plan, sent, seconds)
    for group, times, fitted in zip(sent, walls, predicted(plan, sent, cost), strict=True):
        print(
            f"{len(group):3} x {group[0].prompt_tokens:5} + {group[0].output_tokens:3} tokens: "
            f"{median(times):7.3f} s ({min(times):.3f} to {max(times):.3f}), "
            f"fitted {fitted / median(times) - 1:+.0%}",
            flush=True,
        )
    return cost


async def traffic(
    target: Target, longest: int, rate: float, seconds: float, seeds: Sequence[int]
) -> dict[int, list[Replayed]]:
    """What was sent at one rate, by seed."""
    sent: dict[int, list[Replayed]] = {}
    for seed in seeds:
        arrivals = list(generate(LENGTHS, rate, seconds, seed, longest))
        sent.setdefault(seed, []).append(await target.send(arrivals))
    return sent


def compare(plan: PoolPlan, runs: Sequence[Replayed]) -> None:
    """Print what runs of the same arrivals came to beside what the simulator makes of them."""
    arrivals = runs[0].arrivals
    outcome = simulate(arrivals, [with_cost(plan, plan.cost)], 2.0)
    ttfts = sorted(timed.ttft for run in runs for timed in run.timed)
    gaps = sorted(
        (timed.done - timed.ttft) / (arrival.output_tokens - 1)
        for run in runs
        for timed, arrival in zip(run.timed, arrivals, strict=True)
        if arrival.output_tokens > 1
    )
    generated = len(runs) * sum(arrival.output_tokens for arrival in arrivals)
    seconds = sum(
        max(arrival.time + timed.done for timed, arrival in zip(run.timed, arrivals, strict=True))
        for run in runs
    )
    rows = (
        ("TTFT p50, s", quantile(ttfts, 0.5), outcome.ttft_p50),
        ("TTFT p95, s", quantile(ttfts, 0.95), outcome.ttft_p95),
        ("per token p50, s", quantile(gaps, 0.5), outcome.token_p50),
        ("per token p95, s", quantile(gaps, 0.95), outcome.token_p95),
        ("tokens/s", generated / seconds, outcome.tokens_per_s),
    )
    for name, real, simulated in rows:
        print(
            f"{name:18} real {real:9.4f}  simulated {simulated:9.4f}  {simulated / real - 1:+.0%}"
        )


def machine() -> str:
    """The GPU of this machine, or its processor and number of cores."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[
            0
        ]
    except (FileNotFoundError, subprocess.CalledProcessError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2]
        return f"{os.cpu_count()} cores of {name.strip()}"


async def run(args: argparse.Namespace, config: AppConfig) -> None:
    from serve_app.engine import Engine

    engine_args = config.engine_args_of(args.pool)  # without Ray, so vLLM starts its own workers
    began = time.monotonic()
    engine = await Engine.start(engine_args, pool=args.pool, replica="r", host="127.0.0.1")
    started = time.monotonic() - began
    info = engine.describe()
    known = read_measured(args.check) if args.check else None
    base = known or Measured(
        measured_on=args.label or f"{config.served_model_name}, pool {args.pool}, on {machine()}",
        layers=read_model_config(config.model).shape.layers,
        kv_tokens=info.kv_tokens,
        start_s=round(started, 1),
        step_s=0,
        prompt_token_s=0,
        sequence_s=0,
        context_token_s=0,
    )
    (plan,) = [plan for plan in plans(config, base) if plan.name == args.pool]
    plan = replace(plan, prefill_tokens=info.prefill_tokens)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            target = Target(session, info, config.served_model_name)
            if known is None:
                plan = replace(plan, cost=await measure(target, plan))
            seeds = (CHECK, CHECK) if known else (FIT, CHECK, CHECK, FIT_TOO)
            sent = {
                rate: await traffic(target, plan.max_model_len, rate, args.seconds, seeds)
                for rate in args.rates
            }
            if known is None:
                seen = [
                    run for runs in sent.values() for seed in (FIT, FIT_TOO) for run in runs[seed]
                ]
                plan = replace(plan, cost=refine(plan, plan.cost, seen) if seen else plan.cost)
                fitted = base.model_copy(update=asdict(plan.cost))
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(fitted.model_dump(), indent=2) + "\n")
            for rate, runs in sent.items():
                print(f"{rate:g} a second: {len(runs[CHECK][0].arrivals)} requests, twice")
                compare(plan, runs[CHECK])
    finally:
        await engine.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("pool")
    parser.add_argument("--out", type=Path, default=Path("runs/cost.json"))
    parser.add_argument("--check", type=Path, help="a cost model to check instead of fitting one")
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 4], help="arrivals a second")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="instead of the configured model")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--label", help="what the cost model says it was measured on")
    args = parser.parse_args()
    config = load_config(args.config)
    if args.shape:
        model = (args.out.parent / f"{args.shape}-shape").resolve()
        shape.build(model, SHAPES[args.shape])
        config = config.model_copy(update={"model": str(model)})
    os.environ |= config.pools[args.pool].env
    asyncio.run(run(args, config))


if __name__ == "__main__":
    main()
