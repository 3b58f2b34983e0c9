"""The largest values that a request may have, and the sentences in which others are refused.

Texts of a request are never repeated in a sentence: a value is shown by its kind and its length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from serve_app.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest values that are taken. Lengths of texts are characters."""

    # As a field of the configuration: an unknown key is refused, not ignored.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    # the document
    depth: int = 64
    strings: int = 100_000
    containers: int = 100_000  # objects and lists
    values: int = 2_000_000  # all values; a prompt of token ids has many
    # what is asked for
    messages: int = 2048
    prompts: int = 256
    sequences: int = 64  # n for all prompts of a request together
    n: int = 16
    output_tokens: int = 2**20
    logprobs: int = 20  # vLLM's own default
    stops: int = 4  # vLLM's own
    stop_length: int = 256
    logit_bias: int = 1024
    token_ids: int = 1024  # stop_token_ids, allowed_token_ids, logprob_token_ids
    bad_words: int = 128
    name_length: int = 1024  # model, user, and other names
    # what is compiled
    tools: int = 128
    choices: int = 1024
    regex_length: int = 1024
    regex_states: int = 10_000  # after its repetitions are written out
    grammar_length: int = 16_384
    repeats: int = 1000  # of one repetition in a grammar
    schema_length: int = 262_144  # of all tools together, too
    schema_nodes: int = 20_000
    schema_states: int = 100_000  # after its lengths and counts are written out
    # off by default
    chat_template: bool = False
    chat_template_kwargs: frozenset[str] = frozenset()  # the names that are taken


def show(value: Any) -> str:
    """A value in words, without the texts of a request."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)} items"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a whole number of more than 18 digits"
    return json.dumps(value)


def show_text(text: str) -> str:
    """The beginning of a key or of a repetition in a grammar, for a message."""
    return text if len(text) <= 32 else text[:32] + "..."


def printable(key: str) -> str:
    """A key of the request, fit for a message."""
    return show_text(key).encode("ascii", "backslashreplace").decode()


def refuse_length(where: str, length: int, limit: int) -> NoReturn:
    """Raise ``InvalidRequest`` for a text of too many characters."""
    refuse(where, f"The key {where} has {length} characters, but the limit is {limit}.")


def refuse(param: str | None, message: str) -> NoReturn:
    """Raise ``InvalidRequest`` with a full sentence; ``param`` is the key at fault."""
    raise InvalidRequest(message, param=param)
