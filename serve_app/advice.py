"""What ``local-attention check`` and ``local-attention plan`` say of a model.

From config.json alone: no weights, no engine, and neither torch nor vLLM is imported, so the
answer comes at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml
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
from serve_app.pattern import FULL, LayerRule, LocalAttention

LENGTHS = (4096, 32768, 131072, 1048576)

Task = Literal["general", "code", "documents"]
# Where to begin the search for a window, in tokens: how far back such text usually refers.
BANDS: dict[Task, tuple[int, int]] = {
    "general": (256, 512),
    "code": (512, 1024),
    "documents": (1024, 2048),
}
# A checkpoint trained with full attention leans on its first tokens. Up to 16 fill one KV block;
# with documents the instructions usually stand first, and are worth more.
SINKS: dict[Task, int] = {"general": 16, "code": 16, "documents": 64}
_FULL_EVERY = (4, 6, 8, 12)  # many full layers first: they carry what the window forgets
_ENOUGH_SEQUENCES = 8


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


@dataclass(frozen=True, slots=True)
class Proposal:
    """An application of one pool, and why it is so."""

    application: dict[str, Any]
    reasons: tuple[str, ...]

    def to_yaml(self) -> str:
        """A file for ``configs/``, which ``load_config`` accepts."""
        comments = "".join(f"# {reason}\n" for reason in self.reasons)
        return comments + yaml.safe_dump(self.application, sort_keys=False)


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
    yield from _too_long(config, engine.max_model_len)
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


def _too_long(config: ModelConfig, max_model_len: int) -> Iterator[str]:
    if config.longest is not None and max_model_len > config.longest and not config.scaled:
        yield (
            f"max_model_len ({max_model_len}) is more than the model was made for "
            f"({config.longest}), and vLLM refuses it; lower it, or set the RoPE scaling or "
            "max_position_embeddings by hf_overrides."
        )


# Planning


def propose(
    task: Task,
    model: str,
    config: ModelConfig,
    *,
    gpus: int,
    gpu_bytes: int,
    max_model_len: int,
) -> Proposal:
    """An application of one pool for ``task`` on ``gpus`` GPUs of ``gpu_bytes`` each.

    The widest window of the task's band, and as many full layers as leave room for
    :data:`_ENOUGH_SEQUENCES` sequences of ``max_model_len``. Raises ``ConfigError`` where the
    model cannot have local attention, or would gain nothing.
    """
    found = config.support()
    if found.supported is False:
        raise LocalAttentionError(found.sentence)
    window = _window(task, max_model_len)
    args: dict[str, Any] = {
        "max_model_len": max_model_len,
        "tensor_parallel_size": gpus,
        "gpu_memory_utilization": _utilization(gpu_bytes),
    }
    default = engine_shape(config, args, gpu_bytes=gpu_bytes)
    args["max_num_batched_tokens"] = _batched_tokens(default, window)
    engine = engine_shape(config, args, gpu_bytes=gpu_bytes)
    shape = config.shape
    budget = kv_budget(shape, engine, gpu_bytes)
    for every in (*_FULL_EVERY, None):
        pattern = LocalAttention(
            sliding_window=window, attention_sinks=SINKS[task], full_attention_every=every
        )
        fits = capacity(_attention_rules(pattern, config), shape, engine, budget)
        if fits.decoding >= _ENOUGH_SEQUENCES:
            break
    if not fits.decoding:
        raise ConfigError(
            f"No request of {max_model_len} tokens fits {gpus} x {gpu_bytes / GIB:g} GiB beside "
            f"the weights ({shape.weight_bytes(gpus) / GIB:.1f} GiB on each GPU); lower "
            "--max-model-len, or raise --gpu-memory or --tensor-parallel."
        )
    args["max_num_seqs"] = max(1, min(default.max_num_seqs, fits.decoding))
    full = capacity((FULL,) * sum(config.attention_layers()), shape, engine, budget)
    return Proposal(
        application=_application(task, model, pattern, args),
        reasons=(
            *_reasons(task, pattern, fits, full, max_model_len),
            *_too_long(config, max_model_len),
        ),
    )


def _attention_rules(pattern: LocalAttention, config: ModelConfig) -> tuple[LayerRule, ...]:
    flags = config.attention_layers()
    pairs = zip(pattern.rules(len(flags)), flags, strict=True)
    return tuple(rule for rule, attention in pairs if attention)


def _window(task: Task, max_model_len: int) -> int:
    low, high = BANDS[task]
    if max_model_len <= 2 * low:
        raise ConfigError(
            f"max_model_len ({max_model_len}) is not much longer than the smallest window for "
            f"{task} ({low}), so local attention would save next to nothing; serve it with full "
            "attention."
        )
    return high if max_model_len >= 4 * high else low


def _utilization(gpu_bytes: int) -> float:
    """All of the GPU but a twentieth, and 2.5 GiB at the least: vLLM does not count everything."""
    reserve = max(2.5 * GIB, gpu_bytes / 20)
    return max(0.5, int(100 * (1 - reserve / gpu_bytes)) / 100)


def _batched_tokens(engine: EngineShape, window: int) -> int:
    """The largest prefill step that leaves the reservation under half of max_model_len."""
    step = engine.max_num_batched_tokens
    while step > 512 and window + engine.concurrent_batches * step > engine.max_model_len / 2:
        step //= 2
    return step


def _application(
    task: Task, model: str, pattern: LocalAttention, args: Mapping[str, Any]
) -> dict[str, Any]:
    owned = ("max_model_len", "tensor_parallel_size")
    return {
        "model": model,
        "served_model_name": model.rstrip("/").rsplit("/", 1)[-1],
        "device": "gpu",
        "pools": {
            task: {
                **{key: args[key] for key in owned},
                "local_attention": pattern.model_dump(
                    exclude_none=True, exclude_defaults=True, mode="json"
                ),
                "engine_args": {key: args[key] for key in args if key not in owned},
            }
        },
    }


def _reasons(
    task: Task, pattern: LocalAttention, fits: Capacity, full: Capacity, max_model_len: int
) -> Iterator[str]:
    low, high = BANDS[task]
    yield f"For {task}, begin with windows of {low} to {high} tokens; measure quality on your text."
    yield (
        f"Sequences of {max_model_len} tokens that fit while they decode: {fits.decoding}, "
        f"against {full.decoding} with full attention (weights and activations estimated)."
    )
    if pattern.full_attention_every is None:
        yield (
            "No layer sees everything: with every 12th layer full, fewer than "
            f"{_ENOUGH_SEQUENCES} sequences fit. What lies far back is out of reach."
        )
    elif full.decoding >= fits.decoding:
        yield "Full attention fits as many; local attention then saves time, not memory."


# The commands


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


def plan_command(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(BANDS)}.")],
    model: Annotated[str, typer.Option(help="A directory, or a name on the hub.")],
    gpu_memory: Annotated[float, typer.Option(help="Memory of each GPU in GiB.", min=0.1)],
    max_model_len: Annotated[int, typer.Option(min=1, help="Prompt plus output, in tokens.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of one engine.")] = 1,
) -> None:
    """Propose a pool for a task and print its YAML."""
    for known in get_args(Task):
        if task == known:
            proposal = propose(
                known,
                model,
                read_model_config(model),
                gpus=tensor_parallel,
                gpu_bytes=int(gpu_memory * GIB),
                max_model_len=max_model_len,
            )
            typer.echo(proposal.to_yaml(), nl=False)
            return
    raise ConfigError(f"--task is {task!r}, but it must be one of {', '.join(BANDS)}.")


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
