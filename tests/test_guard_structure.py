"""Schemas, patterns and grammars that would compile for ever, and those that would not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.guard.body import CHAT, check_body
from serve_app.guard.structure import regex_states
from tests.test_guard_body import LIMITS, chat, check_refused


def schema(**fields: Any) -> bytes:
    return chat(
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": fields}}
    )


def structured(**fields: Any) -> bytes:
    return chat(structured_outputs=fields)


def tool(**parameters: Any) -> bytes:
    return chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"properties": value}
    return value


# What is wrong, the body, the key at fault, and words of the sentence.
CASES = [
    ("a long pattern", structured(regex="a" * 1025), "structured_outputs.regex", "1025 characters"),
    ("a pattern bomb", structured(regex="((a{99}){99}){99}"), "structured_outputs.regex", "states"),
    ("a flat bomb", structured(regex="[a-z]{99999}"), "structured_outputs.regex", "states"),
    ("regex a number", structured(regex=1), "structured_outputs.regex", "must be a string"),
    (
        "a bomb of spaces",
        structured(json={}, whitespace_pattern="(\\s{999}){999}"),
        "structured_outputs.whitespace_pattern",
        "states",
    ),
    ("a long grammar", structured(grammar="a" * 20_000), "structured_outputs.grammar", "20000"),
    (
        "a grammar bomb",
        structured(grammar="root ::= [a]{1,1000000}"),
        "structured_outputs.grammar",
        "{1,1000000} times",
    ),
    ("1,025 choices", structured(choice=["a"] * 1025), "structured_outputs.choice", "1025 items"),
    ("choices of numbers", structured(choice=[1]), "structured_outputs.choice", "strings"),
    ("a long choice", structured(choice=["a" * 300_000]), "structured_outputs.choice", "300000"),
    ("a schema as bad text", structured(json="{"), "structured_outputs.json", "not valid"),
    ("a schema as deep text", structured(json="[" * 999), "structured_outputs.json", "deeper"),
    ("outputs a list", chat(structured_outputs=[]), "structured_outputs", "an object"),
    ("format a string", chat(response_format="json"), "response_format", "an object"),
    ("a deep schema", schema(**deep(80)), None, "nested deeper"),
    ("a large schema", schema(enum=list(range(30_000))), "response_format", "20000"),
    ("a long schema", schema(description="a" * 300_000), "response_format", "300"),
    ("a long list", schema(type="array", maxItems=10**9), "response_format", "1000000000"),
    ("a long list as a float", schema(type="array", maxItems=1e9), "response_format", "multiply"),
    (
        "a list of lists",
        schema(maxItems=1000, items={"maxItems": 1000, "items": {"type": "string"}}),
        "response_format",
        "multiply to 1000000",
    ),
    ("a pattern in a schema", schema(pattern="(a{99}){999}"), "response_format", "states"),
    (
        "a pattern of names",
        schema(patternProperties={"(a{99}){999}": {}}),
        "response_format",
        "states",
    ),
    ("another document", schema(**{"$ref": "http://a/b"}), "response_format", "another document"),
    ("tools an object", chat(tools={}), "tools", "a list of objects"),
    ("129 tools", chat(tools=[{}] * 129), "tools", "129 items"),
    ("a tool's long list", tool(maxItems=10**7), "tools", "multiply"),
    ("a function's long list", chat(functions=[{"maxItems": 10**7}]), "functions", "multiply"),
]


@pytest.mark.parametrize(
    ("raw", "param", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_refused(raw: bytes, param: str | None, words: str) -> None:
    check_refused(CHAT, raw, param, words)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {
            "type": "string",
            "maxLength": 200,
            "pattern": "^[A-Z][a-z]{1,20}( [A-Z]\\.){0,3}$",
        },
        "when": {"type": "string", "pattern": "\\d{4}-\\d{2}-\\d{2}"},
        "tags": {"type": "array", "maxItems": 20, "items": {"$ref": "#/$defs/tag"}},
    },
    "$defs": {"tag": {"enum": ["a", "b"]}},
}
GOOD = [
    schema(**SCHEMA),
    tool(**SCHEMA),
    structured(json=json.dumps(SCHEMA)),
    structured(regex="(\\+\\d{1,3} )?[0-9]{3,12}", whitespace_pattern="[ \\n]{0,2}"),
    structured(grammar='root ::= "yes" | "no"'),
]


@pytest.mark.parametrize("raw", GOOD)
def test_good_requests_pass_unchanged(raw: bytes) -> None:
    assert check_body(raw, CHAT, LIMITS) == json.loads(raw)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("(ab){10}", 20),
        ("((a{2}){3}){4}", 24),
        ("[^]a-z\\]]{7}", 7),
        ("\\d{4}-\\d{2}", 7),
        ("(a|b)*c+?", 3),
        ("a{", 2),
        ("(((", 0),
        (")]}", 3),
    ],
)
def test_regex_states(pattern: str, states: int) -> None:
    assert regex_states(pattern) == states


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a[](){}\\^-,0199*|", max_size=60))
def test_regex_states_reads_anything(pattern: str) -> None:
    assert regex_states(pattern) >= 0
