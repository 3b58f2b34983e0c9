"""From configuration to a plan: one rule for each decoder layer.

Pure: works on a ``config.json`` as a dictionary or on a Hugging Face configuration object, and
imports neither vLLM nor torch, so that ``local-attention check`` needs no engine.

Sources, first match wins:

1. ``additional_config["local_attention"]``, what a pool's YAML becomes;
2. ``attention_chunk_size`` or ``sliding_window``, with ``layer_types`` or ``use_irope``, in
   config.json or in ``hf_overrides``;
3. the environment variable ``VLLM_ATTENTION_CHUNK_SIZE``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from serve_app.config import explain
from serve_app.errors import LocalAttentionError
from serve_app.pattern import FULL, Kind, LayerRule, LocalAttention, in_words

CHUNK_VARIABLE = "VLLM_ATTENTION_CHUNK_SIZE"
KEYS = ("sliding_window", "attention_chunk_size", "layer_types", "use_irope")
# Where the plan travels with the model configuration, by pickle, to every worker.
PLAN_ATTRIBUTE = "local_attention_plan"

_WINDOWED = frozenset({"sliding_window", "layer_types"})
# Models whose own attention is local already, and the keys that vLLM reads for them.
NATIVE: dict[str, frozenset[str]] = {
    "llama4": frozenset({"attention_chunk_size", "layer_types"}),
    "llama4_text": frozenset({"attention_chunk_size", "layer_types"}),
    **dict.fromkeys(
        [
            *("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "gemma2", "gemma3"),
            *("gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt_oss"),
            *("laguna", "mimo_v2", "ministral", "ministral3", "mistral", "mistral3", "mixtral"),
            *("olmo3", "plamo3", "step3p5"),
        ],
        _WINDOWED,
    ),
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LOCAL_KINDS: dict[str, Kind] = {
    "sliding_window": "sliding_attention",
    "attention_chunk_size": "chunked_attention",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The rule of every decoder layer, and where it came from."""

    rules: tuple[LayerRule, ...]
    source: str

    @property
    def chunk(self) -> int | None:
        """The chunk in tokens, where any layer is chunked."""
        return next((r.span for r in self.rules if r.kind == "chunked_attention"), None)

    @property
    def sinks(self) -> int:
        return max(rule.sinks for rule in self.rules)

    @property
    def mixed(self) -> bool:
        """Whether layers differ, so that their KV cache needs vLLM's hybrid manager."""
        return len(set(self.rules)) > 1

    @property
    def local(self) -> bool:
        return any(rule != FULL for rule in self.rules)

    def __str__(self) -> str:
        return f"{in_words(self.rules)}, from {self.source}"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "rules": [[rule.kind, rule.span, rule.sinks] for rule in self.rules],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        return cls(tuple(LayerRule(*rule) for rule in value["rules"]), value["source"])


def plan_in_force(vllm_config: Any) -> Plan | None:
    """The plan that an engine runs, or None where the model's own attention is untouched."""
    model_config = getattr(vllm_config, "model_config", None)
    stored = getattr(getattr(model_config, "hf_text_config", None), PLAN_ATTRIBUTE, None)
    return None if stored is None else Plan.from_json(stored)


def make_plan(
    config: Any,
    *,
    additional: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    text_config: Any = None,
) -> Plan | None:
    """The plan for a model, or None where its own attention stays as it is.

    ``config`` is config.json or a Hugging Face configuration, ``additional`` is vLLM's
    ``additional_config``, ``overrides`` its ``hf_overrides``, and ``environment`` defaults to the
    process's. ``text_config`` is the language model's part, where it is not under that name.
    Raises ``LocalAttentionError`` with one sentence that says what to do.
    """
    text = _Text(config, overrides or {}, text_config)
    environment = os.environ if environment is None else environment
    asked = (additional or {}).get("local_attention")
    if asked is not None:
        plan = _build(asked, text, "additional_config")
    elif (found := _from_config(text)) is not None:
        plan = _build(found, text, "hf_overrides" if text.explicit else "config.json")
        if not plan.local and not text.explicit:
            return None
    elif not text.native and (chunk := environment.get(CHUNK_VARIABLE)):
        plan = _build({"attention_chunk_size": _chunk_of(chunk)}, text, CHUNK_VARIABLE)
    else:
        return None
    refuse_model(text, plan)
    return plan


