from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.prompts import PromptMaker, PromptTooShort, count_bytes


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


def test_the_shortest_prompt_can_be_made_and_one_shorter_cannot() -> None:
    maker = PromptMaker("m", words_and_marks)
    assert maker.make("c", maker.shortest(), 8).tokens == maker.shortest()
    with pytest.raises(PromptTooShort):
        maker.make("c", maker.shortest() - 20, 8)
