"""JSON that is deep, endless, ambiguous or none, and JSON that only looks so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import InvalidRequest
from serve_app.guard.body import CHAT, check_body
from tests.test_guard_body import LIMITS, chat, check_refused, message


def nested(levels: int) -> bytes:
    return b'{"messages":' + b"[" * levels + b"]" * levels + b"}"


# What is wrong, the body, the key at fault, and words of the sentence.
CASES = [
    ("empty", b"", None, "not valid at character 0"),
    ("no JSON", b"hello", None, "not valid"),
    ("half an object", b'{"messages": [', None, "not valid"),
    ("two documents", chat() + b"{}", None, "Extra data"),
    ("an array", b"[1, 2]", None, "must be a JSON object, but is a list of 2 items"),
    ("a string", b'"hello"', None, "must be a JSON object"),
    ("null", b"null", None, "must be a JSON object"),
    ("a number", b"5", None, "must be a JSON object, but is 5"),
    ("latin-1", '{"user": "é"}'.encode("latin-1"), None, "not valid UTF-8 at byte 10"),
    ("UTF-16", chat().decode().encode("utf-16"), None, "not valid UTF-8"),
    ("a byte order mark", b"\xef\xbb\xbf" + chat(), None, "not valid"),
    ("a raw surrogate", b'{"user": "\xed\xa0\x80"}', None, "not valid UTF-8"),
    ("a raw control character", b'{"user": "a\x00b"}', None, "control character"),
    ("65 levels", nested(64), None, "nested deeper than the limit of 64"),
    ("50,000 levels", nested(50_000), None, "nested deeper"),
    ("open brackets", b"[" * 1_000_000, None, "500000 objects and lists"),
    ("open braces", b'{"a":' * 90_000, None, "nested deeper"),
    ("closed brackets first", b"]" * 100_000, None, "not valid"),
    ("very many lists", b'{"a":[' + b"[]," * 200_000 + b"[]]}", None, "objects and lists"),
    ("very many strings", b'{"a":[' + b'"",' * 1_000_000 + b'""]}', None, "1000002 strings"),
    ("very many numbers", b'{"a":[' + b"1," * 2_500_000 + b"1]}", None, "values"),
    ("NaN", b'{"temperature": NaN}', None, "the value NaN"),
    ("Infinity", b'{"temperature": Infinity}', None, "the value Infinity"),
    ("-Infinity", b'{"temperature": -Infinity}', None, "the value -Infinity"),
    ("a float past all", b'{"temperature": 1e999}', None, "too large"),
    ("5,000 digits", b'{"seed": ' + b"9" * 5000 + b"}", None, "4300 digits"),
    ("a key twice", b'{"max_tokens": 1, "max_tokens": 2}', "max_tokens", "comes twice"),
    ("a deep key twice", b'{"a": [{"role": 1, "role": 2}]}', "role", "comes twice"),
    ("half a surrogate pair", message(content="\ud800"), "messages", "surrogate"),
    ("the wrong half", chat(user="a\udc00b"), "user", "surrogate"),
    ("half a pair as a key", chat(**{"\udfff": 1}), "\\udfff", "surrogate"),
]


@pytest.mark.parametrize(
    ("raw", "param", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_refused(raw: bytes, param: str | None, words: str) -> None:
    check_refused(CHAT, raw, param, words)


GOOD = [
    chat(metadata=json.loads("[" * 63 + "]" * 63)),
    message(content='quotes " and \\ and \\" and [[[[{{{{ ' * 1000),
    message(content="pairs 😀 漢字 \x00"),
    json.dumps({"messages": [{"role": "user", "content": "漢😀"}]}).encode(),
    message(content="a" * 1_000_000),
]


@pytest.mark.parametrize("raw", GOOD)
def test_good_requests_pass_unchanged(raw: bytes) -> None:
    assert check_body(raw, CHAT, LIMITS) == json.loads(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0dDeE1.-nNtf \n', max_size=80))
def test_any_bytes_are_taken_or_refused_but_never_break(raw: bytes | str) -> None:
    raw = raw.encode() if isinstance(raw, str) else raw
    with pytest.raises(InvalidRequest):
        check_body(raw, CHAT, LIMITS)
