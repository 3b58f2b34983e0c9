"""Models without weights, for ``load_format: dummy``: a shape and a tokenizer.

The tokenizer is the demo model's, one byte a token, with a name for every further id, so that
whatever a random model answers is text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_app.demo import model as demo

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "bos_token_id": demo.BOS,
    "eos_token_id": demo.EOS,
}
# Llama 3.1's shapes.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000,
    "torch_dtype": "bfloat16",
    "bos_token_id": demo.BOS,
    "eos_token_id": demo.EOS,
}
LLAMA_70B = LLAMA_8B | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}
ONE_GPU = {"0.6b": QWEN3_06B, "8b": LLAMA_8B}  # those that one holds, by their names in commands
# Qwen3's shape with less of everything, to try a measurement out where there is no GPU.
TINY = QWEN3_06B | {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def build(directory: Path, shape: dict[str, Any]) -> None:
    """Write ``config.json`` and the tokenizer's files into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    demo.write_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    named = {*vocabulary.values(), *(each["id"] for each in tokenizer["added_tokens"])}
    for number in set(range(shape["vocab_size"])) - named:
        vocabulary[f"<{number}>"] = number
    path.write_text(json.dumps(tokenizer))
    path = directory / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "model_max_length": 2**20}
    path.write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(shape, indent=1))


def model_for(device: str, out: Path, shape: dict[str, Any] = QWEN3_06B) -> str:
    """A directory below ``out`` with the model that a device measures: the demo model on a CPU, one
    of this ``shape`` on a GPU."""
    directory = (out / f"{device}-model").resolve()
    if device == "gpu":
        build(directory, shape)
    else:
        demo.build(directory)
    return str(directory)
