"""Engines under local attention, token by token against an explicit mask.

Every case asks for prompts that end on, before and after a boundary, several at once, prefilled in
small steps, and asks a second time to hit the prefix cache. A window wrong by one token moves
logprobs by 0.3 or more (``test_reference.py``), float32 noise by 1e-5.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import LocalAttentionError
from serve_app.local_attention.plan import plan_in_force
from serve_app.pattern import FULL, LayerRule, LocalAttention
from tests.reference import Reference
from tests.tiny_models import LAYERS, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own

NEW_TOKENS = 16
TOLERANCE = 1e-4  # nats
ENGINE: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "dtype": "float32",
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
WINDOW = {"sliding_window": 48}
CHUNK = {"attention_chunk_size": 64}
SINKS = {"sliding_window": 48, "attention_sinks": 5}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def engine(model: Path, pattern: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An engine in this process, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if pattern is not None:
        options["additional_config"] = {"local_attention": pattern}
    llm = LLM(model=str(model), **{**ENGINE, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(256), k=length) for length in lengths]


def ask(llm: Any, questions: Sequence[list[int]], *, of_prompt: bool = True) -> list[Any]:
    """Greedy answers; with ``of_prompt`` each prompt token's logprob too, past the cache."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if of_prompt else None,
    )
    asked = [{"prompt_token_ids": question} for question in questions]
    return list(llm.generate(asked, params, use_tqdm=False))


