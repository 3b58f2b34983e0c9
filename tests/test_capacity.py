"""The arithmetic of memory, held against vLLM's own figures."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from serve_app.capacity import (
    GIB,
    EngineShape,
    ModelShape,
    cache_groups,
    capacity,
    held_blocks,
    kv_budget,
    kv_bytes,
    kv_tokens,
    reserved_blocks,
)
from serve_app.pattern import FULL, LayerRule, LocalAttention
from tests.tiny_models import ZOO, write_model

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
SHAPE = ModelShape.from_config(LLAMA_8B)
SLIDING = LayerRule("sliding_attention", 2048)
CHUNKED = LayerRule("chunked_attention", 2048)


@pytest.mark.parametrize(
    ("config", "published"),
    [(LLAMA_8B, 8_030_261_248), (MIXTRAL, 46_702_792_704), (QWEN3_30B_A3B, 30_532_122_624)],
)
def test_parameters_are_the_published_number(config: dict[str, Any], published: int) -> None:
    assert ModelShape.from_config(config).parameters() == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize("name", list(ZOO))
def test_parameters_are_the_checkpoints(name: str, tmp_path: Path) -> None:
    directory = write_model(name, tmp_path)
    shape = ModelShape.from_config(json.loads((directory / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert shape.parameters() == pytest.approx(model.num_parameters(), rel=0.01)


@pytest.mark.parametrize(
    ("quantization", "gigabytes"),
    [
        (None, 16.06),
        ({"quant_method": "fp8"}, 9.08),
        ({"quant_method": "awq", "bits": 4}, 5.59),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            5.59,
        ),
    ],
)
def test_quantised_linear_layers_weigh_less(
    quantization: dict[str, Any] | None, gigabytes: float
) -> None:
    shape = ModelShape.from_config({**LLAMA_8B, "quantization_config": quantization})
    assert shape.weight_bytes() / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert shape.weight_bytes(gpus=4) == pytest.approx(shape.weight_bytes() / 4, abs=1)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(KeyError, match="vocab_size"):
        ModelShape.from_config({k: v for k, v in LLAMA_8B.items() if k != "vocab_size"})


def test_kv_bytes_of_a_token() -> None:
    assert SHAPE.kv_token_bytes() == 2 * 8 * 128 * 2
    assert SHAPE.kv_token_bytes("fp8") == 2 * 8 * 128
    assert SHAPE.kv_token_bytes(tensor_parallel=4) == 2 * 2 * 128 * 2
    assert SHAPE.kv_token_bytes(tensor_parallel=16) == 2 * 128 * 2  # replicated
    with pytest.raises(ValueError, match="int3"):
        SHAPE.kv_token_bytes("int3")


# Against vLLM


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's own configuration of a tiny model, as its engine would have it."""
    from vllm.engine.arg_utils import EngineArgs

    directory = write_model("llama", tmp_path_factory.mktemp("llama"))
    config = EngineArgs(
        str(directory), max_model_len=4096, block_size=16, max_num_batched_tokens=512
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def specs_of(rules: tuple[LayerRule, ...], block_size: int) -> dict[str, Any]:
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        SlidingWindowSpec,
    )

    from serve_app.local_attention.sinks import SinkWindowSpec

    shape = {"block_size": block_size, "num_kv_heads": 8, "head_size": 128}
    shape["dtype"] = torch.bfloat16

    def spec(rule: LayerRule) -> Any:
        if rule.sinks:
            return SinkWindowSpec(sliding_window=rule.span, sink_tokens=rule.sinks, **shape)
        if rule.kind == "sliding_attention":
            return SlidingWindowSpec(sliding_window=rule.span, **shape)
        if rule.kind == "chunked_attention":
            return ChunkedLocalAttentionSpec(attention_chunk_size=rule.span, **shape)
        return FullAttentionSpec(**shape)

    return {f"layers.{index}.attn": spec(rule) for index, rule in enumerate(rules)}


