from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.prompts import (
    Deck,
    PromptMaker,
    PromptTooShort,
    count_bytes,
    parse_mix,
    spread,
)


def words_and_marks(text: str) -> int:
    """Not one token a byte: about what a trained tokenizer does."""
    return 9 + len(re.findall(r"\w{1,6}|\W", text))


def text_in(body: bytes) -> str:
    return str(json.loads(body)["messages"][0]["content"])


@given(st.integers(150, 6000), st.floats(0, 1))
def test_lengths_are_exact_for_a_byte_level_model(tokens: int, depth: float) -> None:
    ask = PromptMaker("m", count_bytes).make("c", tokens, 8, depth=depth).ask(42)
    assert ask.prompt_tokens == tokens == len(text_in(ask.body).encode())


@pytest.mark.parametrize("tokens", [100, 777, 5000])
def test_lengths_are_exact_for_another_tokenizer(tokens: int) -> None:
    prompt = PromptMaker("m", words_and_marks).make("c", tokens, 8)
    assert prompt.tokens == tokens
    assert words_and_marks(text_in(prompt.ask(123456789012).body)) == tokens


def test_the_salt_comes_first_and_changes_nothing_else() -> None:
    prompt = PromptMaker("m", count_bytes).make("c", 400, 8)
    one, other = text_in(prompt.ask(1).body), text_in(prompt.ask(2).body)
    assert one.startswith("Note 000000000001. ")
    assert one != other
    assert one[19:] == other[19:]


@pytest.mark.parametrize(
    ("depth", "low", "high"), [(0.0, 0, 60), (0.5, 1900, 2100), (1.0, 3850, 4000)]
)
def test_the_needle_lies_at_its_depth_and_the_question_asks_for_it(
    depth: float, low: int, high: int
) -> None:
    ask = PromptMaker("m", count_bytes).make("c", 4000, 8, depth=depth).ask(0)
    text = text_in(ask.body)
    needle = re.search(r"The access code of (\w+) is (\d+)\. ", text)
    assert needle is not None
    assert low <= needle.start() <= high
    assert ask.answer == needle[2]
    assert text.endswith(f"\nWhat is the access code of {needle[1]}?")


def test_a_seed_repeats_a_prompt_and_another_does_not() -> None:
    made = [PromptMaker("m", count_bytes, seed).make("c", 400, 8) for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0].tail != made[2].tail


def test_a_prompt_too_short_for_its_needle_is_refused() -> None:
    with pytest.raises(PromptTooShort, match="prompt of 20 tokens is too short"):
        PromptMaker("m", count_bytes).make("c", 20, 8)


def test_body_asks_for_usage_and_exact_output() -> None:
    body = json.loads(PromptMaker("m", count_bytes).make("c", 400, 8).ask(0).body)
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"], body["model"]) == (8, True, "m")
    plain = PromptMaker("m", count_bytes, chat=False, ignore_eos=False).make("c", 400, 8)
    assert plain.path == "/v1/completions"
    assert "ignore_eos" not in json.loads(plain.ask(0).body)


def test_deck_draws_by_share_within_the_lengths() -> None:
    mix = parse_mix("short=0.9:150-300:8:100:10, long=0.1:1000:16:500:20")
    deck, rng = Deck(mix, PromptMaker("m", count_bytes)), random.Random(0)
    asks = [deck.draw(rng) for _ in range(2000)]
    short = [ask for ask in asks if ask.length_class == "short"]
    assert 0.87 < len(short) / len(asks) < 0.93
    assert {ask.prompt_tokens for ask in short} == set(spread(150, 300, 8))
    assert {ask.prompt_tokens for ask in asks if ask.length_class == "long"} == {1000}
    assert len({ask.body for ask in asks}) == len(asks)  # no prefix cache can answer


def test_reused_prompts_repeat() -> None:
    mix = parse_mix("short=1:150-300:8:100:10")
    deck, rng = Deck(mix, PromptMaker("m", count_bytes), reuse=True), random.Random(0)
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
