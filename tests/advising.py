"""Llama 3.1 8B's shape, and the commands `check` and `plan` that are asked about it."""

from __future__ import annotations

from typing import Any

import typer
from typer.testing import CliRunner, Result

from serve_app.advice import check_command
from serve_app.model_config import ModelConfig
from serve_app.proposal import plan_command

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def config_of(**keys: Any) -> ModelConfig:
    return ModelConfig({**LLAMA_8B, **keys})


def invoke(*words: str) -> Result:
    app = typer.Typer()
    app.command("check")(check_command)
    app.command("plan")(plan_command)
    return CliRunner().invoke(app, words)