class Judge:
    """The explicit mask, in a process of its own, since vLLM takes over transformers' classes."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def scores(
        self, model: Path, rules: Sequence[LayerRule], tokens: list[int]
    ) -> tuple[list[float], list[float]]:
        return self._pool.submit(_scores, model, rules, tokens).result()

    def __call__(self, model: Path, rules: Sequence[LayerRule], outputs: Sequence[Any]) -> float:
        """The largest error in nats of some outputs, each token of which must be the greedy one."""
        worst = 0.0
        for output in outputs:
            prompt, made = list(output.prompt_token_ids), output.outputs[0]
            tokens = list(made.token_ids)
            right, best = self.scores(model, rules, prompt + tokens)
            scores = [*(output.prompt_logprobs or [None] * len(prompt)), *made.logprobs]
            for position, token in enumerate(prompt + tokens):
                if scores[position] is not None:
                    error = abs(scores[position][token].logprob - right[position - 1])
                    worst = max(worst, error)
                if position >= len(prompt):
                    assert best[position - 1] - right[position - 1] < TOLERANCE
        return worst


@pytest.fixture(scope="module")
def worst_error() -> Iterator[Judge]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield Judge(pool)


def _scores(
    model: Path, rules: Sequence[LayerRule], tokens: list[int]
) -> tuple[list[float], list[float]]:
    """The logprob of each token after the first, and of the likeliest in its place."""
    table = _reference(model).logprobs(tokens, rules)[:-1]
    right = table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return right.tolist(), table.max(1).values.tolist()


@functools.lru_cache(maxsize=1)
def _reference(model: Path) -> Reference:
    return Reference(model)


CASES = {
    "every layer chunked": ("llama", CHUNK),
    "chunks as long as a block": ("phi", {"attention_chunk_size": 32}),
    "a window shorter than a block": ("phi3", {"sliding_window": 16, "full_attention_every": 2}),
    "sinks beside full layers": ("qwen3", {**SINKS, "full_attention_every": 4}),
    "sinks of whole blocks": ("mistral", {"sliding_window": 65, "attention_sinks": 32}),
    "soft-capped, with sinks": ("gemma2", SINKS),
    "native windows replaced": ("gemma3", {**CHUNK, "full_attention_layers": [1]}),
    "Transformers backend": ("gpt_neox", {**CHUNK, "full_attention_layers": [0]}),
    "all three kinds": (
        "llama",
        {
            **WINDOW,
            **CHUNK,
            "layer_types": [
                "sliding_attention",
                "chunked_attention",
                "full_attention",
                "chunked_attention",
            ],
        },
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_answers_are_the_masks(case: str, worst_error: Judge, tmp_path: Path) -> None:
    name, pattern = CASES[case]
    model = write_model(name, tmp_path)
    questions = prompts([1, 31, 47, 48, 49, 63, 64, 65, 128, 129, 300, 700])
    with engine(model, pattern) as llm:
        plan = plan_in_force(llm.llm_engine.vllm_config)
        rules = LocalAttention(**pattern).rules(LAYERS)
        assert plan is not None
        assert plan.rules == rules
        assert worst_error(model, rules, ask(llm, questions)) < TOLERANCE
        again = ask(llm, questions, of_prompt=False)
        assert all(out.num_cached_tokens for out in again if len(out.prompt_token_ids) > 64)
        assert worst_error(model, rules, again) < TOLERANCE


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (
            {**SINKS, "full_attention_every": 2},
            # Blocks of 32 tokens: eight requests at once must push each other out.
            {"num_gpu_blocks_override": 40, "max_model_len": 512, "disable_log_stats": False},
        ),
        ({**CHUNK, "full_attention_every": 2}, {"disable_hybrid_kv_cache_manager": True}),
        ({**SINKS, "full_attention_every": 2}, {"disable_hybrid_kv_cache_manager": True}),
        (
            CHUNK,
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_max": 3,
                    "prompt_lookup_min": 1,
                }
            },
        ),
        ({**SINKS, "full_attention_every": 2}, {"async_scheduling": True}),
    ],
    ids=[
        "preemption",
        "chunks, no hybrid manager",
        "sinks, no hybrid manager",
        "speculation",
        "async scheduling",
    ],
)
def test_answers_stay_the_masks(
    pattern: dict[str, Any],
    options: dict[str, Any],
    worst_error: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "speculative_config" in options or "async_scheduling" in options:
        # Numba, which vLLM drafts with, breaks its next engine in the same process; and an engine
        # in the caller's process has no step to run ahead of.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = write_model("llama", tmp_path)
    questions = prompts([100, 190, 191, 192, 193, 250, 300, 333])
    with engine(model, pattern, **options) as llm:
        rules = LocalAttention(**pattern).rules(LAYERS)
        outputs = ask(llm, questions, of_prompt="speculative_config" not in options)
        assert worst_error(model, rules, outputs) < TOLERANCE
        if "num_gpu_blocks_override" in options:
            counts = {
                metric.name: metric.value for metric in llm.get_metrics() if is_counter(metric)
            }
            assert counts["vllm:num_preemptions"] > 0


def is_counter(metric: Any) -> bool:
    return type(metric).__name__ == "Counter"


def test_any_batch_of_prompts(worst_error: Judge, tmp_path: Path) -> None:
    model = write_model("qwen3", tmp_path)
    pattern = {**CHUNK, "full_attention_every": 4}
    rules = LocalAttention(**pattern).rules(LAYERS)
    with engine(model, pattern) as llm:

        @settings(max_examples=12, derandomize=True)
        @given(
            lengths=st.lists(st.integers(1, 260), min_size=1, max_size=4),
            seed=st.integers(0, 2**16),
        )
        def any_batch(lengths: list[int], seed: int) -> None:
            outputs = ask(llm, prompts(lengths, seed), of_prompt=seed % 2 == 0)
            assert worst_error(model, rules, outputs) < TOLERANCE

        any_batch()


def forgets(llm: Any, lora: Any = None) -> None:
    """With every layer in chunks of 64, what came before the chunk changes nothing after it.

    Needs no reference, so it judges engines whose arithmetic is not float32's.
    """
    from vllm import SamplingParams

    common, (first, second) = prompts([40])[0], prompts([64, 64], seed=1)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    asked = [{"prompt_token_ids": start + common} for start in (first, second, second[:-1])]
    one, same, moved = (
        [next(iter(each.values())).logprob for each in output.outputs[0].logprobs]
        for output in llm.generate(asked, params, use_tqdm=False, lora_request=lora)
    )
    assert one == pytest.approx(same, abs=2e-3)
    # A token less before it, and the chunk's edge falls elsewhere.
    assert one != pytest.approx(moved, abs=2e-2)


def test_a_quantised_kv_cache_keeps_the_mask(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path)
    with engine(model, CHUNK, kv_cache_dtype="fp8") as llm:
        forgets(llm)


def test_quantised_weights_keep_the_mask(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path)
    quantise(model)
    with engine(model, CHUNK) as llm:
        assert llm.llm_engine.model_config.quantization == "compressed-tensors"
        forgets(llm)


def test_the_chunks_of_llama_4_are_replaced(tmp_path: Path) -> None:
    model = write_model("llama4", tmp_path)
    with engine(model, CHUNK) as llm:
        forgets(llm)


def quantise(model: Path) -> None:
    """Rewrite a checkpoint with eight-bit weights and activations, as compressed-tensors does."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[f"{name}_scale"] = scale
        weights[name] = (weights[name] / scale).round().to(torch.int8)
    save_file(weights, model / "model.safetensors")
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (model / "config.json").write_text(json.dumps(config))


