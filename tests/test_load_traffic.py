from __future__ import annotations

import io
import math
import random
import re
import statistics
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.prompts import PromptMaker, count_bytes
from load_tests.traffic import (
    PUBLISHED,
    Arrival,
    class_of,
    mix_deck,
    parse_bounds,
    parse_mix,
    poisson,
    published_deck,
    read_trace,
    replay,
    spread,
)

MAKER = PromptMaker("m", count_bytes)
BOUNDS = parse_bounds("short=1000:500:50, long=:2000:100")


def test_deck_draws_by_share_within_the_lengths() -> None:
    mix = parse_mix("short=0.9:150-300:8:100:10, long=0.1:1000:16:500:20")
    deck, rng = mix_deck(mix, PromptMaker("m", count_bytes)), random.Random(0)
    asks = [deck.draw(rng) for _ in range(2000)]
    short = [ask for ask in asks if ask.length_class == "short"]
    assert 0.87 < len(short) / len(asks) < 0.93
    assert {ask.prompt_tokens for ask in short} == set(spread(150, 300, 8))
    assert {ask.prompt_tokens for ask in asks if ask.length_class == "long"} == {1000}
    assert len({ask.body for ask in asks}) == len(asks)  # no prefix cache can answer


def test_reused_prompts_repeat() -> None:
    mix = parse_mix("short=1:150-300:8:100:10")
    deck, rng = mix_deck(mix, PromptMaker("m", count_bytes), reuse=True), random.Random(0)
    assert len({deck.draw(rng).body for _ in range(200)}) == 8


@pytest.mark.parametrize(
    "text",
    [
        "short",
        "short=1:2",
        "short=x:1-2:3:4:5",
        "short=0:1-2:3:4:5",
        "a=1:9-2:3:4:5",
        "a=1:1:0:1:1",
    ],
)
def test_a_mix_with_a_mistake_names_the_entry(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_mix(text)


@given(st.integers(1, 10_000), st.integers(0, 100_000), st.integers(1, 20))
def test_spread_stays_in_its_bounds_and_rises(low: int, more: int, count: int) -> None:
    lengths = spread(low, low + more, count)
    assert len(lengths) == count
    assert lengths == sorted(lengths)
    assert low <= lengths[0] <= lengths[-1] == low + more


def test_classes_by_length_take_the_shortest_that_holds_a_prompt() -> None:
    bounds = parse_bounds("long=:9:9,short=100:9:9,medium=500:9:9")
    assert [class_of(bounds, n) for n in (1, 100, 101, 500, 10**6)] == [
        *("short", "short", "medium", "medium", "long"),
    ]
    closed = parse_bounds("short=100:9:9,medium=500:9:9")
    assert class_of(closed, 501) == "medium"


@pytest.mark.parametrize("text", ["short", "short=100", "short=x:1:1", "short=100:1:1,"])
def test_a_bound_with_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not name=most_tokens"):
        parse_bounds(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_quantiles_are_the_published_ones_and_rise_between(name: str) -> None:
    lengths = PUBLISHED[name]
    assert [lengths.prompt_at(level) for level in lengths.levels] == list(lengths.prompt)
    assert [lengths.output_at(level) for level in lengths.levels] == list(lengths.output)
    drawn = [lengths.prompt_at(i / 100) for i in range(101)]
    assert drawn == sorted(drawn)


def test_a_published_deck_has_its_lengths_within_the_bounds() -> None:
    deck = published_deck(PUBLISHED["azure-conversation"], BOUNDS, MAKER, longest=8000)
    rng = random.Random(0)
    asks = [deck.draw(rng) for _ in range(3000)]
    prompts = [ask.prompt_tokens for ask in asks]
    assert statistics.median(prompts) == pytest.approx(1020, rel=0.1)
    assert statistics.quantiles(prompts, n=10)[8] == pytest.approx(2735, rel=0.15)
    assert statistics.median(ask.output_tokens for ask in asks) == pytest.approx(129, rel=0.15)
    assert min(prompts) == MAKER.shortest()  # the published minimum is one token
    assert all(ask.prompt_tokens + ask.output_tokens <= 8000 for ask in asks)
    for ask in asks:
        assert ask.length_class == ("short" if ask.prompt_tokens <= 1000 else "long")


TRACE = "time,prompt_tokens,output_tokens\n4.5,300,20\n1,1200,7\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,374,44\r\n"
    "2023-11-16 18:17:04.0319600,396,109\r\n"
)


def test_a_trace_is_read_with_or_without_a_header_and_sorted() -> None:
    arrivals = [Arrival(1, 1200, 7), Arrival(4.5, 300, 20)]
    assert read_trace(io.StringIO(TRACE)) == arrivals
    assert read_trace(io.StringIO(TRACE.partition("\n")[2])) == arrivals


def test_azures_own_file_is_a_trace() -> None:
    first, second = read_trace(io.StringIO(AZURE))
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0, 374, 44)
    assert second.at == pytest.approx(0.052, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty"),
        ("time,prompt_tokens,output_tokens\n", "empty"),
        ("1,2,3\n1,2\n", "line 2 of the trace, '1,2', is not"),
        ("1,2,3\nsoon,2,3\n", "line 2"),
        ("1,2,3\n1,-2,3\n", "line 2 of the trace has a negative number"),
    ],
)
def test_a_trace_with_a_mistake_names_its_line(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_trace(io.StringIO(text))


def test_replay_keeps_the_traces_times_and_lengths() -> None:
    trace = read_trace(io.StringIO(TRACE))
    made = replay(trace, BOUNDS, MAKER, speed=2)
    assert [(at, p.tokens, p.output_tokens, p.length_class) for at, p in made] == [
        (0.5, 1200, 7, "long"),
        (2.25, 300, 20, "short"),
    ]
    assert len(replay(trace, BOUNDS, MAKER, speed=2, seconds=2)) == 1
    ((_, capped), _) = replay(trace, BOUNDS, MAKER, speed=1, longest=400)
    assert (capped.tokens, capped.output_tokens) == (393, 7)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_burstiness_changes_the_gaps_and_not_the_rate(burstiness: float, variation: float) -> None:
    deck = mix_deck(parse_mix("short=1:150-300:8:100:10"), MAKER, variants=1)
    arrivals = poisson(deck, random.Random(0), rate=5, burstiness=burstiness, start=100)
    times = [at for at, _ in islice(arrivals, 4000)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = statistics.mean(gaps)
    assert times[0] > 100
    assert mean == pytest.approx(1 / 5, rel=0.1)
    assert math.sqrt(statistics.variance(gaps)) / mean == pytest.approx(variation, rel=0.15)
