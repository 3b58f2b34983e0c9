"""The ``local-attention quality`` command: what each attention plan costs in quality, and saves.

For every plan of a grid, one engine (``run``, a process of its own) measures:

1. the perplexity of a text by distance from its start;
2. how often a fact hidden in a context is found, by the context's length and the fact's depth;
3. how far greedy continuations agree with full attention's;
4. the time of a decoded token.

The KV cache's bytes stand beside it (``capacity``). Results are kept after each plan, so that a
run that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve_app.advice import engine_shape
from serve_app.capacity import EngineShape, kv_bytes, kv_dtype_bytes
from serve_app.config import refuse_unknown_arguments
from serve_app.errors import ConfigError, LocalAttentionError, ServeAppError
from serve_app.local_attention.plan import make_plan
from serve_app.model_config import ModelConfig, read_model_config
from serve_app.pattern import FULL
from serve_app.preflight import engine_argument_names
from serve_app.quality.grid import (
    FULL_NAME,
    OWN_NAME,
    Grid,
    Job,
    Pattern,
    context_lengths,
    counts,
    make_grid,
    numbers,
)
from serve_app.quality.picture import NOTATION, draw, table
from serve_app.quality.results import Kept, alone_in, digest_of, measure_all
from serve_app.quality.verdict import judge

_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_LONGEST = 8192  # by default, where the model was made for more
# Eager, because graphs take longer to capture than they save here; small steps, because the
# logits of a whole step are kept for perplexity, outside the memory that vLLM counts.
_ENGINE_ARGS = {"enforce_eager": True, "max_num_batched_tokens": 2048}
_NOT_FOR_ENGINE_ARGS = {"model": "--model", "max_model_len": "--max-model-len"}


def quality_command(
    model: Annotated[str, typer.Option(help="A directory, or a name that vLLM can load.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Text for perplexity and continuations: a UTF-8 file, or needle for made-up text.",
            metavar="needle|FILE",
        ),
    ] = "needle",
    windows: Annotated[
        str,
        typer.Option(
            help="Sliding windows in tokens; full attention is always measured.", metavar="N,N,..."
        ),
    ] = "256,512,1024,full",
    chunks: Annotated[
        str | None, typer.Option(help="Chunks in tokens, such as 256,1k.", metavar="N,N,...")
    ] = None,
    sinks: Annotated[
        str,
        typer.Option(help="First tokens that stay visible, for each window.", metavar="N,N,..."),
    ] = "0,64",
    full_every: Annotated[
        str,
        typer.Option(
            help="Every n-th layer sees all, for each window and chunk; 0: none.", metavar="N,N,..."
        ),
    ] = "0,4",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=256, help=f"Longest sequence; by default the model's, {_LONGEST} at most."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Contexts to hide facts in, in tokens; by default four up to the longest.",
            metavar="N,N,...",
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="At each length and depth.")] = 2,
    sequences: Annotated[int, typer.Option(min=1, help="Stretches of text.")] = 2,
    loss: Annotated[float, typer.Option(min=0, help="What a plan may lose; 0.05 is 5 %.")] = 0.05,
    engine_args: Annotated[
        str, typer.Option(help="More of vLLM's arguments as JSON, laid over eager ones.")
    ] = "{}",
    seed: Annotated[int, typer.Option(help="Of facts, questions and made-up text.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Results, which the same command goes on from, and the picture.")
    ] = Path("runs/quality"),
) -> None:
    """Measure what windows, sinks and full layers cost in quality, and recommend a plan.

    Each plan runs on a vLLM engine of its own, which measures:

    - the perplexity of a text by distance from its start;

    - facts found in contexts, by length and depth;

    - how far greedy output agrees with full attention's;

    - the time of a decoded token, beside the size of the KV cache.

    A table is printed; figures and a picture go to --out.

    A run that was cut off goes on with the same command.
    """
    args = {**_ENGINE_ARGS, **_engine_args(engine_args)}
    config = read_model_config(model).overridden(args.get("hf_overrides") or {})
    longest = _longest(config, max_model_len)
    shape = _engine_shape(config, {**args, "max_model_len": longest})
    text = _text(dataset)
    directory = [Path(model).absolute()] if Path(model).is_dir() else []
    job = Job(
        model=str(directory[0]) if directory else model,
        files=digest_of(*directory, *([text] if text else [])),
        pattern=None,
        max_model_len=longest,
        lengths=context_lengths(lengths, longest),
        depths=_DEPTHS,
        questions=questions,
        sequences=sequences,
        seed=seed,
        text=str(text) if text else None,
        engine_args=args,
    )
    grid = make_grid(
        windows=numbers("--windows", windows, full=True),
        chunks=counts("--chunks", chunks) if chunks else [],
        sinks=counts("--sinks", sinks),
        full_every=counts("--full-every", full_every),
        longest=longest,
        layers=config.shape.layers,
        reference=_reference(config),
    )
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in grid.left_out:
        notes.print(line, markup=False)
    with alone_in(out):
        kept = Kept.open(out / "results.json", job)
        _refuse(kept, grid, config)
        failed = measure_all(job, grid.plans, kept, notes)
        _report(grid, kept, config, shape, loss, out)
    if failed:
        raise ServeAppError(f"{len(failed)} of {len(grid.plans)} plans failed. {' '.join(failed)}")


# Checking what was asked for


def _longest(config: ModelConfig, asked: int | None) -> int:
    if asked is None:
        return min(config.longest or _LONGEST, _LONGEST)
    if config.longest is not None and asked > config.longest and not config.scaled:
        raise ConfigError(
            f"--max-model-len is {asked}, but the model was made for {config.longest} tokens."
        )
    return asked


def _engine_args(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--engine-args is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError("--engine-args must be a JSON object.")
    for key, option in _NOT_FOR_ENGINE_ARGS.items():
        if key in value:
            raise ConfigError(f"--engine-args gives {key}; give it by {option}.")
    refuse_unknown_arguments(value, engine_argument_names())
    return value


def _engine_shape(config: ModelConfig, args: dict[str, Any]) -> EngineShape:
    try:
        shape = engine_shape(config, args)
        kv_dtype_bytes(shape.kv_cache_dtype)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--engine-args: {error}") from error
    return shape


def _text(dataset: str) -> Path | None:
    """The file of a data set, or None for generated text."""
    if dataset == "needle":
        return None
    path = Path(dataset).resolve()
    try:
        with path.open(encoding="utf-8") as file:
            if not file.read(4096).strip():
                raise ConfigError(f"The file {path} has no text.")
    except OSError as error:
        raise ConfigError(
            f"--dataset is {dataset!r}, but it must be needle or a file of text: {error.strerror}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The file {path} is not UTF-8 text.") from error
    return path


def _reference(config: ModelConfig) -> str:
    """What to call the model without a plan of the grid."""
    own = make_plan(config.raw, environment={})
    rules = own.rules if own else config.native_rules()
    return FULL_NAME if set(rules) == {FULL} else OWN_NAME


def _refuse(kept: Kept, grid: Grid, config: ModelConfig) -> None:
    """Note the plans that need no engine to be refused. Raises if that is every local plan."""
    said = set()
    local = {name: pattern for name, pattern in grid.plans.items() if pattern}
    for name, pattern in local.items():
        try:
            make_plan(config.raw, additional={"local_attention": pattern})
        except LocalAttentionError as error:
            kept.refused[name] = str(error)
            said.add(str(error))
    if local and all(name in kept.refused for name in local):
        raise LocalAttentionError(" ".join(sorted(said)))


# Reporting


def _report(
    grid: Grid, kept: Kept, config: ModelConfig, shape: EngineShape, loss: float, out: Path
) -> None:
    sizes = {
        name: _kv_bytes(
            pattern, config, dataclasses.replace(shape, block_size=result["block_size"])
        )
        for name, pattern in grid.plans.items()
        if (result := kept.results.get(name))
    }
    verdict = judge(
        grid.plans,
        kept.results,
        sizes,
        loss=loss,
        longest=shape.max_model_len,
        vocabulary=config.shape.vocab,
    )
    console = Console(highlight=False)
    console.print(table(verdict, shape.max_model_len))
    refused = {name: why for name, why in kept.refused.items() if name in grid.plans}
    refusals = [f"{name} is refused: {why}" for name, why in refused.items()]
    lines = [NOTATION, *refusals, *verdict.warnings, verdict.sentence]
    if verdict.recommended is not None:
        lines.append(json.dumps({"local_attention": verdict.recommended.pattern}))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    summary = {"settings": kept.settings, **verdict.to_json(), "refused": refused}
    (out / "quality.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(verdict, out / "quality.png", Path(kept.settings["model"]).name)
    console.print(f"{out / 'quality.json'}, {out / 'quality.png'}", markup=False, soft_wrap=True)


def _kv_bytes(pattern: Pattern | None, config: ModelConfig, shape: EngineShape) -> int:
    """Of the longest sequence as it decodes, on one GPU."""
    asked = {"local_attention": pattern} if pattern else None
    plan = make_plan(config.raw, additional=asked, environment={})
    rules = plan.rules if plan else config.native_rules()
    flags = zip(rules, config.attention_layers(), strict=True)
    kinds = [rule for rule, attention in flags if attention]
    if len(set(kinds)) > 1 and not shape.hybrid:
        kinds = [FULL] * len(kinds)
    return kv_bytes(kinds, config.shape, shape, shape.max_model_len)
