"""Generated questions: exact lengths, answers that stand in the text, and a clean split."""

from __future__ import annotations

import random
import re

import pytest

from load_tests.prompts import NAMES, assemble, text_of
from serve_app.demo import model as demo
from serve_app.demo.needles import ASSISTANT, LOAD_TEST_NAMES, USER, Generator

FACT = re.compile(r"The access code of (\w+) is (\d+)\.")
QUESTION = re.compile(r"What is the access code of (\w+)\?")


def text_of_tokens(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < demo.BYTES).decode()


@pytest.mark.parametrize("tokens", [128, 257, 1024, 8192])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_prompt_has_its_length_and_its_answer_once(tokens: int, held_out: bool) -> None:
    generator = Generator(3, held_out=held_out)
    for note in (False, True):
        prompt = generator.prompt(tokens, facts=6, note=note)
        assert len(prompt.tokens()) == tokens
        assert prompt.tokens()[:2] == [demo.BOS, USER]
        assert prompt.tokens()[-1] == ASSISTANT
        facts = FACT.findall(prompt.text)
        assert facts.count((prompt.needle.name, prompt.needle.code)) == 1
        assert len({name for name, _ in facts}) == len(facts)
        assert prompt.text.endswith(f"\n{prompt.needle.question}")


def test_a_fact_stands_at_the_depth_asked_for() -> None:
    generator = Generator(0)
    for depth in (0.0, 0.3, 1.0):
        prompt = generator.prompt(4096, depth=depth, facts=1)
        assert prompt.depth == pytest.approx(depth, abs=0.03)


def test_a_length_without_room_for_a_fact_is_refused() -> None:
    with pytest.raises(ValueError, match="60 tokens do not hold"):
        Generator(0).prompt(60)


@pytest.mark.parametrize("tokens", [128, 511, 2048])
def test_every_answer_of_a_chat_stands_in_its_context(tokens: int) -> None:
    generator = Generator(1)
    for _ in range(20):
        chat = generator.chat(tokens)
        assert len(chat.tokens) == len(chat.answers) == tokens
        context, *turns = text_of_turns(chat.tokens.tolist())
        told = dict(FACT.findall(context))
        assert turns
        asked = QUESTION.findall(context) + [
            name for turn in turns for name in QUESTION.findall(turn)
        ]
        answered = [pair for turn in turns for pair in FACT.findall(turn)]
        assert [name for name, _ in answered] == asked
        assert len(set(asked)) == len(asked)
        assert all(told[name] == code for name, code in answered)


def text_of_turns(tokens: list[int]) -> list[str]:
    """What stands between the assistant's markers."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == ASSISTANT:
            pieces.append([])
        pieces[-1].append(token)
    return [text_of_tokens(piece) for piece in pieces]


def test_the_answers_are_marked_with_the_token_that_ends_them() -> None:
    chat = Generator(2).chat(512)
    marked = chat.tokens[chat.answers].tolist()
    count = marked.count(demo.EOS)
    assert count == chat.tokens.tolist().count(ASSISTANT)
    assert len(FACT.findall(text_of_tokens(marked))) == count


def test_the_same_seed_gives_the_same_data() -> None:
    first, again, other = Generator(7), Generator(7), Generator(8)
    chat = first.chat(700).tokens.tolist()
    assert again.chat(700).tokens.tolist() == chat
    assert other.chat(700).tokens.tolist() != chat
    assert first.prompt(700) == again.prompt(700)


def test_training_and_held_out_data_share_no_name_code_or_sentence() -> None:
    sides = []
    for held_out in (False, True):
        generator = Generator(0, held_out=held_out)
        text = "".join(generator.prompt(2048, facts=8).text for _ in range(40))
        names, codes = zip(*FACT.findall(text), strict=True)
        sentences = {s for s in re.split(r"(?<=\.) |\n", text) if "code" not in s and len(s) > 40}
        sides.append((set(names), set(codes), sentences))
    assert not any(mine & theirs for mine, theirs in zip(*sides, strict=True))


def test_load_tests_ask_in_the_same_words_about_names_never_trained_on() -> None:
    assert LOAD_TEST_NAMES == NAMES
    text = assemble(text_of(random.Random(0), 200), "", "Ada", "0042")
    prompt = next(
        p for _ in range(200) if (p := Generator(_, held_out=True).prompt(400)).needle.name == "Ada"
    )
    assert prompt.needle.question == text.split("\n")[1]
    assert prompt.needle.fact.replace(prompt.needle.code, "0042") in text


@pytest.mark.parametrize(
    ("said", "right"),
    [("The access code of X is {}.", True), ("{}", True), ("{}1", False), ("11 or {}", False)],
)
def test_an_answer_is_right_with_this_code_and_no_other(said: str, right: bool) -> None:
    prompt = Generator(0).prompt(200)
    assert prompt.right(said.format(prompt.needle.code)) is right
