"""What ``local-attention check`` says of a model.

From config.json alone: no weights, no engine, and neither torch nor vLLM is imported, so the
answer comes at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.capacity import (
    GIB,
    Capacity,
    EngineShape,
    ModelShape,
    capacity,
    kv_budget,
    kv_bytes,
)
from serve_app.config import load_config
from serve_app.errors import ConfigError, LocalAttentionError
from serve_app.local_attention.plan import Plan, advice, choose_block_size, make_plan
from serve_app.model_config import ModelConfig, Support, read_model_config
from serve_app.pattern import FULL, LayerRule

LENGTHS = (4096, 32768, 131072, 1048576)


@dataclass(frozen=True, slots=True)
class Need:
    """One sequence of ``length`` tokens: KV bytes on each GPU, and how many such sequences fit.

    The counts are for an engine whose ``max_model_len`` is ``length``, while they decode.
    """

    length: int
    full_bytes: int
    plan_bytes: int
    full_sequences: int | None = None
    plan_sequences: int | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits each GPU, at the engine's ``max_model_len``. Weights and budget are estimates."""

    gpu_bytes: int
    weight_bytes: int
    kv_bytes: int
    full: Capacity
    plan: Capacity


@dataclass(frozen=True, slots=True)
class Report:
    """One model under one plan. ``rules`` has ``None`` for a layer that is no attention."""

    model: str
    pool: str | None
    architecture: str
    support: Support
    plan: str
    rules: tuple[LayerRule | None, ...]
    engine: EngineShape
    needs: tuple[Need, ...]
    fit: Fit | None
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Checking


def engine_shape(
    config: ModelConfig,
    args: Mapping[str, Any],
    *,
    gpu_bytes: int | None = None,
    chunk: int | None = None,
    device: str = "gpu",
) -> EngineShape:
    """What vLLM 0.32's server makes of its arguments, defaults included.

    Its batch defaults depend on the GPU's memory; without ``gpu_bytes`` a large GPU is assumed.
    Raises ``ConfigError``.
    """
    large = gpu_bytes is None or gpu_bytes >= 70 * GIB
    huge = gpu_bytes is not None and gpu_bytes >= 160 * GIB
    tensor = int(args.get("tensor_parallel_size") or 1)
    pipeline = int(args.get("pipeline_parallel_size") or 1)
    if device == "cpu":
        batched, seqs, block, step = 2048 * tensor * pipeline, 128 * tensor * pipeline, 128, 32
    else:
        batched, seqs, block, step = (
            (16384 if huge else 8192, 1024, 16, 16) if large else (2048, 256, 16, 16)
        )
    max_model_len = args.get("max_model_len") or config.longest
    if max_model_len is None:
        raise ConfigError(
            f"The config.json of {config.architecture} does not say how long a sequence may be; "
            "give max_model_len."
        )
    chosen = choose_block_size(chunk, args.get("block_size"), block, step)
    # The CPU backend schedules one batch at a time.
    overlap = device != "cpu" and args.get("async_scheduling") is not False
    dtype = str(args.get("kv_cache_dtype") or "auto")
    if dtype == "auto" and args.get("dtype") in ("float32", "float"):
        dtype = "float32"
    return EngineShape(
        max_model_len=int(max_model_len),
        max_num_batched_tokens=int(args.get("max_num_batched_tokens") or batched),
        max_num_seqs=int(args.get("max_num_seqs") or seqs),
        block_size=int(chosen or args.get("block_size") or block),
        concurrent_batches=pipeline + overlap,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        kv_cache_dtype=dtype,
        gpu_memory_utilization=float(args.get("gpu_memory_utilization") or 0.92),
        hybrid=not args.get("disable_hybrid_kv_cache_manager"),
    )


