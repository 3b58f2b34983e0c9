"""Prompts, texts and refusals of the process that measures one plan; no engine is started."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from serve_app.demo import model as demo
from serve_app.demo.needles import Generator, Needle, Prompt
from serve_app.errors import ConfigError, LocalAttentionError
from serve_app.quality.run import _is_right, _prompt, _refusal, _texts
from tests.test_quality_results import JOB


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    demo.write_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("length", [128, 500, 4000])
def test_a_prompt_is_as_long_as_asked_and_keeps_its_question(tokenizer: Any, length: int) -> None:
    prompt, tokens = _prompt(Generator(0, held_out=True), tokenizer, length, 0.5)
    assert 0.97 * length <= len(tokens) <= length
    assert tokens == prompt.tokens()


def test_a_chat_template_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    wordy = copy.copy(tokenizer)
    wordy.chat_template = "Think hard. " * 20 + demo.CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="No question fits 256 tokens"):
        _prompt(Generator(0), wordy, 256, 0.5)
    assert len(_prompt(Generator(0), wordy, 512, 0.5)[1]) > 497


def test_a_chat_model_answers_and_a_text_model_goes_on_writing() -> None:
    prompt = Prompt("", Needle("Ada", "4711"), 0.5)
    assert _is_right(prompt, "It is **4711**.", chat=True)
    assert not _is_right(prompt, "It is 4711 or 4712.", chat=True)
    assert _is_right(prompt, " 4711. The access code of Boris is 9", chat=False)
    assert not _is_right(prompt, " 9. The access code of Ada is 4711.", chat=False)
    assert not _is_right(prompt, "", chat=False)


def test_every_stretch_of_a_text_begins_as_the_tokenizer_begins(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    file.write_text("abcdefghij" * 190)
    job = dataclasses.replace(JOB, text=str(file), max_model_len=801, sequences=3)
    first, second = _texts(job, tokenizer)  # the third would be shorter than half
    assert len(first) == len(second) == 800
    assert first[0] == second[0] == demo.BOS
    assert bytes(first[1:] + second[1:]) == (b"abcdefghij" * 160)[:1598]


def test_generated_text_is_long_enough_and_the_same_each_time(tokenizer: Any) -> None:
    first, second = (list(_texts(JOB, tokenizer)) for _ in range(2))
    assert first == second
    assert [len(text) for text in first] == [1023]


class Prefilled(BaseModel):
    tokens: int = Field(gt=0)


def test_a_refusal_is_found_inside_the_errors_that_vllm_makes_of_it() -> None:
    class Config(BaseModel):
        @model_validator(mode="after")
        def _check(self) -> Config:
            raise LocalAttentionError("No.")

    try:
        Config()
    except ValueError as inner:
        outer = RuntimeError("failed")
        outer.__cause__ = inner
    assert _refusal(outer) == "No."
    with pytest.raises(ValidationError) as raised:
        Prefilled(tokens=0)
    assert _refusal(raised.value) == "The key tokens is 0, but input should be greater than 0."
    assert _refusal(RuntimeError("out of memory")) is None
