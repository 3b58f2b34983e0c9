"""The demo model: a Llama-shaped, byte-level model of 1.3 MB, written out without a network.

It was trained (``train``) to answer questions about codes in its context; ``weights/`` has it, a
variant for each pattern that it was trained with, and the model card. Every UTF-8 byte is one token
whose id is the byte, so a prompt's token count can be checked by eye. The shape holds what real
models hold (grouped-query attention, rotary positions, layers to mix local and full attention in,
two KV heads for tensor parallelism of 2), so that the demonstration runs the paths that a large
model runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.demo.shape import EPSILON, PATTERNS, Shape, rules_of
from serve_app.errors import ConfigError

if TYPE_CHECKING:
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

TRAINED = ("full", "sliding", "chunked-3-1")  # the weights in the package
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


def build(directory: Path, attention: str = "full") -> None:
    """Write the model trained with ``attention``, one of ``TRAINED``, over an earlier one.

    ``config.json`` is written last, so that a directory that has it is whole. Raises
    ``ConfigError`` when the directory holds files that are not the demo model's.
    """
    if attention not in TRAINED:
        names = ", ".join(TRAINED)
        raise ConfigError(f"There is no demo model trained with {attention}; there are {names}.")
    weights = resources.files("serve_app.demo") / "weights"
    data = (weights / f"{attention}.safetensors").read_bytes()
    report = json.loads((weights / f"{attention}.json").read_text(encoding="utf-8"))
    write(directory, config(Shape(), attention), data, report)


def write(
    directory: Path, config: Mapping[str, Any], weights: bytes, report: Mapping[str, Any]
) -> None:
    """Write a model of this vocabulary into ``directory``, with the tokenizer; see ``build``.

    ``weights`` is a safetensors file, ``report`` how it was trained.
    """
    directory = Path(directory)
    _refuse_strangers(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    write_tokenizer(directory)
    (directory / "model.safetensors").write_bytes(weights)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_json(directory / "report.json", report)
    _write_json(directory / "config.json", config)


def config(shape: Shape, attention: str) -> dict[str, Any]:
    """``config.json`` in the terms of ``transformers``; a model trained with local attention says
    so, and is served so."""
    result: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if pattern := PATTERNS.get(attention):
        spans = {key: span for key, span in pattern.items() if key != "full_attention_every"}
        result |= spans | {"layer_types": [rule.kind for rule in rules_of(shape, attention)]}
    return result


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