def check(
    model: str,
    config: ModelConfig,
    args: Mapping[str, Any],
    *,
    pool: str | None = None,
    device: str = "gpu",
    gpu_bytes: int | None = None,
) -> Report:
    """What a model needs under ``args``, vLLM's engine arguments.

    A plan that is refused raises nothing here: the refusal is the report's ``support``. A
    config.json that lacks a size raises ``ConfigError``.
    """
    overrides = args.get("hf_overrides") or {}
    config = config.overridden(overrides)
    support, plan = config.support(), None
    try:
        plan = make_plan(config.raw, additional=args.get("additional_config"), overrides=overrides)
        chunk = plan.chunk if plan else None
        engine = engine_shape(config, args, gpu_bytes=gpu_bytes, chunk=chunk, device=device)
    except LocalAttentionError as error:
        support, plan = Support(False, str(error)), None
        engine = engine_shape(config, args, gpu_bytes=gpu_bytes, device=device)
    shape = config.shape
    layers = tuple(
        rule if attention else None
        for rule, attention in zip(
            plan.rules if plan else config.native_rules(), config.attention_layers(), strict=True
        )
    )
    rules = tuple(rule for rule in layers if rule is not None)
    fit = None if gpu_bytes is None or not rules else _fit(rules, shape, engine, gpu_bytes)
    lengths = sorted({*LENGTHS, engine.max_model_len}) if rules else []
    return Report(
        model=model,
        pool=pool,
        architecture=config.architecture,
        support=support,
        plan=str(plan) if plan else "none: the model's own attention",
        rules=layers,
        engine=engine,
        needs=tuple(_need(rules, shape, engine, length, gpu_bytes) for length in lengths),
        fit=fit,
        advice=tuple(_advice(config, plan, layers, engine, fit)),
    )


def _need(
    rules: Sequence[LayerRule],
    shape: ModelShape,
    engine: EngineShape,
    length: int,
    gpu_bytes: int | None,
) -> Need:
    engine = dataclasses.replace(engine, max_model_len=length)
    full = (FULL,) * len(rules)
    sizes = [kv_bytes(r, shape, engine, length) for r in (full, rules)]
    if gpu_bytes is None:
        return Need(length, *sizes)
    budget = kv_budget(shape, engine, gpu_bytes)
    return Need(
        length, *sizes, *(capacity(r, shape, engine, budget).decoding for r in (full, rules))
    )


def _fit(rules: Sequence[LayerRule], shape: ModelShape, engine: EngineShape, gpu_bytes: int) -> Fit:
    budget = kv_budget(shape, engine, gpu_bytes)
    return Fit(
        gpu_bytes=gpu_bytes,
        weight_bytes=shape.weight_bytes(engine.tensor_parallel * engine.pipeline_parallel),
        kv_bytes=budget,
        full=capacity((FULL,) * len(rules), shape, engine, budget),
        plan=capacity(rules, shape, engine, budget),
    )


def _advice(
    config: ModelConfig,
    plan: Plan | None,
    layers: Sequence[LayerRule | None],
    engine: EngineShape,
    fit: Fit | None,
) -> Iterator[str]:
    yield from advice(
        plan,
        engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        in_flight_tokens=engine.in_flight_tokens,
        capacity_tokens=fit.full.blocks * engine.block_size if fit else None,
    )
    yield from too_long(config, engine.max_model_len)
    if others := sum(rule is None for rule in layers):
        yield (
            f"{others} of {len(layers)} layers are no attention; they keep a state of constant "
            "size, which is not counted here."
        )
    if not engine.hybrid and plan is not None and plan.mixed:
        yield (
            "The hybrid KV cache manager is off, so that a mix of layers frees no memory; "
            "leave disable_hybrid_kv_cache_manager unset."
        )
    if fit is not None and fit.kv_bytes <= 0:
        yield (
            f"The weights ({fit.weight_bytes / GIB:.1f} GiB on each GPU) leave no room for a KV "
            f"cache in {fit.gpu_bytes / GIB:g} GiB; use more GPUs or quantised weights."
        )
    elif fit is not None and fit.plan.decoding == 0:
        yield (
            f"Not one request of max_model_len ({engine.max_model_len}) fits, and vLLM does not "
            "start so; lower max_model_len or max_num_batched_tokens."
        )


def too_long(config: ModelConfig, max_model_len: int) -> Iterator[str]:
    """A sentence where vLLM refuses ``max_model_len``, in tokens; else nothing."""
    if config.longest is not None and max_model_len > config.longest and not config.scaled:
        yield (
            f"max_model_len ({max_model_len}) is more than the model was made for "
            f"({config.longest}), and vLLM refuses it; lower it, or set the RoPE scaling or "
            "max_position_embeddings by hf_overrides."
        )


# The command


