"""What ``local-attention quality`` is to measure: the plans of a grid, and one engine's job.

Pure. A plan is the dictionary that goes under ``local_attention`` in a pool's file, ``None`` for
the model as it is; its name says it in a table and in a picture: ``window 256+64, 1/4 full`` sees
the last 256 and the first 64 tokens, and every 4th layer sees all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from pydantic import ValidationError

from serve_app.config import explain
from serve_app.errors import ConfigError
from serve_app.pattern import LocalAttention

FULL_NAME = "full"
OWN_NAME = "as it is"  # the reference, where the model has local layers of its own
ANSWER_TOKENS = 48
SHORTEST = 128  # tokens of a context that holds a fact among others

_FIRST_BAND = 128
_SMALLEST_DEFAULT = 512
_MOST_LENGTHS = 4

Pattern = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What one engine is to measure; lengths are tokens. ``text`` is a file, or generated.

    ``files`` tells the model's and the text's files from others of the same name.
    """

    model: str
    files: str
    pattern: Pattern | None
    max_model_len: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    questions: int
    sequences: int
    seed: int
    text: str | None
    engine_args: dict[str, Any]


class Band(TypedDict):
    """The mean of tokens at distances ``low`` to ``high`` from the start, in nats a token."""

    low: int
    high: int
    tokens: int
    nats: float


class Answer(TypedDict):
    """One question, the ``tokens`` of its context, at most ``length``, and what was said."""

    length: int
    depth: float
    tokens: int
    right: bool
    said: str


class Result(TypedDict):
    """What one engine measured. ``plan`` is what vLLM ran, in words."""

    plan: str
    block_size: int
    text_tokens: int
    perplexity: list[Band]
    answers: list[Answer]
    continuations: list[list[int]]
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Grid:
    """Plans by name, the reference first, and a sentence for each that is left out."""

    plans: dict[str, Pattern | None]
    left_out: tuple[str, ...]


def make_grid(
    *,
    windows: Sequence[int | None],
    chunks: Sequence[int],
    sinks: Sequence[int],
    full_every: Sequence[int],
    longest: int,
    layers: int,
    reference: str = FULL_NAME,
) -> Grid:
    """Every combination; sinks go with windows only. ``None`` among the windows is the reference,
    which is measured in any case; 0 in ``full_every`` leaves no layer full.

    Raises ``ConfigError`` for a plan that is none, such as a window of 0.
    """
    plans: dict[str, Pattern | None] = {reference: None}
    left_out = []
    for every in sorted({n for n in full_every if n == 1 or n > layers}):
        what = (
            "every layer full: that is full attention"
            if every == 1
            else (f"none of {layers} layers full, as 0 does")
        )
        left_out.append(f"--full-every {every} leaves {what}; left out.")
    periods = [n for n in full_every if n == 0 or 1 < n <= layers]
    for key, span in _spans(windows, chunks):
        if span >= longest:
            left_out.append(
                f"{key} {span} holds all {longest} tokens of the longest sequence: that is full "
                "attention; left out."
            )
            continue
        for first in sinks if key == "sliding_window" else (0,):
            for every in periods:
                asked = {key: span, "attention_sinks": first, "full_attention_every": every or None}
                pattern = _pattern(asked)
                plans[name_of(pattern)] = pattern
    return Grid(plans, tuple(left_out))


def _spans(windows: Sequence[int | None], chunks: Sequence[int]) -> Iterator[tuple[str, int]]:
    yield from (("sliding_window", window) for window in windows if window is not None)
    yield from (("attention_chunk_size", chunk) for chunk in chunks)


def _pattern(asked: dict[str, Any]) -> Pattern:
    try:
        checked = LocalAttention(**asked)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    return checked.model_dump(exclude_none=True, exclude_defaults=True, mode="json")


def name_of(pattern: Pattern) -> str:
    """``window 256+64, 1/4 full``."""
    chunk, sinks = pattern.get("attention_chunk_size"), pattern.get("attention_sinks")
    every = pattern.get("full_attention_every")
    name = f"chunk {chunk}" if chunk else f"window {pattern['sliding_window']}"
    return name + (f"+{sinks}" if sinks else "") + (f", 1/{every} full" if every else "")


def numbers(option: str, text: str, *, full: bool = False) -> list[int | None]:
    """``256,1k`` as numbers; with ``full``, that word as None. Raises ``ConfigError``."""
    values: list[int | None] = []
    for word in text.lower().split(","):
        word = word.strip()
        digits = word.removesuffix("k")
        if full and word == FULL_NAME:
            values.append(None)
        elif digits.isdecimal():
            values.append(int(digits) * (1024 if word.endswith("k") else 1))
        else:
            example = "256,1k,full" if full else "0,64 or 1k"
            raise ConfigError(f"{option} is {text!r}, but it must be numbers such as {example}.")
    return values


def counts(option: str, text: str) -> list[int]:
    """``0,64`` as numbers. Raises ``ConfigError``."""
    return [number for number in numbers(option, text) if number is not None]


def bands(longest: int) -> list[tuple[int, int]]:
    """Distances from the start, doubling: 0-128, 128-256 and so on, up to ``longest``.

    The last is half as wide as its doubling at least, so that its mean says something.
    """
    edges = [0, _FIRST_BAND]
    while 1.5 * edges[-1] < longest:
        edges.append(edges[-1] * 2)
    edges[-1] = longest
    return list(itertools.pairwise(edges))


def context_lengths(text: str | None, max_model_len: int) -> tuple[int, ...]:
    """Contexts to hide facts in; by default the longest that leaves room for an answer, and the
    powers of two below it, four at most. Raises ``ConfigError``.
    """
    room = max_model_len - ANSWER_TOKENS
    if text is None:
        powers = (2**n for n in range(room.bit_length(), 0, -1))
        below = [power for power in powers if _SMALLEST_DEFAULT <= power < room]
        return tuple(reversed([room, *below[: _MOST_LENGTHS - 1]]))
    lengths = tuple(sorted(set(counts("--lengths", text))))
    if min(lengths) < SHORTEST or max(lengths) > room:
        raise ConfigError(
            f"--lengths is {text!r}, but it must be from {SHORTEST} to {room} tokens: "
            f"{ANSWER_TOKENS} of {max_model_len} are for the answer."
        )
    return lengths
