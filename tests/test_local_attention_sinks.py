"""The sinks' KV cache, driven as vLLM's scheduler drives it, by vLLM's own accounting."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from serve_app.local_attention import sinks

BLOCK = 16
WINDOW, SINKS = 64, 20
STEP = 128  # tokens a prefill step


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    sinks.register()
    init_none_hash(sha256)


def spec(kind: type[Any], **rule: int) -> Any:
    shape = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    return kind(block_size=BLOCK, **shape, **rule)


FULL = spec(FullAttentionSpec)
SLIDING = spec(SlidingWindowSpec, sliding_window=WINDOW)
CHUNKED = spec(ChunkedLocalAttentionSpec, attention_chunk_size=WINDOW)
SUNK = spec(sinks.SinkWindowSpec, sliding_window=WINDOW, sink_tokens=SINKS)


def manager(*specs: Any, blocks: int = 4000) -> Any:
    groups = [KVCacheGroupSpec([f"layer.{i}"], one) for i, one in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=32_768,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        max_in_flight_tokens=STEP,
    )


def request(name: str, tokens: list[int]) -> Any:
    return Request(
        name,
        tokens,
        SamplingParams(max_tokens=100),
        None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def prefill(kv: Any, one: Any) -> int:
    """Prefill a request in steps; the tokens that the prefix cache had."""
    found, hit, _ = kv.get_computed_blocks(one)
    first = True
    while one.num_computed_tokens + (hit if first else 0) < one.num_tokens:
        start = one.num_computed_tokens + (hit if first else 0)
        new = min(STEP, one.num_tokens - start)
        taken = kv.allocate_slots(one, new, hit, found) if first else kv.allocate_slots(one, new)
        assert taken is not None
        one.num_computed_tokens = start + new
        first = False
    return int(hit)


def decode(kv: Any, one: Any) -> None:
    one.append_output_token_ids(7)
    assert kv.allocate_slots(one, 1) is not None
    one.num_computed_tokens += 1


def held(kv: Any, one: Any, group: int = 0) -> list[int]:
    """Which of a request's blocks are there, by their index in it."""
    blocks = kv.coordinator.single_type_managers[group].req_to_blocks[one.request_id]
    return [index for index, block in enumerate(blocks) if not block.is_null]


@given(length=st.integers(1, 700))
def test_holds_what_the_next_query_sees_and_no_more(length: int) -> None:
    kv, one = manager(SUNK, FULL), request("one", tokens(length))
    free = kv.block_pool.get_num_free_blocks()
    prefill(kv, one)
    decode(kv, one)
    position = one.num_tokens - 1
    seen = {j // BLOCK for j in range(position + 1) if j < SINKS or j > position - WINDOW}
    assert set(held(kv, one)) == seen
    assert len(held(kv, one, group=1)) == position // BLOCK + 1
    kv.free(one)
    assert kv.block_pool.get_num_free_blocks() == free


def test_one_long_request_holds_no_more_than_a_short_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = {"sliding": SLIDING, "chunked": CHUNKED, "sinks": SUNK, "full": FULL}
    lengths = [1024 * 2**power for power in range(5)]
    table = {}
    for name, one_spec in kinds.items():
        table[name] = []
        for length in lengths:
            kv, one = manager(one_spec), request("one", tokens(length))
            prefill(kv, one)
            decode(kv, one)
            table[name].append(len(held(kv, one)))
    with capsys.disabled():
        print(f"\nblocks of {BLOCK} held after {lengths} tokens:")
        for name, counts in table.items():
            print(f"  {name:8} {counts}")
    for name in ("sliding", "chunked", "sinks"):
        assert len(set(table[name])) == 1
    assert table["sinks"][0] == table["sliding"][0] + -(-SINKS // BLOCK)
    assert table["full"][-1] == 16_384 // BLOCK + 1


def test_a_prefix_hit_takes_the_sinks_along() -> None:
    kv, prompt = manager(SUNK, FULL), tokens(500)
    first = request("first", prompt)
    prefill(kv, first)
    kept = kv.coordinator.single_type_managers[0].req_to_blocks["first"][:2]
    kv.free(first)
    second = request("second", prompt)
    hit = prefill(kv, second)
    assert hit == 496
    assert kv.coordinator.single_type_managers[0].req_to_blocks["second"][:2] == kept
    assert all(block.ref_cnt == 1 for block in kept)


def test_no_hit_without_the_sinks() -> None:
    kv, prompt = manager(SUNK), tokens(500)
    first = request("first", prompt)
    prefill(kv, first)
    sink = kv.coordinator.single_type_managers[0].req_to_blocks["first"][0]
    kv.free(first)
    kv.block_pool.evict_blocks({sink.block_id})
    assert prefill(kv, request("second", prompt)) == 0


def test_admission_counts_the_sinks() -> None:
    more = SUNK.max_admission_blocks_per_request(STEP, 32_768)
    plain = SLIDING.max_admission_blocks_per_request(STEP, 32_768)
    assert more == plain + -(-SINKS // BLOCK)


@given(st.lists(st.integers(1, 400), min_size=2, max_size=6), st.integers(0, 3))
def test_no_block_is_lost_or_shared_out_twice(lengths: list[int], shared: int) -> None:
    kv = manager(SUNK, SLIDING, FULL, blocks=300)
    free = kv.block_pool.get_num_free_blocks()
    live = []
    for index, length in enumerate(lengths):
        prompt = tokens(100 * shared) + tokens(length, seed=index)
        one = request(str(index), prompt)
        found, hit, _ = kv.get_computed_blocks(one)
        new = min(STEP, one.num_tokens - hit)
        if kv.allocate_slots(one, new, hit, found) is None:
            kv.free(live.pop(0))
            continue
        one.num_computed_tokens = hit + new
        live.append(one)
    for one in live:
        kv.free(one)
    assert kv.block_pool.get_num_free_blocks() == free