def check_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A directory, a config.json, or a name on the hub.", metavar="MODEL"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A file of configs/: check each pool, and take the model from it."),
    ] = None,
    local_attention: Annotated[
        str | None, typer.Option(help="The plan as JSON, such as '{\"sliding_window\": 512}'.")
    ] = None,
    hf_overrides: Annotated[str | None, typer.Option(help="vLLM's hf_overrides, as JSON.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of each GPU in GiB.", min=0.1)
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of one engine.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of reports.")] = False,
) -> None:
    """Say whether a model takes local attention, what it saves, and what fits a GPU."""
    gpu_bytes = None if gpu_memory is None else int(gpu_memory * GIB)
    if config is not None:
        if local_attention is not None:
            raise ConfigError("Give --local-attention or --config, not both.")
        reports = _check_pools(config, model, gpu_bytes, max_model_len)
    elif model is not None:
        args: dict[str, Any] = {
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel,
            "hf_overrides": _json_object("--hf-overrides", hf_overrides),
        }
        if local_attention is not None:
            asked = _json_object("--local-attention", local_attention)
            args["additional_config"] = {"local_attention": asked}
        reports = [check(model, read_model_config(model), args, gpu_bytes=gpu_bytes)]
    else:
        raise ConfigError("Name a model, or give --config.")
    if as_json:
        typer.echo(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        console = Console(highlight=False)
        for report in reports:
            render(report, console)
    if any(report.support.supported is False for report in reports):
        raise typer.Exit(1)


def _check_pools(
    path: Path, model: str | None, gpu_bytes: int | None, max_model_len: int | None
) -> list[Report]:
    app = load_config(path)
    model = model or app.model
    config = read_model_config(model)
    reports = []
    for name in app.pools:
        args = app.engine_args_of(name)
        if max_model_len is not None:
            args["max_model_len"] = max_model_len
        reports.append(
            check(model, config, args, pool=name, device=app.device, gpu_bytes=gpu_bytes)
        )
    return reports


def _json_object(option: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON object.")
    return value


# Rendering


def render(report: Report, console: Console) -> None:
    """Print one report for people."""
    where = f", pool {report.pool}" if report.pool else ""
    verdict = {True: "supported", False: "not supported", None: "unknown"}

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{report.model}{where} ({report.architecture})")
    line(f"{verdict[report.support.supported]}: {report.support.sentence}")
    line(f"plan: {report.plan}")
    for rule, layers in _layers_of(report.rules):
        line(f"  {_words(rule)}: layers {layers}")
    if report.needs:
        console.print(_needs_table(report))
    if report.fit is not None:
        line(_fit_sentence(report.fit, report.engine))
    for sentence in report.advice:
        line(f"- {sentence}")


def _needs_table(report: Report) -> Table:
    table = Table("tokens", title="KV cache of one sequence, on each GPU", title_justify="left")
    names = ["full", "plan", "full / plan"]
    if report.fit is not None:
        names += ["fit, full", "fit, plan"]
    for name in names:
        table.add_column(name, justify="right")
    for need in report.needs:
        cells = [
            f"{need.length:,}",
            _size(need.full_bytes),
            _size(need.plan_bytes),
            f"{need.full_bytes / need.plan_bytes:.1f} x",
        ]
        if report.fit is not None:
            cells += [f"{need.full_sequences:,}", f"{need.plan_sequences:,}"]
        table.add_row(*cells)
    return table


def _fit_sentence(fit: Fit, engine: EngineShape) -> str:
    return (
        f"Of {fit.gpu_bytes / GIB:g} GiB, about {fit.weight_bytes / GIB:.1f} are weights and "
        f"{max(0, fit.kv_bytes) / GIB:.1f} are left for the KV cache. vLLM's maximum concurrency "
        f"for {engine.max_model_len:,} tokens, counted in reservations: "
        f"{fit.full.concurrency:.2f} with full attention, {fit.plan.concurrency:.2f} with the "
        f"plan. Sequences that decode together: {fit.full.decoding:,} and {fit.plan.decoding:,}."
    )


def _layers_of(rules: Sequence[LayerRule | None]) -> list[tuple[LayerRule | None, str]]:
    """Each distinct rule with its layers, as ranges: ``0-2, 4-6``."""
    spans: dict[LayerRule | None, list[list[int]]] = {}
    for index, rule in enumerate(rules):
        ranges = spans.setdefault(rule, [])
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return [
        (rule, ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges))
        for rule, ranges in spans.items()
    ]


def _words(rule: LayerRule | None) -> str:
    if rule is None:
        return "no attention"
    sinks = f", {rule.sinks} sinks" if rule.sinks else ""
    return rule.kind + (f" of {rule.span}" if rule.span else "") + sinks


def _size(number: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 1024:,.1f} KiB"
