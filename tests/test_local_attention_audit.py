"""The audit stops an engine whose layers are not what the plan says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from serve_app.errors import LocalAttentionError
from serve_app.local_attention.audit import get_kv_cache_groups
from serve_app.local_attention.plan import Plan
from serve_app.local_attention.sinks import SinkWindowSpec
from serve_app.pattern import FULL, LayerRule

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 1,
    "head_size": 32,
    "dtype": torch.float32,
}
WHOLE = FullAttentionSpec(**SHAPE)
SLIDING = SlidingWindowSpec(sliding_window=64, **SHAPE)
CHUNKED = ChunkedLocalAttentionSpec(attention_chunk_size=64, **SHAPE)
SUNK = SinkWindowSpec(sliding_window=64, sink_tokens=4, **SHAPE)
RULES = {
    "full": (FULL, WHOLE),
    "sliding": (LayerRule("sliding_attention", 64), SLIDING),
    "chunked": (LayerRule("chunked_attention", 64), CHUNKED),
    "sinks": (LayerRule("sliding_attention", 64, 4), SUNK),
}


def audit(rules: list[LayerRule], specs: list[KVCacheSpec], *, manager: bool = True) -> Any:
    """Pass the workers' specs to the audit; vLLM's own grouping is one group a layer."""
    text = SimpleNamespace(local_attention_plan=Plan(tuple(rules), "config.json").to_json())
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not manager),
    )
    named = {f"model.layers.{index}.attn": spec for index, spec in enumerate(specs)}

    def group(_: Any, sent: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
        return [KVCacheGroupSpec([name], spec) for name, spec in sent.items()]

    return get_kv_cache_groups(group, config, named)


@pytest.mark.parametrize("asked", RULES)
@pytest.mark.parametrize("built", RULES)
def test_a_layer_of_another_kind_stops_the_engine(asked: str, built: str) -> None:
    rule, spec = RULES[asked][0], RULES[built][1]
    if asked == built:
        assert len(audit([FULL, rule], [WHOLE, spec])) == 2
    else:
        with pytest.raises(LocalAttentionError, match=r"Layer model\.layers\.1\.attn should have"):
            audit([FULL, rule], [WHOLE, spec])


def test_without_the_hybrid_manager_every_layer_is_allocated_in_full() -> None:
    rules = [FULL, RULES["sliding"][0]]
    audit(rules, [WHOLE, WHOLE], manager=False)
    with pytest.raises(LocalAttentionError):
        audit(rules, [WHOLE, SLIDING], manager=False)


def test_a_drafter_past_the_last_layer_keeps_its_own_kind() -> None:
    audit([RULES["chunked"][0]], [CHUNKED, WHOLE])


def test_a_layer_without_an_index_is_refused() -> None:
    text = SimpleNamespace(local_attention_plan=Plan((FULL,), "config.json").to_json())
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )
    with pytest.raises(LocalAttentionError, match="no layer index"):
        get_kv_cache_groups(lambda *_: [], config, {"model.attn": WHOLE})
