"""The ``local-attention simulate`` command: from configuration, trace and cost model to a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from serve_app.autoscaling import Settings
from serve_app.config import AppConfig, explain, load_config
from serve_app.errors import ConfigError
from serve_app.pattern import FULL
from serve_app.simulator import (
    LENGTHS,
    Arrival,
    CostModel,
    Outcome,
    PoolPlan,
    generate,
    read_trace,
    simulate,
    write_trace,
)

_DEFAULT_PREFILL_TOKENS = 8192
_DEFAULT_SEQUENCES = 256
_KNOWN_LENGTHS = " or ".join(", ".join(LENGTHS).rsplit(", ", 1))


class Measured(BaseModel):
    """What ``benchmarks/cost_model.py`` writes of one model on one kind of engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured_on: str
    layers: int = Field(ge=1)
    kv_tokens: int = Field(ge=1, description="KV cache of one engine, averaged over layers.")
    start_s: float = Field(ge=0)
    step_s: float = Field(ge=0)
    prompt_token_s: float = Field(ge=0)
    sequence_s: float = Field(ge=0)
    context_token_s: float = Field(ge=0)

    @property
    def cost(self) -> CostModel:
        return CostModel(self.step_s, self.prompt_token_s, self.sequence_s, self.context_token_s)


def read_measured(path: Path) -> Measured:
    """Raises ``ConfigError`` for a file that is missing or is no cost model."""
    try:
        return Measured.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"The cost model {path} does not exist; benchmarks/cost_model.py measures one."
        ) from error
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"The cost model {path} cannot be read: {error}.") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def plans(config: AppConfig, measured: Measured) -> list[PoolPlan]:
    """The pools of a configuration, all with the step times of one cost model."""
    return [_plan(config, name, measured) for name in config.pools]


def _plan(config: AppConfig, name: str, measured: Measured) -> PoolPlan:
    pool = config.pools[name]
    args: dict[str, Any] = config.engine_args_of(name)
    pattern = pool.local_attention
    scaling = pool.autoscaling
    return PoolPlan(
        name=name,
        max_model_len=pool.max_model_len,
        cost=measured.cost,
        replicas=pool.replicas,
        gpus_per_replica=pool.workers * (pool.num_gpus if config.device == "gpu" else 1),
        rules=pattern.rules(measured.layers) if pattern else (FULL,),
        prefill_tokens=int(args.get("max_num_batched_tokens") or _DEFAULT_PREFILL_TOKENS),
        max_sequences=int(args.get("max_num_seqs") or _DEFAULT_SEQUENCES),
        kv_tokens=measured.kv_tokens,
        start_s=measured.start_s,
        scaling=Settings(**scaling.model_dump()) if scaling else None,
    )


def times(plan: PoolPlan, factor: int) -> PoolPlan:
    """A pool of ``factor`` times as many replicas."""
    scaling = plan.scaling and replace(
        plan.scaling,
        min_replicas=plan.scaling.min_replicas * factor,
        max_replicas=plan.scaling.max_replicas * factor,
    )
    return replace(plan, replicas=plan.replicas * factor, scaling=scaling)


def repeat(arrivals: Sequence[Arrival], factor: int) -> list[Arrival]:
    """``factor`` times as many arrivals a second: copies, spread over the gaps between them."""
    gap = arrivals[-1].time / len(arrivals) if arrivals else 0.0
    copies = [
        replace(arrival, time=arrival.time + gap * copy / factor)
        for arrival in arrivals
        for copy in range(factor)
    ]
    return sorted(copies, key=lambda arrival: arrival.time)


def simulate_command(
    config: Annotated[Path, typer.Argument(help="A file in configs/.", metavar="CONFIG.YAML")],
    cost: Annotated[
        Path | None,
        typer.Option(help="Step times; by default CONFIG.cost.json beside the configuration."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A CSV: time, prompt tokens, output tokens.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help=f"Without a trace: {_KNOWN_LENGTHS}.")
    ] = "azure-conversation",
    rate: Annotated[float, typer.Option(min=1e-6, help="Arrivals a second.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=1)] = 600,
    seed: Annotated[int, typer.Option()] = 0,
    write: Annotated[
        Path | None, typer.Option(help="Write the generated trace to this file.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="Repeat replicas and arrivals so many times: a row for each.")
    ] = "1",
    ttft_target: Annotated[float, typer.Option(min=0, help="Seconds; what goodput counts.")] = 2.0,
) -> None:
    """Predict latency, goodput and GPU-hours of a configuration under an arrival trace."""
    app, measured = load_config(config), read_measured(cost or config.with_suffix(".cost.json"))
    pools = plans(app, measured)
    if trace is not None:
        try:
            with trace.open(newline="", encoding="utf-8") as file:
                arrivals = read_trace(file)
        except OSError as error:
            raise ConfigError(f"The trace {trace} cannot be read: {error}.") from error
    else:
        if lengths not in LENGTHS:
            raise ConfigError(f"lengths is {lengths!r}, but it must be {_KNOWN_LENGTHS}.")
        longest = max(plan.max_model_len for plan in pools)
        arrivals = list(generate(lengths, rate, seconds, seed, longest))
    if write is not None:
        with write.open("w", newline="", encoding="utf-8") as file:
            write_trace(arrivals, file)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", scale):
        raise ConfigError(f"scale is {scale!r}, but it must be numbers such as 1,10,100.")
    outcomes = []
    for factor in map(int, scale.split(",")):
        larger = [times(plan, factor) for plan in pools]
        outcomes.append(simulate(repeat(arrivals, factor), larger, ttft_target))
    Console().print(table(outcomes, ttft_target, measured.measured_on))


def table(outcomes: Sequence[Outcome], ttft_target_s: float, measured_on: str) -> Table:
    """A row for each outcome; times are in milliseconds."""
    shown = Table(title=f"Simulated from step times of: {measured_on}")
    for heading in (
        "GPUs",
        "requests",
        "TTFT p50 / p95 / p99 ms",
        "per token p50 / p95 ms",
        "tokens/s",
        f"goodput/s (TTFT <= {ttft_target_s:g} s)",
        "GPU-hours",
        "refused",
    ):
        shown.add_column(heading, justify="right")
    for outcome in outcomes:
        ttft = (outcome.ttft_p50, outcome.ttft_p95, outcome.ttft_p99)
        gaps = (outcome.token_p50, outcome.token_p95)
        shown.add_row(
            f"{outcome.gpus:g}",
            f"{outcome.requests}",
            " / ".join(f"{1000 * seconds:.0f}" for seconds in ttft),
            " / ".join(f"{1000 * seconds:.1f}" for seconds in gaps),
            f"{outcome.tokens_per_s:.0f}",
            f"{outcome.goodput:.2f} ({outcome.within:.0%})",
            f"{outcome.gpu_hours:.2f}",
            f"{outcome.refused}",
        )
    return shown