def engine_of(vllm_config: Any) -> EngineShape:
    return EngineShape(
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        block_size=16,
        concurrent_batches=vllm_config.max_concurrent_batches,
        hybrid=not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(
        st.sampled_from(["full", "sliding", "sinks", "chunked"]), min_size=1, max_size=24
    ),
    window=st.integers(1, 6000),
    sinks=st.integers(1, 300),
    chunk=st.integers(1, 300).map(lambda blocks: 16 * blocks),
    length=st.integers(16, 4096),
    batched=st.sampled_from([64, 512, 2048]),
    hybrid=st.booleans(),
)
def test_groups_blocks_and_concurrency_are_vllms(
    vllm_config: Any,
    kinds: list[str],
    window: int,
    sinks: int,
    chunk: int,
    length: int,
    batched: int,
    hybrid: bool,
) -> None:
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_configs,
        get_max_concurrency_for_kv_cache_config,
    )

    rule_of = {
        "full": FULL,
        "sliding": LayerRule("sliding_attention", window),
        "sinks": LayerRule("sliding_attention", window, sinks),
        "chunked": LayerRule("chunked_attention", chunk),
    }
    rules = tuple(rule_of[kind] for kind in kinds)
    if {"sliding", "sinks"} <= set(kinds):
        return  # no configuration says this: all windows of a plan have its sinks
    if not hybrid and (len({"sliding", "sinks", "chunked"} & set(kinds)) > 1 or "sinks" in kinds):
        return  # refused
    vllm_config.model_config.max_model_len = length
    vllm_config.scheduler_config.max_num_batched_tokens = batched
    vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
    memory = 4 * GIB
    specs = specs_of(rules, 16)
    (theirs,) = get_kv_cache_configs(vllm_config, [dict(specs)], [memory])

    engine = engine_of(vllm_config)
    ours = capacity(rules, SHAPE, engine, memory)
    groups = cache_groups(rules, hybrid)
    assert sorted(group.layers for group in groups) == sorted(
        len(group.layer_names) for group in theirs.kv_cache_groups
    )
    assert ours.blocks == theirs.num_blocks
    assert ours.concurrency == get_max_concurrency_for_kv_cache_config(vllm_config, theirs)
    for rule, spec in zip(rules, specs.values(), strict=True):
        if hybrid:
            needed = spec.max_memory_usage_bytes(vllm_config)
            assert reserved_blocks(rule, engine) * spec.page_size_bytes == needed


def test_pipeline_stages_share_the_layers_as_vllm_does(vllm_config: Any) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    vllm_config.model_config.max_model_len = 4096
    vllm_config.scheduler_config.max_num_batched_tokens = 512
    vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False
    rules = (SLIDING, SLIDING, SLIDING, FULL) * 8
    specs = list(specs_of(rules, 16).items())
    stages = [dict(specs[:16]), dict(specs[16:])]
    theirs = get_kv_cache_configs(vllm_config, stages, [GIB, GIB])
    engine = dataclasses.replace(engine_of(vllm_config), pipeline_parallel=2)
    assert {config.num_blocks for config in theirs} == {capacity(rules, SHAPE, engine, GIB).blocks}


