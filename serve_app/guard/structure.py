"""What an engine compiles for a request: schemas, patterns and grammars.

A few characters can ask for a machine of millions of states, which is built on the engine's
processors before the first token. Here it is only counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.guard.document import check_shape, parse
from serve_app.guard.limits import Limits, refuse, refuse_length, show, show_text

_REPEAT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_COUNTED = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def check_structure(body: Mapping[str, Any], limits: Limits) -> None:
    """Check every key of ``body`` that is compiled. Raises ``InvalidRequest``."""
    for key in ("tools", "functions"):
        _check_tools(body.get(key), key, limits)
    form = body.get("response_format")
    if form is not None:
        if not isinstance(form, dict):
            refuse(
                "response_format", f"The key response_format must be an object, not {show(form)}."
            )
        _check_schema(form, "response_format", limits)
    wanted = body.get("structured_outputs")
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        refuse(
            "structured_outputs",
            f"The key structured_outputs must be an object, but is {show(wanted)}.",
        )
    _check_structured_outputs(wanted, limits)


def _check_tools(tools: Any, key: str, limits: Limits) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        refuse(key, f"The key {key} must be a list of objects, but is {show(tools)}.")
    if len(tools) > limits.tools:
        refuse(key, f"The key {key} has {len(tools)} items, but the limit is {limits.tools}.")
    _check_schema(tools, key, limits)


def _check_structured_outputs(wanted: Mapping[str, Any], limits: Limits) -> None:
    for key in ("regex", "whitespace_pattern"):
        if (pattern := wanted.get(key)) is not None:
            _check_regex(pattern, f"structured_outputs.{key}", limits)
    _check_grammar(wanted.get("grammar"), limits)
    _check_choice(wanted.get("choice"), limits)
    for key in ("json", "structural_tag"):
        value = wanted.get(key)
        where = f"structured_outputs.{key}"
        if isinstance(value, str):
            value = _parse_schema(value, where, limits)
        if value is not None:
            _check_schema(value, where, limits)


def _parse_schema(text: str, where: str, limits: Limits) -> Any:
    """A schema that comes as JSON in a string."""
    if len(text) > limits.schema_length:
        refuse_length(where, len(text), limits.schema_length)
    try:
        check_shape(text.encode("utf-8", "surrogatepass"), limits)
        return parse(text)
    except InvalidRequest as error:
        refuse(where, f"The schema in {where} is refused: {error}")


def _check_grammar(grammar: Any, limits: Limits) -> None:
    where = "structured_outputs.grammar"
    if grammar is None:
        return
    if not isinstance(grammar, str):
        refuse(where, f"The key {where} must be a string, but is {show(grammar)}.")
    if len(grammar) > limits.grammar_length:
        refuse_length(where, len(grammar), limits.grammar_length)
    for match in _REPEAT.finditer(grammar):
        if any(_number(count) > limits.repeats for count in match.groups()):
            refuse(
                where,
                f"The key {where} repeats something {show_text(match.group())} times, but the "
                f"limit is {limits.repeats}.",
            )


def _check_choice(choice: Any, limits: Limits) -> None:
    where = "structured_outputs.choice"
    if choice is None:
        return
    if not isinstance(choice, list) or not all(isinstance(text, str) for text in choice):
        refuse(where, f"The key {where} must be a list of strings, but is {show(choice)}.")
    if len(choice) > limits.choices:
        refuse(where, f"The key {where} has {len(choice)} items, the limit is {limits.choices}.")
    if (length := sum(map(len, choice))) > limits.schema_length:
        refuse_length(where, length, limits.schema_length)


def _check_schema(schema: Any, where: str, limits: Limits) -> None:
    """Size, count, and what lengths and counts multiply to; references stay inside."""
    nodes, length = 0, 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, times = stack.pop()
        nodes += 1
        if isinstance(value, str):
            length += len(value)
        elif isinstance(value, list):
            stack.extend((item, times) for item in value)
        elif isinstance(value, dict):
            length += sum(map(len, value))
            times *= _repetitions(value)
            if times > limits.schema_states:
                refuse(
                    where,
                    f"The lengths and counts of the schema in {where} multiply to {show(times)}, "
                    f"but the limit is {limits.schema_states}.",
                )
            _check_keywords(value, where, limits)
            stack.extend((item, times) for item in value.values())
        if nodes + len(stack) > limits.schema_nodes:
            refuse(
                where, f"The key {where} has more values than the limit of {limits.schema_nodes}."
            )
        if length > limits.schema_length:
            refuse_length(where, length, limits.schema_length)


def _repetitions(schema: Mapping[str, Any]) -> int:
    """How often a compiler may write out what is below a schema."""
    counts = (schema.get(key) for key in _COUNTED)
    return max(1, *(int(count) for count in counts if isinstance(count, int | float)), 1)


def _check_keywords(schema: Mapping[str, Any], where: str, limits: Limits) -> None:
    if isinstance(pattern := schema.get("pattern"), str):
        _check_regex(pattern, where, limits)
    if isinstance(patterns := schema.get("patternProperties"), dict):
        for pattern in patterns:
            _check_regex(pattern, where, limits)
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        refuse(where, f"The schema in {where} refers to another document, which is not taken.")


def _check_regex(pattern: Any, where: str, limits: Limits) -> None:
    if not isinstance(pattern, str):
        refuse(where, f"The pattern in {where} must be a string, but is {show(pattern)}.")
    if len(pattern) > limits.regex_length:
        refuse(
            where,
            f"The pattern in {where} has {len(pattern)} characters, but the limit is "
            f"{limits.regex_length}.",
        )
    if regex_states(pattern) > limits.regex_states:
        refuse(
            where,
            f"The pattern in {where} has more than {limits.regex_states} states once its "
            "repetitions are written out.",
        )


def regex_states(pattern: str) -> int:
    """Roughly the characters of a pattern after ``x{3}`` is written out as ``xxx``.

    Reads what decides size (groups, classes, escapes, repetitions) and takes the rest as it is;
    whether the pattern is valid is for the engine to say.
    """
    totals = [0]  # of each open group
    last = 0  # states of what a repetition would repeat
    at = 0
    while at < len(pattern):
        step = 1
        character = pattern[at]
        if character == "(":
            totals.append(0)
            last = 0
        elif character == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        elif match := _REPEAT.match(pattern, at):
            step = match.end() - at
            times = max(map(_number, match.groups()))
            totals[-1] += last * (times - 1) if times else 0
            last *= max(1, times)
        elif character not in "?*+|^$":
            step = _atom_length(pattern, at)
            last = 1
            totals[-1] += 1
        at += step
    return sum(totals)


def _atom_length(pattern: str, at: int) -> int:
    """Characters of one escape, class or plain character."""
    if pattern[at] == "\\":
        return 2
    if pattern[at] != "[":
        return 1
    end = at + 1
    if pattern[end : end + 1] == "^":
        end += 1
    end += 1  # a bracket that comes first stands for itself
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end + 1 - at


def _number(digits: str) -> int:
    return int(digits[:10]) if digits else 0
