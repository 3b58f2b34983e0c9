"""Where the plan takes hold of vLLM 0.32: six functions of vLLM, each wrapped once a process.

The plan is made once, where the front end makes the model configuration, and is stored in the
text configuration, which vLLM pickles to the engine core and to every worker.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import vllm.envs as envs
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

from serve_app.local_attention import audit, layers, sinks
from serve_app.local_attention.plan import (
    CHUNK_VARIABLE,
    PLAN_ATTRIBUTE,
    Plan,
    advice,
    choose_block_size,
    make_plan,
    plan_in_force,
    refuse_engine,
)

# Under vLLM's name, so that its logging configuration applies.
logger = init_logger("vllm.plugins.local_attention")


def install() -> None:
    """Wrap vLLM's functions. Does nothing the second time."""
    envs.environment_variables.setdefault(CHUNK_VARIABLE, lambda: os.getenv(CHUNK_VARIABLE))
    sinks.register()
    _wrap(EngineArgs, "create_model_config", _create_model_config)
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(Attention, "__init__", layers.build)
    _wrap(Attention, "get_kv_cache_spec", layers.kv_cache_spec)
    _wrap(ChunkedLocalAttention, "get_kv_cache_spec", layers.replaced_kv_cache_spec)
    _wrap(kv_cache_utils, "get_kv_cache_groups", audit.get_kv_cache_groups)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "local_attention"):
        wrapped = functools.wraps(original)(_passing(original, wrapper))
        wrapped.local_attention = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _passing(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return call


def _create_model_config(original: Callable[..., Any], args: Any) -> Any:
    model_config = original(args)
    text = model_config.hf_text_config
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    plan = make_plan(
        model_config.hf_config,
        additional=args.additional_config,
        overrides=overrides,
        text_config=text,
    )
    if plan is None:
        return model_config
    setattr(text, PLAN_ATTRIBUTE, plan.to_json())
    # vLLM's own rules for chunked models (the hybrid manager, EAGLE) go by this.
    model_config.attention_chunk_size = plan.chunk
    if hasattr(text, "max_window_layers"):
        # Qwen's model files refuse mixed layers unless told that all are windowed.
        text.max_window_layers = text.num_hidden_layers
    default, step = (128, 32) if current_platform.is_cpu() else (16, 16)
    chosen = choose_block_size(plan.chunk, args.block_size, default, step)
    if chosen is not None:
        args.block_size = chosen
    return model_config


def _create_engine_config(
    original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any
) -> Any:
    vllm_config = original(args, *rest, **kwargs)
    plan = plan_in_force(vllm_config)
    if plan is None:
        logger.info("Local attention: none asked for; the model's own attention is in force.")
        return vllm_config
    refuse_engine(plan, vllm_config)
    logger.info("Local attention in force: %s.", plan)
    for sentence in _warnings(plan, vllm_config):
        logger.warning("Local attention: %s", sentence)
    return vllm_config


def _warnings(plan: Plan, vllm_config: Any) -> list[str]:
    sentences = advice(
        plan,
        vllm_config.model_config.max_model_len,
        in_flight_tokens=vllm_config.max_in_flight_tokens,
    )
    if plan.mixed and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        sentences.append(
            "the hybrid KV cache manager is off, so every layer keeps the KV cache of all tokens: "
            "masks are right, but no memory is freed; enable it, or make all layers alike."
        )
    return sentences