class _Text:
    """A text model's configuration under overrides, whichever form it comes in."""

    def __init__(self, config: Any, overrides: Mapping[str, Any], inner: Any) -> None:
        nested = overrides.get("text_config")
        self.overrides = {**overrides, **nested} if isinstance(nested, Mapping) else overrides
        self.outer = config
        inner = _read(config, "text_config") if inner is None else inner
        self.config = config if inner is None else inner
        self.explicit = frozenset(key for key in KEYS if key in self.overrides)

    def get(self, key: str) -> Any:
        value = self.overrides.get(key)
        if value is None:
            value = _read(self.config, key)
        return _read(self.outer, key) if value is None else value

    @property
    def model_type(self) -> str:
        return str(self.get("model_type") or "this model")

    @property
    def native(self) -> bool:
        """Whether vLLM's own local attention for this model stays as it is."""
        handled = NATIVE.get(self.model_type) or NATIVE.get(
            str(_read(self.outer, "model_type")), frozenset()
        )
        return bool(handled) and self.explicit <= handled

    @property
    def layers(self) -> int:
        for key in _LAYER_COUNTS:
            if isinstance(value := self.get(key), int) and value > 0:
                return value
        raise LocalAttentionError(
            f"The configuration of {self.model_type} does not say how many layers it has; "
            "give num_hidden_layers by hf_overrides."
        )


