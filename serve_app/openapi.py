"""What the OpenAPI document says of a completion's body: the fields that the gateway itself reads.

Everything else that vLLM takes is taken too; its own document names it.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean", "default": False},
    "max_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "prompt_cache_key": {"type": "string", "description": "Requests that share a prefix."},
}
_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string", "minLength": 1}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "minLength": 1, "maxLength": 64},
        "content": {"type": ["string", "array", "null"]},
    },
}
_HEADERS = {
    "x-priority": {"type": "string", "enum": ["interactive", "batch"]},
    "x-deadline-ms": {"type": "string", "pattern": r"^[0-9]{1,9}$"},
    "x-session-id": {"type": "string"},
    "x-request-id": {"type": "string"},
}


def completion(prompt: str) -> dict[str, Any]:
    """The ``openapi_extra`` of a route whose prompt is under the key ``messages`` or ``prompt``."""
    prompts = {
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "prompt": {
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "items": _TEXT},
                {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
            ]
        },
    }
    schema = {
        "type": "object",
        "required": ["model", prompt],
        "properties": {**_COMMON, prompt: prompts[prompt]},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "parameters": [
            {"name": name, "in": "header", "required": False, "schema": schema}
            for name, schema in _HEADERS.items()
        ],
    }
