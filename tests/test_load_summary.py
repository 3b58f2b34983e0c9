from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.stream import Record
from load_tests.summary import (
    figure,
    finite,
    floor_faults,
    is_good,
    percentile,
    rows,
    table,
    verdict,
)
from load_tests.traffic import parse_mix

TARGETS = {each.name: each for each in parse_mix("short=1:100:8:100:10,long=1:900:8:500:20")}


def served(name: str = "short", at: float = 0.0, ttft: float = 50.0, **fields: object) -> Record:
    record = Record(name, at, 100, "ok", sent=at, ended=at + 1, status=200, ttft_ms=ttft)
    record.itl_ms, record.e2e_ms, record.output_tokens, record.gaps_ms = 5.0, 85.0, 8, [5.0] * 7
    for key, value in fields.items():
        setattr(record, key, value)
    return record


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_lies_between_the_extremes(values: list[float], q: float) -> None:
    assert min(values) - 1e-6 <= percentile(values, q) <= max(values) + 1e-6
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile([], 0.5))


def test_rows_count_each_outcome_apart_and_measure_only_the_served() -> None:
    records = [
        served(),
        served(outcome="failed", ttft=9e9),
        served(outcome="rejected", status=429, refused=[429], ttft_ms=None),
        served(refused=[503, 429]),
        served(outcome="unfinished"),
        served("long", ttft=600.0),
    ]
    short, long, everything = rows(records, 2.0, TARGETS)
    assert (short.length_class, short.count, short.ok) == ("short", 5, 2)
    assert (short.failed, short.unfinished, short.refused) == (1, 1, {429: 2, 503: 1})
    assert short.ttft_ms == (50, 50, 50)
    assert short.output_tokens_s == 8
    assert (short.good, short.goodput_s) == (2, 1.0)
    assert long.good == 0
    assert (everything.length_class, everything.count, everything.good) == ("all", 6, 2)


def test_goodput_needs_both_targets() -> None:
    target = TARGETS["short"]
    assert is_good(served(), target)
    assert is_good(served(itl_ms=None), target)
    assert not is_good(served(ttft=101), target)
    assert not is_good(served(itl_ms=11.0), target)
    assert not is_good(served(outcome="failed"), target)


def test_a_class_without_targets_has_no_goodput() -> None:
    (row,) = rows([served("4096")], 1.0, {})
    assert row.good is None
    assert table([row]).splitlines()[-1].endswith("-")


def test_table_is_aligned_and_json_holds_no_nan() -> None:
    made = rows([served(), served("long", outcome="failed")], 1.0, TARGETS)
    lines = table(made).splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:4] == ["class", "n", "ok", "fail"]
    assert max(map(len, lines)) < 140
    json.dumps(finite(made), allow_nan=False)


def test_verdict_is_valid_for_a_client_on_time() -> None:
    assert verdict([served(sent=0.004)], asked=1, cpu=[0.2, 0.3]).valid


@pytest.mark.parametrize(
    ("records", "asked", "cpu", "fault"),
    [
        ([served(sent=0.006)], 1, [0.1], "schedule delay p99 6.0 ms exceeds 5.0 ms"),
        ([served(sent=0.021, ttft=2000.0)], 1, [0.1], "exceeds 20.0 ms"),
        ([served()], 1, [0.95] * 20, "CPU was full: 95%"),
        ([served()] * 500, 501, [0.1], "0.20% of the requests have no outcome"),
        ([served(outcome="unfinished")], 1, [0.1], "100.00% of the requests have no outcome"),
        ([], 0, [], "no request was sent"),
    ],
)
def test_verdict_says_why_a_run_is_invalid(
    records: list[Record], asked: int, cpu: list[float], fault: str
) -> None:
    judged = verdict(records, asked, cpu)
    assert not judged.valid
    assert fault in " ".join(judged.faults)


def test_a_long_ttft_allows_a_proportional_delay() -> None:
    assert verdict([served(sent=0.019, ttft=2000.0)], 1, [0.1]).valid


def test_failures_and_refusals_are_accounted_for() -> None:
    records = [served(outcome="failed"), served(outcome="rejected")]
    assert verdict(records, 2, [0.1]).unaccounted == 0


@pytest.mark.parametrize(
    ("failed", "floor_ms", "ttft_ms", "fault"),
    [
        (0, 4.0, 40.0, None),
        (0, 4.1, 40.0, "TTFT p50 4.10 ms of a null server exceeds 10% of 40.0 ms"),
        (1, 4.0, 40.0, "1 of 9 requests to the null server failed"),
        (0, 4.0, math.nan, None),  # no server answered, which is not the client's doing
    ],
)
def test_a_client_near_its_floor_may_not_compare_servers(
    failed: int, floor_ms: float, ttft_ms: float, fault: str | None
) -> None:
    floor = {"requests": 9, "failed": failed, "ttft_p50_ms": floor_ms}
    faults = floor_faults(floor, ttft_ms)
    assert len(faults) == (fault is not None)
    assert (fault or "") in " ".join(faults)
    assert floor_faults(None, 0.1) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (0, "0"), (1234.5, "1234"), (12.34, "12.3"), (1.234, "1.23")],
)
def test_figure(value: float | None, text: str) -> None:
    assert figure(value) == text
