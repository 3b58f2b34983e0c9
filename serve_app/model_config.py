"""What a model's config.json says, without loading the model, torch or vLLM.

What vLLM can run is read from the source of the installed vLLM, because importing it takes
seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from serve_app.capacity import ModelShape
from serve_app.errors import ConfigError
from serve_app.pattern import FULL, LayerRule

# Families whose config.json leaves the order of local and full layers to the code: every n-th
# layer is full.
_NATIVE_PERIODS = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n": 5,
    "gemma3n_text": 5,
    "gpt_oss": 2,
    "llama4": 4,
    "llama4_text": 4,
    "olmo3": 4,
}
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_LOCAL_TYPES = ("sliding_attention", "chunked_attention")
_ATTENTION_TYPES = ("full_attention", "attention", *_LOCAL_TYPES)
_WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv")


@dataclass(frozen=True, slots=True)
class Support:
    """Whether vLLM runs an architecture with local attention; ``None`` is for perhaps."""

    supported: bool | None
    sentence: str


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The contents of a config.json. ``text`` is the language model's part of it."""

    raw: Mapping[str, Any]

    @property
    def text(self) -> dict[str, Any]:
        return {**self.raw, **(self.raw.get("text_config") or {})}

    @property
    def architecture(self) -> str:
        names = self.raw.get("architectures") or [self.raw.get("model_type") or "unknown"]
        return str(names[0])

    @property
    def shape(self) -> ModelShape:
        """Raises ``ConfigError`` where config.json lacks a size."""
        try:
            return ModelShape.from_config(self.raw)
        except KeyError as error:
            raise ConfigError(
                f"The config.json of {self.architecture} does not give {error.args[0]}."
            ) from error

    @property
    def longest(self) -> int | None:
        """Positions that the model was made for, where config.json says it."""
        found = (self.text.get(key) for key in _LENGTH_KEYS)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    @property
    def scaled(self) -> bool:
        """Whether RoPE is scaled, so that vLLM may take more than :attr:`longest`."""
        rope = self.text.get("rope_scaling") or self.text.get("rope_parameters") or {}
        return "factor" in rope

    def overridden(self, overrides: Mapping[str, Any]) -> ModelConfig:
        """With vLLM's ``hf_overrides`` laid over it, over a nested text_config as well."""
        merged = {**self.raw, **overrides}
        if inner := self.raw.get("text_config"):
            outer = {key: value for key, value in overrides.items() if key in inner}
            nested = overrides.get("text_config") or {}
            merged["text_config"] = {**inner, **outer, **nested}
        return ModelConfig(merged)

    def attention_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is attention (and not linear, state space or the like)."""
        text, layers = self.text, self.shape.layers
        types = text.get("layer_types") or text.get("layers_block_type")
        if types and len(types) == layers:
            return tuple(str(name) in _ATTENTION_TYPES for name in types)
        # Of models whose other layers are linear.
        every = text.get("full_attention_interval")
        return tuple(not isinstance(every, int) or (i + 1) % every == 0 for i in range(layers))

    def native_rules(self) -> tuple[LayerRule, ...]:
        """The rule of each layer where no plan is in force: the model's own attention in vLLM."""
        text, layers = self.text, self.shape.layers
        kind = str(text.get("model_type", ""))
        local = FULL
        if kind.startswith("llama4") and (chunk := text.get("attention_chunk_size")):
            local = LayerRule("chunked_attention", chunk)
        elif (window := text.get("sliding_window")) and text.get("use_sliding_window") is not False:
            local = LayerRule("sliding_attention", window)
        if types := text.get("layer_types"):
            return tuple(local if str(name) in _LOCAL_TYPES else FULL for name in types)
        pattern = text.get("sliding_window_pattern")
        every = pattern if isinstance(pattern, int) else _NATIVE_PERIODS.get(kind, layers + 1)
        return tuple(FULL if (index + 1) % every == 0 else local for index in range(layers))

    def support(self) -> Support:
        """Whether vLLM runs this model with local attention, by its architecture."""
        name = self.architecture
        if self.raw.get("is_encoder_decoder"):
            return Support(
                False, f"{name} has an encoder; local attention is for decoder-only models."
            )
        if self.text.get("kv_lora_rank"):
            return Support(
                False,
                f"{name} uses multi-head latent attention (MLA), which local attention does not "
                "go with.",
            )
        if self.text.get("model_type") in _WITHOUT_ATTENTION or not any(self.attention_layers()):
            return Support(False, f"{name} has no attention layers.")
        return _listed(name)


def read_model_config(model: str) -> ModelConfig:
    """config.json of a directory, of a file, or of a name on the Hugging Face hub.

    Raises ``ConfigError``.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file() and not model.startswith((".", "/")):
        path = _from_hub(model)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; name a model directory or a model.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold one JSON object.")
    return ModelConfig(raw)


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{model} is no directory here, and its config.json could not be had from the hub; "
            "give the path of a directory that holds config.json."
        ) from error


def _listed(name: str) -> Support:
    tables = vllm_architectures()
    if not tables:
        return Support(None, "vLLM is not installed here, so its list of models is not known.")
    if name in tables["_TEXT_GENERATION_MODELS"] | tables["_MULTIMODAL_MODELS"]:
        return Support(True, f"vLLM has a model file for {name}.")
    if name in tables["_TRANSFORMERS_SUPPORTED_MODELS"]:
        return Support(True, f"vLLM runs {name} through its Transformers backend.")
    if any(name in table for table in tables.values()):
        return Support(False, f"{name} does not generate text in vLLM.")
    return Support(
        None,
        f"vLLM does not list {name}; its Transformers backend may run it, which starting it tells.",
    )


@cache
def vllm_architectures() -> dict[str, frozenset[str]]:
    """The architectures in each table of the installed vLLM's registry, by the table's name.

    Empty where vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    source = Path(spec.submodule_search_locations[0]) / "model_executor/models/registry.py"
    tables = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Dict)
        ):
            names = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            tables[node.targets[0].id] = frozenset(str(name) for name in names)
    return tables
