"""How much memory a sequence takes under a plan.

Pure arithmetic, no vLLM. It follows what vLLM 0.32 does with the KV cache, and
``tests/test_capacity.py`` holds every figure against vLLM's own:

1. Each layer on each GPU stores one key and one value vector for a token and KV head, in pages of
   ``block_size`` tokens.
2. Layers with the same rule form groups of equal size; every group takes blocks from one pool, and
   a block has a page for each layer of the largest group. Groups that do not divide evenly are
   padded, and the padding is paid for.
3. While a sequence decodes, a windowed layer *holds* the blocks of its window (and sinks), a
   chunked layer those of its chunk, a full layer all.
4. While a prompt is prefilled, blocks behind the window are freed a step late, so vLLM *reserves*
   ``span + max_num_batched_tokens x concurrent batches`` tokens, where that is less than
   ``max_model_len``. Its "Maximum concurrency" is counted in reservations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from serve_app.pattern import FULL, LayerRule

GIB = 2**30

# Bytes that vLLM needs beside weights, activations and KV cache: CUDA context, graphs, workspaces.
_FIXED_BYTES = GIB
_KV_DTYPE_BYTES = {
    "auto": 2,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,  # where the model itself runs in float32
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
# Families whose MLP has no gate, and families that tie embeddings where config.json is silent.
_UNGATED = ("bloom", "falcon", "gpt", "mpt", "nemotron", "opt", "phi", "starcoder2")
_GATED = ("gpt_oss", "phi3", "phi4", "phimoe")
_TIED = ("bloom", "cohere", "falcon", "gemma", "gpt2", "gpt_bigcode", "opt", "starcoder2")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What config.json says of a decoder's size. ``experts`` is 0 for a dense model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3
    tied: bool = False
    experts: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    dense_layers: int = 0  # of a model with experts: the layers that have none
    weight_bits: float = 16  # of linear layers; embeddings keep 16

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape of the text model in ``config``, the contents of a config.json.

        Raises ``KeyError`` with the name of a key that is needed and missing.
        """
        text = {**config, **(config.get("text_config") or {})}

        def first(*names: str, default: int | None = None) -> int:
            for name in names:
                if isinstance(value := text.get(name), int) and value > 0:
                    return value
            if default is None:
                raise KeyError(names[0])
            return default

        kind = str(text.get("model_type", ""))
        hidden = first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head", "n_heads")
        inner = first("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
        experts = first("num_experts", "num_local_experts", "n_routed_experts", default=0)
        expert_inner = first("moe_intermediate_size", default=inner) if experts else 0
        shared = first("n_shared_experts", default=0) * expert_inner
        return cls(
            layers=first("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=first("num_key_value_heads", "n_head_kv", "num_kv_heads", default=heads),
            head_dim=first("head_dim", default=hidden // heads),
            intermediate=inner,
            vocab=first("vocab_size"),
            mlp_matrices=2 if kind.startswith(_UNGATED) and not kind.startswith(_GATED) else 3,
            tied=bool(text.get("tie_word_embeddings", kind.startswith(_TIED))),
            experts=experts,
            expert_intermediate=expert_inner,
            shared_intermediate=first("shared_expert_intermediate_size", default=shared),
            dense_layers=first("first_k_dense_replace", default=0) if experts else 0,
            weight_bits=_weight_bits(config),
        )

    def parameters(self) -> int:
        """Parameters, without biases."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        norms = (2 * self.layers + 1) * self.hidden
        return embeddings + norms + self._linear_parameters()

    def weight_bytes(self, gpus: int = 1) -> int:
        """Bytes of weights on each of ``gpus``. vLLM serves float32 checkpoints in 16 bits."""
        linear = self._linear_parameters()
        rest = self.parameters() - linear
        return round((linear * self.weight_bits / 8 + rest * 2) / gpus)

    def kv_token_bytes(self, kv_cache_dtype: str = "auto", tensor_parallel: int = 1) -> int:
        """Bytes of KV cache that one token takes in one layer on one GPU.

        ``auto`` is 16 bits. Where there are fewer KV heads than GPUs, heads are replicated.
        """
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * heads * self.head_dim * kv_dtype_bytes(kv_cache_dtype)

    def _linear_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        dense = self.mlp_matrices * self.hidden * self.intermediate
        sparse = self.hidden * (
            self.experts
            + self.mlp_matrices * self.experts * self.expert_intermediate
            + self.mlp_matrices * self.shared_intermediate
        )
        dense_layers = self.dense_layers if self.experts else self.layers
        mlps = dense * dense_layers + sparse * (self.layers - dense_layers)
        return attention * self.layers + mlps


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Those of vLLM's arguments that decide memory; lengths are tokens.

    ``concurrent_batches`` is 2 with async scheduling (vLLM's default) and 1 without, plus one for
    each further pipeline stage. ``hybrid`` says whether the hybrid KV cache manager is on.
    """

    max_model_len: int
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_size: int = 16
    concurrent_batches: int = 2
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    hybrid: bool = True

    @property
    def in_flight_tokens(self) -> int:
        """Tokens that may be scheduled but not settled, vLLM's ``max_in_flight_tokens``."""
        return self.concurrent_batches * self.max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table. ``layers`` is the most that one block has pages for."""

    rule: LayerRule
    layers: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits a KV cache of a given size. ``decoding`` counts sequences of ``length`` tokens."""

    length: int
    blocks: int
    block_bytes: int  # of one block, all layers of the largest group
    request_blocks: int  # reserved for one request of max_model_len
    held_blocks: int  # held by one sequence of ``length`` tokens while it decodes
    concurrency: float  # vLLM's "Maximum concurrency", in requests of max_model_len
    decoding: int  # sequences that decode together, the last one just prefilled


def kv_dtype_bytes(kv_cache_dtype: str) -> int:
    """Bytes of one number in the KV cache. Raises ``ValueError`` for a type not counted here."""
    if kv_cache_dtype not in _KV_DTYPE_BYTES:
        known = ", ".join(_KV_DTYPE_BYTES)
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}, but it must be one of {known}.")
    return _KV_DTYPE_BYTES[kv_cache_dtype]


def held_blocks(rule: LayerRule, length: int, block_size: int) -> int:
    """The most blocks that a decoding sequence of up to ``length`` tokens holds in one layer."""
    whole = _blocks(length, block_size)
    if rule.kind == "full_attention":
        return whole
    if rule.kind == "chunked_attention":
        return min(whole, _blocks(rule.span, block_size))
    window = _blocks(rule.span - 1, block_size) + 1  # it may begin and end inside a block
    return min(whole, window + _blocks(rule.sinks, block_size))


def reserved_blocks(rule: LayerRule, engine: EngineShape) -> int:
    """Blocks that vLLM reserves in one layer for a request of ``max_model_len`` tokens."""
    limit = engine.max_model_len
    if rule.kind == "full_attention":
        return _blocks(limit, engine.block_size)
    if rule.kind == "chunked_attention":
        tokens = min(rule.span + engine.in_flight_tokens, limit)
        return _blocks(tokens, engine.block_size)
    tokens = min(rule.span - 1 + engine.in_flight_tokens, limit)
    window = _blocks(tokens, engine.block_size) + 1  # it may begin inside a block
    sinks = _blocks(rule.sinks, engine.block_size)
    return min(window + sinks, _blocks(limit, engine.block_size) + 1)


def cache_groups(rules: Sequence[LayerRule], hybrid: bool = True) -> tuple[Group, ...]:
    """The groups that vLLM makes of the layers.

    Without the hybrid manager, a mix of kinds is held as full attention in every layer.
    """
    counts = Counter(rules)
    if len(counts) > 1 and not hybrid:
        counts = Counter({FULL: len(rules)})
    least, most = min(counts.values()), max(counts.values())
    # The smallest kind sets the size, unless padding it to the largest wastes less.
    size = most if most < 1.5 * least else least
    groups = []
    for rule, count in counts.items():
        number = _ceil(count, size)
        groups += [Group(rule, _ceil(count - i, number)) for i in range(number)]
    return tuple(groups)


def capacity(
    rules: Sequence[LayerRule],
    model: ModelShape,
    engine: EngineShape,
    kv_bytes: int,
    length: int | None = None,
) -> Capacity:
    """What fits ``kv_bytes`` of KV cache on each GPU; ``length`` defaults to the longest."""
    length = engine.max_model_len if length is None else length
    groups = cache_groups(rules, engine.hybrid)
    token_bytes = model.kv_token_bytes(engine.kv_cache_dtype, engine.tensor_parallel)
    pages = _ceil(max(group.layers for group in groups), engine.pipeline_parallel)
    block_bytes = pages * engine.block_size * token_bytes
    blocks = max(0, kv_bytes) // block_bytes
    reserved = [reserved_blocks(group.rule, engine) for group in groups]
    held = sum(held_blocks(group.rule, length, engine.block_size) for group in groups)
    # A new sequence needs its prefill's blocks at once; after that it holds what it sees.
    arrival = sum(min(r, _blocks(length, engine.block_size)) for r in reserved)
    return Capacity(
        length=length,
        blocks=blocks,
        block_bytes=block_bytes,
        request_blocks=sum(reserved),
        held_blocks=held,
        concurrency=blocks / sum(reserved),
        decoding=_decoding(blocks - 1, sum(reserved), max(arrival, held), held),
    )


def _decoding(usable: int, reserved: int, arrival: int, held: int) -> int:
    """``usable`` leaves out the one block that vLLM never writes."""
    if usable < max(reserved, arrival):  # vLLM does not start, or the sequence never runs
        return 0
    return 1 + (usable - arrival) // held


def kv_bytes(
    rules: Sequence[LayerRule], model: ModelShape, engine: EngineShape, length: int
) -> int:
    """Bytes of KV cache, on one GPU, that a sequence of ``length`` tokens holds as it decodes.

    Whole blocks, without the padding of uneven groups: the need of the plan itself.
    """
    token_bytes = model.kv_token_bytes(engine.kv_cache_dtype, engine.tensor_parallel)
    blocks = sum(
        count * held_blocks(rule, length, engine.block_size)
        for rule, count in Counter(rules).items()
    )
    return blocks * engine.block_size * token_bytes


def kv_budget(model: ModelShape, engine: EngineShape, gpu_bytes: int) -> int:
    """Bytes that remain for the KV cache on one GPU; negative where the weights do not fit.

    An estimate: vLLM measures activations by running the model, here they are the widest MLP
    step of ``max_num_batched_tokens`` tokens and the logits of ``max_num_seqs`` sequences, with
    1 GiB for everything else.
    """
    width = 4 * model.hidden + 3 * max(
        model.intermediate if not model.experts else 0,
        model.expert_intermediate,
        model.shared_intermediate,
    )
    step = 2 * engine.max_num_batched_tokens * width
    logits = 8 * engine.max_num_seqs * model.vocab
    activations = (step + logits) // engine.tensor_parallel
    requested = int(gpu_bytes * engine.gpu_memory_utilization)
    weights = model.weight_bytes(engine.tensor_parallel * engine.pipeline_parallel)
    return requested - weights - activations - _FIXED_BYTES


def kv_tokens(rules: Sequence[LayerRule], length: int) -> float:
    """Tokens of KV cache that a sequence of ``length`` tokens needs, averaged over the layers."""
    counts = Counter(rules)
    return sum(n * rule.visible(length) for rule, n in counts.items()) / len(rules)


def _weight_bits(config: Mapping[str, Any]) -> float:
    """Bits of a linear weight, from ``quantization_config``; 16 where there is none."""
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    method = str(quantization.get("quant_method", ""))
    if not quantization:
        return 16
    if isinstance(bits := quantization.get("bits"), int):
        return bits
    for group in (quantization.get("config_groups") or {}).values():
        if isinstance(bits := (group.get("weights") or {}).get("num_bits"), int):
            return bits
    if method == "mxfp4":
        return 4.25  # with one scale for each 32 weights
    if quantization.get("load_in_4bit") or "fp4" in method:
        return 4
    return 8


def _blocks(tokens: int, block_size: int) -> int:
    return _ceil(tokens, block_size)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
