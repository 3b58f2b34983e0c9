"""What ``local-attention plan`` proposes: a pool for a task, with its window and its full layers.

From config.json alone, as ``advice``: no weights, no engine, and the answer comes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import typer
import yaml

from serve_app.advice import engine_shape, too_long
from serve_app.capacity import GIB, Capacity, EngineShape, capacity, kv_budget
from serve_app.errors import ConfigError, LocalAttentionError
from serve_app.model_config import ModelConfig, read_model_config
from serve_app.pattern import FULL, LayerRule, LocalAttention

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
class Proposal:
    """An application of one pool, and why it is so."""

    application: dict[str, Any]
    reasons: tuple[str, ...]

    def to_yaml(self) -> str:
        """A file for ``configs/``, which ``load_config`` accepts."""
        comments = "".join(f"# {reason}\n" for reason in self.reasons)
        return comments + yaml.safe_dump(self.application, sort_keys=False)


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
            *too_long(config, max_model_len),
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