def _read(config: Any, key: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(key)
    return getattr(config, key, None)


def _chunk_of(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise LocalAttentionError(
            f"{CHUNK_VARIABLE} is {value!r}, but it must be a number of tokens."
        ) from None


def _from_config(text: _Text) -> dict[str, Any] | None:
    """The pattern that config.json and hf_overrides give, as a user would write it."""
    if text.native:
        return None
    spans = {key: text.get(key) for key in _LOCAL_KINDS}
    if "sliding_window" not in text.explicit and (
        # Qwen's way of saying off, and some checkpoints' (vLLM reads 0 so, too).
        text.get("use_sliding_window") is False or spans["sliding_window"] == 0
    ):
        spans["sliding_window"] = None
    named = [key for key in _LOCAL_KINDS if key in text.explicit]
    types = text.get("layer_types")
    if len(named) == 1 and "layer_types" not in text.explicit:
        # What the user has just said outdoes what the checkpoint says of the other kind.
        spans = {named[0]: spans[named[0]]}
    found: dict[str, Any] = {key: value for key, value in spans.items() if value is not None}
    if not found:
        return None
    kinds = {_LOCAL_KINDS[key] for key in found}
    if "layer_types" in text.explicit or (types and kinds & set(types)):
        return {**found, "layer_types": _known(types)}
    if types and not named and kinds == {"sliding_attention"}:
        return None  # The checkpoint lists its layers, and none of them slides.
    if text.get("use_irope"):
        return {**found, "full_attention_every": 4}
    first = text.get("max_window_layers")
    if not types and not named and kinds == {"sliding_attention"} and isinstance(first, int):
        # Qwen's config.json: the first max_window_layers see everything.
        return {**found, "full_attention_layers": list(range(min(first, text.layers)))}
    return found


def _known(types: Sequence[str]) -> list[str]:
    """Layer types with those that are no attention kind (linear, state space) read as full."""
    return [name if name in _LOCAL_KINDS.values() else "full_attention" for name in types]


def _build(pattern: Any, text: _Text, source: str) -> Plan:
    try:
        asked = (
            pattern
            if isinstance(pattern, LocalAttention)
            else LocalAttention.model_validate(pattern)
        )
        return Plan(asked.rules(text.layers), source)
    except ValidationError as error:
        raise LocalAttentionError(explain(error)) from error
    except LocalAttentionError:
        raise
    except ValueError as error:
        raise LocalAttentionError(str(error)) from error


def refuse_model(text: _Text, plan: Plan) -> None:
    """Raise where the plan asks for what the model's architecture cannot do."""
    if _read(text.outer, "is_encoder_decoder"):
        raise LocalAttentionError(
            f"Local attention is for decoder-only models, but {text.model_type} has an encoder; "
            "remove local_attention for it."
        )
    if text.get("kv_lora_rank") and plan.local:
        raise LocalAttentionError(
            f"Local attention does not go with multi-head latent attention (MLA), which "
            f"{text.model_type} uses; remove local_attention for it."
        )


def choose_block_size(chunk: int | None, asked: int | None, default: int, step: int) -> int | None:
    """A KV block size, in tokens, that divides the chunk; None where the default serves.

    ``asked`` is the user's, ``default`` the platform's, and kernels take multiples of ``step``.
    """
    if chunk is None:
        return None
    if asked is not None:
        if chunk % asked:
            raise LocalAttentionError(
                f"The KV block size ({asked}) does not divide attention_chunk_size ({chunk}); "
                "choose a block size that does, or leave block_size unset."
            )
        return None
    if chunk % default == 0:
        return None
    for size in range(default - default % step, 0, -step):
        if chunk % size == 0:
            return size
    raise LocalAttentionError(
        f"attention_chunk_size ({chunk}) must be a multiple of {step}, the smallest KV block that "
        "the attention kernels take here."
    )


def advice(
    plan: Plan | None,
    max_model_len: int,
    *,
    max_num_seqs: int | None = None,
    in_flight_tokens: int = 0,
    capacity_tokens: int | None = None,
) -> list[str]:
    """Warnings that are true of a plan, one sentence each.

    ``in_flight_tokens`` is what vLLM reserves beside the window for a running prefill
    (max_num_batched_tokens x concurrent batches); ``capacity_tokens`` is how many tokens of full
    attention the KV cache holds, where known.
    """
    if plan is None or not plan.local:
        return []
    sentences = []
    local = [rule for rule in plan.rules if rule != FULL]
    span = max(rule.span + rule.sinks for rule in local)
    if all(rule.kind == "chunked_attention" for rule in plan.rules):
        reach = len(plan.rules) * span
        sentences.append(
            f"Every layer is chunked, so nothing crosses a chunk boundary at any depth: after "
            f"{span} tokens the model has forgotten all that came before; leave some layers full "
            f"(full_attention_every: 4), or use sliding_window, which reaches about {reach} "
            "tokens back through the layers."
        )
    if span >= max_model_len:
        sentences.append(
            f"The window or chunk ({span} tokens) is not smaller than max_model_len "
            f"({max_model_len}), so it saves nothing; lower it or remove local_attention."
        )
    elif span + in_flight_tokens >= max_model_len:
        sentences.append(
            f"vLLM reserves {span} + {in_flight_tokens} tokens for each request while it is "
            f"prefilled, not fewer than max_model_len ({max_model_len}), so no more requests are "
            "admitted than with full attention; lower max_num_batched_tokens."
        )
    if (
        max_num_seqs is not None
        and capacity_tokens is not None
        and max_num_seqs * max_model_len <= capacity_tokens
    ):
        sentences.append(
            f"max_num_seqs ({max_num_seqs}) x max_model_len ({max_model_len}) fits the KV cache "
            f"({capacity_tokens} tokens) with full attention already, so no memory is gained; "
            "raise max_num_seqs to use what local attention frees."
        )
    return sentences


def refuse_engine(plan: Plan, vllm_config: Any) -> None:
    """Raise where the plan does not go with the engine's other settings."""
    speculative = vllm_config.speculative_config
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    chunked, sinks = plan.chunk is not None, plan.sinks > 0
    what = "chunked attention" if chunked else "attention_sinks"
    if chunked and speculative is not None and speculative.use_eagle():
        raise LocalAttentionError(
            "Speculative decoding by EAGLE does not go with chunked attention; use sliding_window, "
            "or another method of speculation (ngram)."
        )
    if not (chunked or sinks):
        return
    if (
        parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    ):
        raise LocalAttentionError(
            f"Context parallelism splits a sequence over GPUs, which {what} does not support; "
            "set decode_context_parallel_size and prefill_context_parallel_size to 1."
        )
    if cache.kv_cache_dtype_skip_layers:
        raise LocalAttentionError(
            f"kv_cache_dtype_skip_layers does not go with {what}; leave it empty, or use "
            "sliding_window without sinks."
        )
    if "int4" in str(cache.cache_dtype):
        raise LocalAttentionError(
            f"The int4 KV cache's kernel has no mask for {what}; choose another kv_cache_dtype, "
            "such as fp8."
        )
    if sinks and vllm_config.kv_transfer_config is not None:
        raise LocalAttentionError(
            "A KV connector would not load the sink tokens' blocks; remove attention_sinks or "
            "kv_transfer_config."
        )
    if vllm_config.model_config.is_mm_prefix_lm:
        raise LocalAttentionError(
            f"A prefix-LM sees its images both ways, which {what} does not support; use "
            "sliding_window without sinks."
        )
