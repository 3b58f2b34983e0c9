"""Tiny checkpoints with random weights: one of each family that local attention must serve.

Each is a real Hugging Face directory (config, float32 safetensors, byte-level tokenizer with a
chat template), written in well under a second. Weights are seeded, and large enough that
attention decides the answer: a window that is wrong by one token moves logprobs by far more than
float32 noise does (``test_reference.py`` holds both).

Every model has :data:`LAYERS` layers, hidden size :data:`HIDDEN`, 4 query heads of size 32 and
(but for GPT-NeoX and Phi, which are multi-head) 2 KV heads. Token ids 0 to 255 are the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS = 4
HIDDEN = 128
VOCAB = 320
BOS, EOS, PAD = 256, 257, 258

_SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}


def _llama(**overrides: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**{**_GROUPED, **overrides})


def _qwen3(**overrides: Any) -> transformers.PreTrainedConfig:
    return transformers.Qwen3Config(**{**_GROUPED, "head_dim": 32, **overrides})


def _gemma2(**overrides: Any) -> transformers.PreTrainedConfig:
    own = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512}
    return transformers.Gemma2Config(**{**_GROUPED, **own, **overrides})


def _gemma3(**overrides: Any) -> transformers.PreTrainedConfig:
    own = {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
    }
    return transformers.Gemma3TextConfig(**{**_GROUPED, **own, **overrides})


def _mistral(**overrides: Any) -> transformers.PreTrainedConfig:
    return transformers.MistralConfig(**{**_GROUPED, "sliding_window": None, **overrides})


def _phi3(**overrides: Any) -> transformers.PreTrainedConfig:
    own = {"sliding_window": None, "original_max_position_embeddings": 4096}
    return transformers.Phi3Config(**{**_GROUPED, **own, **overrides})


def _phi(**overrides: Any) -> transformers.PreTrainedConfig:
    return transformers.PhiConfig(**{**_SHAPE, **overrides})


def _gpt_neox(**overrides: Any) -> transformers.PreTrainedConfig:
    return transformers.GPTNeoXConfig(**{**_SHAPE, **overrides})


def _llama4(**overrides: Any) -> transformers.PreTrainedConfig:
    own = {
        "head_dim": 32,
        "intermediate_size_mlp": 2 * HIDDEN,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
        "use_qk_norm": False,
    }
    return transformers.Llama4TextConfig(**{**_GROUPED, **own, **overrides})


ZOO: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "phi3": _phi3,
    "phi": _phi,
    "gpt_neox": _gpt_neox,
}
_FAMILIES = {**ZOO, "llama4": _llama4}  # the reference does not know its experts and its own chunks


def write_model(name: str, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the checkpoint ``name`` to ``directory`` and return the directory.

    Names are those of :data:`ZOO`, and ``llama4``. ``overrides`` replace keys of
    the configuration, such as ``num_hidden_layers``, ``sliding_window`` or ``layer_types``.
    """
    config = _FAMILIES[name](**overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, zlib.crc32(f"{name} {seed}".encode()))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of :data:`VOCAB` ids that turns every UTF-8 byte into one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<s>", "</s>", "<pad>"]
    words += [f"<extra_{index}>" for index in range(VOCAB - len(words))]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(directory)


def _fill(model: transformers.PreTrainedModel, seed: int) -> None:
    """Matrices of spread 1.5 / sqrt(columns), so that attention is peaked but not one-hot.

    With tied embeddings (Gemma's, whose norms multiply by 1 + weight) every greedy token would
    repeat the one before it; random signs in the last norm untie them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                spread = 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif name == "model.norm.weight" and model.config.tie_word_embeddings:
                parameter.copy_(torch.randint(0, 2, parameter.shape, generator=generator) * -2.0)
