"""An attention layer's kind, backend and KV-cache spec, as the plan says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    get_kv_quant_mode,
)

from serve_app.errors import LocalAttentionError
from serve_app.local_attention import rows, sink_layers
from serve_app.local_attention.plan import Plan, plan_in_force
from serve_app.local_attention.sinks import SinkWindowSpec
from serve_app.pattern import FULL, LayerRule


def build(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """``Attention.__init__``: build the layer with the kind that the plan gives it."""
    arguments = inspect.signature(original).bind(layer, *args, **kwargs).arguments
    prefix = arguments.get("prefix", "")
    plan = plan_in_force(get_current_vllm_config())
    rule = None
    if plan is not None and arguments.get("attn_type", "decoder") == AttentionType.DECODER:
        rule = rule_of(plan, prefix)
    layer.local_attention_rule = rule
    if plan is None or rule is None:
        original(layer, *args, **kwargs)
        return
    extra = arguments.pop("extra_impl_args", {})
    arguments.pop("self")
    _refuse_shared_cache(plan, rule, arguments)
    _build(original, layer, rule, {**arguments, **extra})


def _build(
    original: Callable[..., None], layer: Any, rule: LayerRule, arguments: dict[str, Any]
) -> None:
    own = arguments.get("attn_backend")
    if isinstance(layer, ChunkedLocalAttention):
        arguments["attn_backend"] = None  # Llama 4's own, which the plan replaces.
    elif own is not None and rule != FULL:
        raise LocalAttentionError(
            f"Layer {arguments['prefix']} brings its own attention backend ({own.__name__}), "
            f"which has no {rule.kind}; leave this layer full or remove local_attention."
        )
    arguments["per_layer_sliding_window"] = None
    if rule.kind == "sliding_attention":
        arguments["per_layer_sliding_window"] = rule.span
    if rule.sinks:
        selected: Any = _selected(arguments)
        arguments["attn_backend"] = sink_layers.sink_backend(selected, rule.span, rule.sinks)
    in_kernel = (
        rule.kind == "chunked_attention" and _selected(arguments).get_name() == "TRITON_ATTN"
    )
    if in_kernel:
        # Triton's kernel knows chunks of sliding_window / (chunk_lookback + 1) tokens.
        arguments["per_layer_sliding_window"] = rule.span
        arguments["chunk_lookback"] = 0
    cache_config = arguments.get("cache_config")
    hidden = getattr(cache_config, "sliding_window", None)
    if cache_config is not None:
        cache_config.sliding_window = None  # Else every layer takes it as its default.
    try:
        original(layer, **arguments)
    finally:
        if cache_config is not None:
            cache_config.sliding_window = hidden
    if rule.kind == "chunked_attention" and not in_kernel:
        layer.attn_backend = rows.chunked_backend(layer.attn_backend, rule.span)
    layer.local_attention_backend = layer.attn_backend


def kv_cache_spec(
    original: Callable[..., KVCacheSpec | None], layer: Any, vllm_config: Any
) -> KVCacheSpec | None:
    """``Attention.get_kv_cache_spec``: what the KV-cache manager keeps for the layer."""
    rule: LayerRule | None = layer.local_attention_rule
    plan = plan_in_force(vllm_config)
    if rule is None or plan is None:
        return original(layer, vllm_config)
    if layer.attn_backend is not layer.local_attention_backend:
        raise LocalAttentionError(
            f"Layer {layer.layer_name} was built for {rule.kind}, but something has since given it "
            f"the attention backend {layer.attn_backend.__name__}; remove local_attention for "
            "this model."
        )
    if rule == FULL:
        return original(layer, vllm_config)
    if plan.mixed and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return _promoted(layer, vllm_config, plan, rule)
    if rule.kind == "chunked_attention":
        return ChunkedLocalAttentionSpec(
            attention_chunk_size=rule.span, **_shape(layer, vllm_config, rule)
        )
    if rule.sinks:
        return SinkWindowSpec(
            sliding_window=rule.span, sink_tokens=rule.sinks, **_shape(layer, vllm_config, rule)
        )
    return original(layer, vllm_config)


def replaced_kv_cache_spec(
    original: Callable[..., KVCacheSpec | None], layer: Any, vllm_config: Any
) -> KVCacheSpec | None:
    """``ChunkedLocalAttention.get_kv_cache_spec``, Llama 4's: its own only without a plan."""
    if layer.local_attention_rule is None:
        return original(layer, vllm_config)
    return Attention.get_kv_cache_spec(layer, vllm_config)


def _refuse_shared_cache(plan: Plan, rule: LayerRule, arguments: dict[str, Any]) -> None:
    target = arguments.get("kv_sharing_target_layer_name")
    if target is not None and rule_of(plan, target) != rule:
        raise LocalAttentionError(
            f"Layer {arguments['prefix']} reads the KV cache of {target}, which has another kind "
            "of attention; give both the same kind by layer_types."
        )


def _promoted(layer: Any, vllm_config: Any, plan: Plan, rule: LayerRule) -> FullAttentionSpec:
    """Full allocation, with the window or chunk noted where all local layers share one."""
    note = {}
    if len(set(plan.rules) - {FULL}) == 1:
        key = "sliding_window" if rule.kind == "sliding_attention" else "attention_chunk_size"
        note = {key: rule.span}
    return FullAttentionSpec(**note, **_shape(layer, vllm_config, rule))


def _shape(layer: Any, vllm_config: Any, rule: LayerRule) -> dict[str, Any]:
    block_size = vllm_config.cache_config.block_size
    if rule.kind == "chunked_attention" and rule.span % block_size:
        raise LocalAttentionError(
            f"The KV block size ({block_size}) does not divide attention_chunk_size "
            f"({rule.span}); choose a chunk that is a multiple of it, or another block_size."
        )
    return {
        "block_size": block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "head_size_v": layer.head_size_v,
        "dtype": layer.kv_cache_torch_dtype,
        "kv_quant_mode": get_kv_quant_mode(layer.kv_cache_dtype),
    }


def rule_of(plan: Plan, prefix: str) -> LayerRule | None:
    """The rule of the layer named ``prefix``; None for a draft model's, past the last layer."""
    try:
        index = extract_layer_index(prefix)
    except (AssertionError, IndexError) as error:
        raise LocalAttentionError(
            f"The attention layer {prefix!r} has no layer index in its name, so no rule can be "
            "given to it; remove local_attention for this model."
        ) from error
    return plan.rules[index] if index < len(plan.rules) else None


def _selected(arguments: dict[str, Any]) -> type[AttentionBackend]:
    """The backend that vLLM is about to select for this layer."""
    vllm_config = get_current_vllm_config()
    cache_config = arguments.get("cache_config")
    scheme = getattr(arguments.get("quant_config"), "kv_cache_scheme", None)
    dtype = "auto" if cache_config is None else cache_config.cache_dtype
    backend: type[AttentionBackend] = get_attn_backend(
        arguments["head_size"],
        torch.get_default_dtype(),
        "fp8" if scheme is not None and dtype == "auto" else dtype,
        has_sink=arguments.get("sinks") is not None,
        use_mm_prefix=vllm_config.model_config.is_mm_prefix_lm,
        use_per_head_quant_scales=scheme is not None and scheme.get("strategy") == "attn_head",
        has_sliding_window=arguments["per_layer_sliding_window"] is not None,
    )
    return backend
