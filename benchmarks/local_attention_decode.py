"""What local attention costs and saves on one GPU: decode steps, throughput and prefill.

The shape of Qwen3-0.6B with random weights in bfloat16, one engine a kind of attention, prompts of
random tokens, no prefix cache. A step is measured while every sequence decodes, by the arrival of
its tokens; its floor is the time that weights and visible keys and values take to pass through
memory once. Prints a Markdown table last.

    python benchmarks/local_attention_decode.py                      # one GPU
    python benchmarks/local_attention_decode.py --quick --kinds sliding,chunked   # tiny, any CPU
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.pattern import FULL, LayerRule, LocalAttention

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUICK = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
BANDWIDTH = 4.3e12  # bytes a second, one H200
SEEN = 2048  # keys that a query of a local layer sees


@dataclass(frozen=True)
class Load:
    """Sequences decoding together, each after a prompt of ``tokens``."""

    tokens: int
    sequences: int


@dataclass(frozen=True)
class Result:
    kind: str
    load: Load
    step_ms: float
    tokens_per_s: float
    floor_ms: float


def patterns(seen: int, block: int) -> dict[str, dict[str, Any] | None]:
    """Each kind of attention with ``seen`` visible keys, as ``local_attention`` writes it."""
    return {
        "sliding": {"sliding_window": seen},
        "chunked": {"attention_chunk_size": seen},
        "sinks": {"sliding_window": seen - 4 * block, "attention_sinks": 4 * block},
        "full": None,
        "chunked, vLLM's own": {"attention_chunk_size": seen},
        "3 sliding : 1 full": {"sliding_window": seen, "full_attention_every": 4},
        "3 chunked : 1 full": {"attention_chunk_size": seen, "full_attention_every": 4},
        "sinks, two passes": {"sliding_window": seen - 4, "attention_sinks": 4},
    }


def loads(kind: str, quick: bool) -> list[Load]:
    """Prompts end late in a chunk, so that chunked queries see nearly as many keys as others."""
    if quick:
        return [Load(300, 2)]
    short, long = 15 * SEEN + 1750, 63 * SEEN + 1380
    if kind == "full":
        return [Load(short, 4), Load(short, 24), Load(long, 7)]
    if kind in ("sliding", "chunked"):
        return [Load(short, 4), Load(short, 64), Load(long, 64)]
    return [Load(short, 4), Load(short, 64)]


def measure(kind: str, pattern: dict[str, Any] | None, quick: bool) -> tuple[list[Result], str]:
    """Every load of one kind on one engine, and its prefill times as a sentence."""
    from vllm import LLM

    shape = SHAPE | (QUICK if quick else {})
    with tempfile.TemporaryDirectory() as directory, _chunked_by(kind):
        Path(directory, "config.json").write_text(json.dumps(shape))
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            enable_prefix_caching=False,
            max_num_seqs=64,
            additional_config={} if pattern is None else {"local_attention": pattern},
            **(
                {"max_model_len": 1024, "dtype": "float32", "block_size": 32}
                | {"max_num_batched_tokens": 512, "enforce_eager": True}
                if quick
                else {"max_model_len": 135_000, "max_num_batched_tokens": 16_384}
                | {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 64]}}
            ),
        )
        engine = llm.llm_engine
        try:
            _run(engine, Load(64, 1), steps=2)  # the first request pays for lazy set-up
            lengths = sorted({load.tokens for load in loads(kind, quick)})
            waits = {n: statistics.median(_prefill(engine, n) for _ in range(2)) for n in lengths}
            prefills = ", ".join(f"{n:,} tokens in {wait:.3f} s" for n, wait in waits.items())
            print(f"{kind}: prefill of {prefills}", flush=True)
            results = []
            for load in loads(kind, quick):
                step, lengths_then = _run(engine, load, steps=10 if quick else 150)
                rate = load.sequences / step
                floor = _bytes(shape, pattern, lengths_then) / BANDWIDTH
                results.append(Result(kind, load, step * 1e3, rate, floor * 1e3))
                print(results[-1], flush=True)
        finally:
            engine.engine_core.shutdown()
    return results, f"{kind}: {prefills}"


def _prefill(engine: Any, tokens: int) -> float:
    """Seconds from a lone request to its first token."""
    start = time.perf_counter()
    _add(engine, Load(tokens, 1), max_tokens=1)
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - start


def _run(engine: Any, load: Load, steps: int) -> tuple[float, list[int]]:
    """Seconds a step (the median) once every sequence decodes, and the lengths half-way."""
    names = _add(engine, load, max_tokens=3000 if load.tokens > 1000 else 100)
    made = dict.fromkeys(names, 0)
    arrivals: list[float] = []
    while len(arrivals) <= steps:
        outputs = engine.step()
        if all(made.values()) and len(outputs) == load.sequences:
            arrivals.append(time.perf_counter())
        for output in outputs:
            made[output.request_id] += len(output.outputs[0].token_ids)
    lengths = [load.tokens + count - steps // 2 for count in made.values()]
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    # Arrivals can bunch under asynchronous scheduling, so ten steps are timed together.
    tens = range(0, len(arrivals) - 10, 10)
    if not tens:
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1), lengths
    return statistics.median((arrivals[i + 10] - arrivals[i]) / 10 for i in tens), lengths


_names = iter(range(10**9))


def _add(engine: Any, load: Load, max_tokens: int) -> list[str]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    names = [str(next(_names)) for _ in range(load.sequences)]
    for name in names:
        draw = random.Random(name)
        prompt = draw.choices(range(3, 500), k=load.tokens)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    return names


def _bytes(shape: dict[str, Any], pattern: dict[str, Any] | None, lengths: list[int]) -> int:
    """What one step must read: every weight once, and the keys and values its queries see."""
    layers, hidden, head = shape["num_hidden_layers"], shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = hidden * head * 2 * (heads + kv_heads) + 3 * hidden * shape["intermediate_size"]
    weights = layers * layer + shape["vocab_size"] * hidden
    rules = (FULL,) * layers if pattern is None else LocalAttention(**pattern).rules(layers)
    seen = sum(_seen(rule, length) for rule in rules for length in lengths)
    return int(2 * (weights + seen * 2 * kv_heads * head))


def _seen(rule: LayerRule, length: int) -> int:
    if rule.kind == "chunked_attention":
        return (length - 1) % rule.span + 1
    return rule.visible(length)


@contextmanager
def _chunked_by(kind: str) -> Iterator[None]:
    """vLLM's own rows instead of ours, for that kind (the engine is forked from this process)."""
    from vllm.model_executor.layers.attention.chunked_local_attention import (
        create_chunked_local_attention_backend,
    )

    from serve_app.local_attention import rows

    ours = rows.chunked_backend
    if kind == "chunked, vLLM's own":
        rows.chunked_backend = create_chunked_local_attention_backend
    try:
        yield
    finally:
        rows.chunked_backend = ours


def main() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one tiny load")
    parser.add_argument("--kinds", help="comma-separated, by ; where a name has a comma")
    arguments = parser.parse_args()
    every = patterns(64, 8) if arguments.quick else patterns(SEEN, 16)
    chosen = list(every)
    if arguments.kinds:
        chosen = arguments.kinds.split(";" if ";" in arguments.kinds else ",")
    results: list[Result] = []
    notes: list[str] = []
    for kind in chosen:
        try:
            found, note = measure(kind, every[kind], arguments.quick)
        except (RuntimeError, ValueError, EngineDeadError) as error:
            note, found = f"{kind}: failed: {error}", []
        results += found
        notes.append(note)
    print("\nPrefill of one request:\n")
    print("\n".join(f"- {note}" for note in notes))
    print("\n| kind | prompt | sequences | ms a step | tokens/s | floor ms | x floor |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for one in sorted(results, key=lambda one: (one.load.tokens, one.load.sequences)):
        print(
            f"| {one.kind} | {one.load.tokens:,} | {one.load.sequences} | {one.step_ms:.2f} "
            f"| {one.tokens_per_s:,.0f} | {one.floor_ms:.2f} | {one.step_ms / one.floor_ms:.1f} |"
        )


if __name__ == "__main__":
    main()
