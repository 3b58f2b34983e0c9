"""After the model is loaded: every layer's KV cache is the plan's, or the engine stops.

Runs in the engine core, on the specs that the workers sent, so that a worker without the plugin
(another image, ``VLLM_PLUGINS``) is found before it serves full attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from serve_app.errors import LocalAttentionError
from serve_app.local_attention.layers import rule_of
from serve_app.local_attention.plan import plan_in_force
from serve_app.local_attention.sinks import SinkWindowSpec
from serve_app.pattern import LayerRule


def get_kv_cache_groups(
    original: Callable[..., Any], vllm_config: Any, kv_cache_spec: dict[str, KVCacheSpec]
) -> Any:
    """``kv_cache_utils.get_kv_cache_groups``, between checks of its specs and its groups.

    Raises ``LocalAttentionError`` for a layer whose spec is not its rule's, and for a group of
    layers with different rules.
    """
    plan = plan_in_force(vllm_config)
    if plan is None:
        return original(vllm_config, kv_cache_spec)
    promoted = plan.mixed and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    ruled = {
        name: rule
        for name, spec in kv_cache_spec.items()
        if isinstance(spec, AttentionSpec) and (rule := rule_of(plan, name)) is not None
    }
    for name, rule in ruled.items():
        if not _fits(kv_cache_spec[name], rule, promoted):
            raise LocalAttentionError(
                f"Layer {name} should have {rule.kind} but was built with "
                f"{type(kv_cache_spec[name]).__name__}; install local-attention-serve on every "
                "node, and let VLLM_PLUGINS, if set, name local_attention."
            )
    groups = original(vllm_config, kv_cache_spec)
    for group in groups:
        kinds = {ruled[name] for name in group.layer_names if name in ruled}
        if len(kinds) > 1 and not promoted:
            raise LocalAttentionError(
                f"vLLM put layers of different attention into one KV cache group "
                f"({', '.join(group.layer_names)}); make all layers alike."
            )
    return groups


def _fits(spec: KVCacheSpec, rule: LayerRule, promoted: bool) -> bool:
    if isinstance(spec, MLAAttentionSpec):
        return False
    if rule.kind == "full_attention" or promoted:
        return isinstance(spec, FullAttentionSpec)
    if rule.kind == "chunked_attention":
        return (
            isinstance(spec, ChunkedLocalAttentionSpec) and spec.attention_chunk_size == rule.span
        )
    kept = spec.sink_tokens if isinstance(spec, SinkWindowSpec) else 0
    return (
        isinstance(spec, SlidingWindowSpec)
        and spec.sliding_window == rule.span
        and kept == rule.sinks
    )
