"""A Llama-shaped, byte-level model of under 3 MB, made in seconds without a network.

Every UTF-8 byte is one token whose id is the byte, so a prompt's token count can be checked by
eye. The shape holds what real models hold (grouped-query attention, rotary positions, enough
layers to mix local and full attention, two KV heads for tensor parallelism of 2), so that the
demonstration runs the paths that a large model runs. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BYTES = 256
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|reserved|>",
)
BOS, EOS, PAD = range(BYTES, BYTES + 3)

LAYERS = 8
HIDDEN = 128
INTERMEDIATE = 256
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
VOCABULARY = BYTES + len(SPECIAL_TOKENS)
MAX_LENGTH = 8192  # tokens, prompt plus output

# A Unicode noncharacter, put after the "<" of every "<|" in a message and taken out again by the
# tokenizer's normalizer, which runs after special tokens are matched. So "<|user|>" typed by a
# user is eight plain bytes and never a turn of the conversation.
_GUARD = "\ufdd0"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('The role ' + message['role'] + ' is not one of system, user, assistant,"
    " tool.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{{ (message['content'] or '') | replace('<|', '<" + _GUARD + "|') }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(directory: Path, seed: int = 0) -> None:
    """Write the model into ``directory``, over an earlier one.

    ``config.json`` is written last, so that a directory that has it is whole. Raises
    ``ConfigError`` when the directory holds files that are not the demo model's.
    """
    write(directory, config(), weights(seed))


def write(directory: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Write a model of this vocabulary into ``directory``, with the tokenizer; see ``build``."""
    from safetensors.torch import save

    directory = Path(directory)
    _refuse_strangers(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    write_tokenizer(directory)
    data = save(dict(weights), metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(data)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_json(directory / "config.json", config)


def config() -> dict[str, Any]:
    """The model's shape in the terms of ``transformers``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Untrained weights in bfloat16, named as in ``transformers``' Llama.

    Each projection keeps its input's scale (standard deviation ``1 / sqrt(fan_in)``), so that
    attention weighs in what comes out. Only printable ASCII has an output row; the other tokens'
    logits are zero, which is far below the best, so even an untrained model writes readable text.
    """
    import torch

    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's is not.
    random = np.random.RandomState(seed)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = random.standard_normal((rows, columns)) * (scale / np.sqrt(columns))
        return torch.from_numpy(values).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, np.sqrt(HIDDEN))}
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            layer + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            layer + "post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            layer + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            layer + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            layer + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
        }
    output = normal(VOCABULARY, HIDDEN, scale=4.0)
    output[: ord(" ")] = 0
    output[ord("~") + 1 :] = 0
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = output
    return tensors


def write_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template in it."""
    tokenizer().save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "pad_token": SPECIAL_TOKENS[2],
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def tokenizer() -> Tokenizer:
    """Bytes to ids and back: a byte-level BPE with no merges, after ``<|bos|>``."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    result = Tokenizer(models.BPE(vocab=_byte_names(), merges=[]))
    result.normalizer = normalizers.Replace(f"<{_GUARD}|", "<|")
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    result.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return result


def _byte_names() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(BYTES + index) for index, byte in enumerate(others)}
    return {names[byte]: byte for byte in range(BYTES)}


def _refuse_strangers(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file; the demo model needs a directory.")
    ours = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    strangers = sorted({path.name for path in directory.iterdir()} - ours)
    if strangers:
        raise ConfigError(
            f"{directory} holds {strangers[0]}, which is not the demo model's; "
            "name a new or an empty directory."
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