def test_lora_keeps_the_mask(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    model = write_model("llama", tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 8,
                "target_modules": ["q_proj"],
                "base_model_name_or_path": str(model),
            }
        )
    )
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            8, 128, generator=draw
        ).T.contiguous()
        if side == "B"
        else torch.randn(8, 128, generator=draw)
        for layer in range(LAYERS)
        for side in "AB"
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    with engine(model, CHUNK, enable_lora=True, max_lora_rank=8) as llm:
        forgets(llm)
        forgets(llm, LoRARequest("random", 1, str(adapter)))


def test_tensor_parallel_workers_get_the_plan(
    worst_error: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("llama", tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    pattern = {**CHUNK, "full_attention_every": 2}
    with engine(model, pattern, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        rules = LocalAttention(**pattern).rules(LAYERS)
        outputs = ask(llm, prompts([63, 65, 200]))
        assert worst_error(model, rules, outputs) < TOLERANCE


def test_a_chunk_finds_its_block_size(worst_error: Judge, tmp_path: Path) -> None:
    """The CPU's own block of 128 tokens does not divide a chunk of 96."""
    model = write_model("llama", tmp_path)
    overrides = {"attention_chunk_size": 96}
    with engine(model, None, hf_overrides=overrides, block_size=None) as llm:
        plan = plan_in_force(llm.llm_engine.vllm_config)
        assert plan is not None
        assert plan.source == "hf_overrides"
        outputs = ask(llm, prompts([95, 97, 200]))
        assert worst_error(model, plan.rules, outputs) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 128}, "does not divide attention_chunk_size"),
        ({"kv_cache_dtype": "fp8", "pattern": SINKS}, "unquantised KV cache"),
    ],
)
def test_refusals_stop_the_engine(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = write_model("llama", tmp_path)
    pattern = options.pop("pattern", CHUNK)
    with pytest.raises(LocalAttentionError, match=words), engine(model, pattern, **options):
        pass


def test_vllm_serve_with_nothing_else_changed(worst_error: Judge, tmp_path: Path) -> None:
    """The installed package is all that makes ``--hf-overrides`` count.

    The module is what ``vllm serve`` runs; that command itself does not start from ``vllm-cpu``,
    which looks for its own version under the name ``vllm``.
    """
    model = write_model("llama", tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    flags = {
        "--hf-overrides": '{"attention_chunk_size": 64}',
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": "tiny",
        "--max-model-len": "512",
        "--dtype": "float32",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(model)]
    command += [word for flag in flags.items() for word in flag] + ["--enforce-eager"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            for question in prompts([127, 129]):
                answer = _complete(process, port, question)
                made = slice(len(question) - 1, None)
                right, best = worst_error.scores(model, _chunks(64), question + answer)
                assert right[made] == pytest.approx(best[made], abs=TOLERANCE)
                right, best = worst_error.scores(model, (FULL,) * LAYERS, question + answer)
                assert right[made] != pytest.approx(best[made], abs=0.1)
            log.seek(0)
            assert "Local attention in force: 4 x chunked 64, from hf_overrides" in log.read()
        finally:
            process.terminate()
            process.wait(60)


def _chunks(span: int) -> tuple[LayerRule, ...]:
    return (LayerRule("chunked_attention", span),) * LAYERS


def _complete(process: subprocess.Popen[Any], port: int, question: list[int]) -> list[int]:
    """The token ids of a greedy completion, once the server is up."""
    body = {
        "model": "tiny",
        "prompt": question,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    deadline = time.monotonic() + 300
    while True:
        try:
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)
            reply.raise_for_status()
            return list(reply.json()["choices"][0]["token_ids"])
        except httpx.ConnectError:
            assert process.poll() is None, "the server left before it answered"
            assert time.monotonic() < deadline
            time.sleep(1)
