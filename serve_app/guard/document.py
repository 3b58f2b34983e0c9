"""A body as JSON: parsed once, and refused where it is too deep, too large or ambiguous."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from serve_app.guard.limits import Limits, printable, refuse, show

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRUCTURE = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes


def parse_object(raw: bytes, limits: Limits) -> dict[str, Any]:
    """The object that ``raw`` holds. Raises ``InvalidRequest``."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(None, f"The body is not valid UTF-8 at byte {error.start}.")
    check_shape(raw, limits)
    body = parse(text)
    if not isinstance(body, dict):
        refuse(None, f"The body must be a JSON object, but is {show(body)}.")
    if _SURROGATE.search(raw):
        for key, value in body.items():
            _check_surrogates(key, value)
    return body


def parse(text: str) -> Any:
    """Any JSON. Raises ``InvalidRequest``, also where a key comes twice in one object."""
    try:
        return json.loads(
            text,
            parse_float=_finite,
            parse_constant=_no_constant,
            object_pairs_hook=_distinct,
        )
    except json.JSONDecodeError as error:
        refuse(None, f"The JSON is not valid at character {error.pos}: {error.msg}.")
    except ValueError:  # Python's own limit on the digits of a number
        refuse(None, "The JSON has a whole number of more than 4300 digits.")


def check_shape(raw: bytes, limits: Limits) -> None:
    """Depth and counts, without parsing: every pass runs in C and is linear in the body.

    Raises ``InvalidRequest``.
    """
    if _is_plain(raw, limits):
        return
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    if (strings := bare.count(b'"') // 2) > limits.strings:
        refuse(None, f"The JSON has {strings} strings, but the limit is {limits.strings}.")
    outside = b"".join(bare.split(b'"')[::2])
    if (values := outside.count(b",") + 1) > limits.values:
        refuse(None, f"The JSON has {values} values, but the limit is {limits.values}.")
    brackets = outside.translate(_STEPS, _STRUCTURE)
    if (containers := (len(brackets) + 1) // 2) > limits.containers:
        refuse(
            None,
            f"The JSON has {containers} objects and lists, but the limit is {limits.containers}.",
        )
    depth = 0
    for step in memoryview(brackets).cast("b"):
        depth += step
        if depth > limits.depth:
            refuse(None, f"The JSON is nested deeper than the limit of {limits.depth} levels.")


def _is_plain(raw: bytes, limits: Limits) -> bool:
    """Whether no limit could be passed even if all marks inside of texts counted."""
    return (
        raw.count(b"[") + raw.count(b"{") <= min(limits.depth, limits.containers)
        and raw.count(b'"') // 2 <= limits.strings
        and raw.count(b",") < limits.values
    )


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        refuse(None, "The JSON has a number that is too large for a float.")
    return value


def _no_constant(name: str) -> NoReturn:
    refuse(None, f"The JSON has the value {name}, which is not JSON.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. A key that comes twice could mean one thing here and another to the engine."""
    value = dict(pairs)
    if len(value) != len(pairs):
        key = printable(Counter(key for key, _ in pairs).most_common(1)[0][0])
        refuse(key, f"The key {key} comes twice in one object.")
    return value


def _check_surrogates(key: str, value: Any) -> None:
    for text in (key, *_texts(value)):
        try:
            text.encode()
        except UnicodeEncodeError:
            name = printable(key)
            refuse(name, f"The key {name} holds half of a surrogate pair, which is not text.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
