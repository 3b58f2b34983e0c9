from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.stream import Record, StreamMeter, error_message

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "usage", "delta", "error", "text"]), inner)
    ),
    max_leaves=8,
)


def data(event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n"


def content(text: str) -> bytes:
    return data({"choices": [{"delta": {"content": text}}]})


def meter_of(*lines: tuple[float, bytes]) -> StreamMeter:
    meter = StreamMeter()
    for now, line in lines:
        meter.line(line, now)
    return meter


def test_the_clock_stops_at_the_first_content_and_not_at_the_role() -> None:
    meter = meter_of(
        (10.1, data({"choices": [{"delta": {"role": "assistant", "content": ""}}]})),
        (10.5, content("a")),
        (10.6, content("b")),
        (10.6, content("c")),
        (10.8, content("d")),
        (10.8, data({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}})),
        (10.9, b"data: [DONE]\n"),
    )
    record = Record("short", scheduled=0.2, prompt_tokens_asked=7)
    meter.fill(record, origin=9.8)
    assert meter.fault is None
    assert meter.text == "abcd"
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)
    assert record.ttft_ms == pytest.approx(500)
    assert record.gaps_ms == pytest.approx([100, 200])
    assert record.itl_ms == pytest.approx(100)  # three tokens after the first, in two arrivals
    assert record.e2e_ms == pytest.approx(900)


@pytest.mark.parametrize(
    "line",
    [
        data({"choices": [{"text": "a"}]}),
        data({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}),
        data({"choices": [{"delta": {"reasoning_content": "a"}}]}),
    ],
)
def test_completions_tool_calls_and_reasoning_are_content(line: bytes) -> None:
    assert meter_of((1.0, line)).content_at == [1.0]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([content("a"), data({"error": {"message": "boom"}})], "error event: boom"),
        ([content("a")], "without [DONE]"),
        ([data({"choices": []}), b"data: [DONE]\n"], "no content"),
        ([content("a"), b"data: {\n", b"data: [DONE]\n"], "malformed"),
        ([content("a"), data([1]), b"data: [DONE]\n"], "malformed"),
    ],
)
def test_a_bad_stream_is_a_failure_whatever_its_status(lines: list[bytes], fault: str) -> None:
    meter = meter_of(*((1.0, line) for line in lines))
    assert meter.fault is not None
    assert fault in meter.fault


def test_an_error_event_stays_the_fault_when_done_follows() -> None:
    lines = [data({"error": {"message": "boom"}}), content("a"), b"data: [DONE]\n"]
    assert meter_of(*((1.0, line) for line in lines)).fault == "error event: boom"


@given(st.lists(st.binary() | json_values.map(data)))
def test_no_line_raises(lines: list[bytes]) -> None:
    record = Record("short", 0.0, 1)
    meter_of(*((float(i), line) for i, line in enumerate(lines))).fill(record, 0.0)
    assert record.itl_ms is None or math.isfinite(record.itl_ms)


@pytest.mark.parametrize(
    "body", [{"error": {"message": "m"}}, {"error": "m"}, {"message": "m"}, "m"]
)
def test_error_message_of_every_shape(body: Any) -> None:
    assert error_message(body) == "m"