@given(length=st.integers(1, 5000), span=st.integers(1, 60).map(lambda blocks: 16 * blocks))
def test_held_blocks_bound_what_vllms_managers_keep(length: int, span: int) -> None:
    """A manager frees blocks wholly before ``get_num_skipped_tokens``; all others are held."""
    from types import SimpleNamespace

    from vllm.v1.core.single_type_kv_cache_manager import (
        ChunkedLocalAttentionManager,
        SlidingWindowManager,
    )

    cases = (
        (
            LayerRule("sliding_attention", span),
            SlidingWindowManager,
            SimpleNamespace(sliding_window=span, extra_retained_tokens=0),
        ),
        (
            LayerRule("chunked_attention", span),
            ChunkedLocalAttentionManager,
            SimpleNamespace(attention_chunk_size=span),
        ),
    )
    for rule, manager, fields in cases:
        kept = [
            -(-(computed + 1) // 16) - manager.get_num_skipped_tokens(fields, computed) // 16
            for computed in range(max(0, length - 2 * span), length)
        ]
        assert max(kept) <= held_blocks(rule, length, 16) <= max(kept) + 1


# What follows from it


def test_a_window_frees_memory_and_full_layers_keep_it() -> None:
    engine = EngineShape(max_model_len=131072, max_num_batched_tokens=2048)
    full = kv_bytes((FULL,) * 32, SHAPE, engine, 131072)
    window = kv_bytes((SLIDING,) * 32, SHAPE, engine, 131072)
    mixed = kv_bytes((SLIDING,) * 24 + (FULL,) * 8, SHAPE, engine, 131072)
    assert full == 131072 * 32 * SHAPE.kv_token_bytes()
    assert window < full / 60
    assert mixed == pytest.approx(full / 4 + window * 3 / 4)
    assert kv_bytes((SLIDING,) * 32, SHAPE, engine, 1 << 20) == window


def test_smaller_prefill_steps_admit_more() -> None:
    rules = (SLIDING,) * 32

    def concurrency(batched: int) -> float:
        engine = EngineShape(max_model_len=131072, max_num_batched_tokens=batched)
        return capacity(rules, SHAPE, engine, 40 * GIB).concurrency

    assert concurrency(1024) > 3 * concurrency(8192)


def test_uneven_groups_are_padded_and_paid_for() -> None:
    even = (SLIDING, SLIDING, SLIDING, FULL) * 8
    uneven = (*even[:-1], SLIDING)  # 25 sliding, 7 full: 7 + 6 x 3 pages in 7-page blocks
    assert Counter(g.rule for g in cache_groups(even)) == {SLIDING: 3, FULL: 1}
    assert sorted(g.layers for g in cache_groups(uneven)) == [6, 6, 6, 7, 7]


def test_sinks_add_their_own_blocks() -> None:
    plain, sinks = (LayerRule("sliding_attention", 1024, s) for s in (0, 40))
    assert held_blocks(sinks, 100_000, 16) == held_blocks(plain, 100_000, 16) + 3
    assert held_blocks(sinks, 200, 16) == held_blocks(plain, 200, 16) == 13


def test_nothing_decodes_where_one_request_does_not_fit() -> None:
    engine = EngineShape(max_model_len=131072)
    need = 131072 * 32 * SHAPE.kv_token_bytes()
    assert capacity((FULL,) * 32, SHAPE, engine, need).decoding == 0  # vLLM keeps one block
    found = capacity((FULL,) * 32, SHAPE, engine, need + found_block(engine))
    assert found.decoding == 1
    assert capacity((FULL,) * 32, SHAPE, engine, -1).blocks == 0


def found_block(engine: EngineShape) -> int:
    return capacity((FULL,) * 32, SHAPE, engine, GIB).block_bytes


def test_short_sequences_decode_in_greater_number() -> None:
    engine = EngineShape(max_model_len=32768)
    rules = (FULL,) * 32
    long = capacity(rules, SHAPE, engine, 40 * GIB)
    short = capacity(rules, SHAPE, engine, 40 * GIB, length=1024)
    assert long.concurrency == 40 * GIB / (32768 * 32 * SHAPE.kv_token_bytes()) == 10
    assert long.decoding == 9  # one block is never written
    assert short.decoding == 319
    assert short.concurrency == long.concurrency  # vLLM counts the longest


def test_the_budget_shrinks_with_weights_and_steps() -> None:
    engine = EngineShape(max_model_len=8192, max_num_batched_tokens=2048)
    budget = kv_budget(SHAPE, engine, 80 * GIB)
    assert 50 * GIB < budget < 0.92 * 80 * GIB - SHAPE.weight_bytes()
    wide = EngineShape(max_model_len=8192, max_num_batched_tokens=16384)
    assert kv_budget(SHAPE, wide, 80 * GIB) < budget
    assert kv_budget(SHAPE, engine, 16 * GIB) < 0


def test_kv_tokens_are_averaged_over_the_layers() -> None:
    rules = LocalAttention(sliding_window=1000, full_attention_every=4).rules(8)
    assert kv_tokens(rules, 500) == 500
    assert kv_tokens(rules, 9000) == (3 * 1000 + 9000) / 4
    assert kv_tokens((FULL,), 9000) == 9000
