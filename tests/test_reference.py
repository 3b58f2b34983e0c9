"""The reference itself: against Hugging Face's own masks, and sharp enough to judge with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serve_app.pattern import FULL, Kind, LayerRule
from tests.reference import Reference, mask
from tests.tiny_models import LAYERS, ZOO, write_model

TOKENS = random.Random(7).choices(range(256), k=400)
NOISE = 5e-5  # float32 against float64, in nats


def everywhere(rule: LayerRule) -> tuple[LayerRule, ...]:
    return (rule,) * LAYERS


@pytest.fixture(scope="module", params=list(ZOO))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


@given(
    kind=st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]),
    span=st.integers(1, 20),
    sinks=st.integers(0, 6),
    length=st.integers(1, 40),
)
def test_the_mask_is_the_rule(kind: Kind, span: int, sinks: int, length: int) -> None:
    rule = LayerRule(kind, span, sinks if kind == "sliding_attention" else 0)
    expected = [[rule.sees(i, j) for j in range(length)] for i in range(length)]
    assert mask(rule, length).tolist() == expected


def test_full_rules_change_nothing(checkpoint: Path) -> None:
    reference = Reference(checkpoint)
    short = TOKENS[:200]  # below the windows that the Gemma models have of their own
    torch.testing.assert_close(
        reference.logprobs(short, everywhere(FULL)),
        reference.logprobs(short, None),
        rtol=0,
        atol=1e-5,
    )


def test_a_window_wrong_by_one_shows_and_float32_does_not(checkpoint: Path) -> None:
    right, wrong = (everywhere(LayerRule("sliding_attention", w)) for w in (64, 65))
    table = Reference(checkpoint).logprobs(TOKENS, right)
    exact = Reference(checkpoint, torch.float64).logprobs(TOKENS, right)
    assert (table - exact).abs().max() < NOISE
    assert (table - Reference(checkpoint).logprobs(TOKENS, wrong)).abs().max() > 0.3


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mistral", {"sliding_window": 48}),
        ("phi3", {"sliding_window": 48}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 48,
                "layer_types": ["sliding_attention"] * LAYERS,
            },
        ),
    ],
)
def test_a_window_is_hugging_faces_own(name: str, keys: dict[str, object], tmp_path: Path) -> None:
    reference = Reference(write_model(name, tmp_path, **keys))
    rules = everywhere(LayerRule("sliding_attention", 48))
    torch.testing.assert_close(
        reference.logprobs(TOKENS, rules), reference.logprobs(TOKENS, None), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3"])
def test_a_mix_is_hugging_faces_own(name: str, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    keys = {"use_sliding_window": True} if name == "qwen3" else {}
    path = write_model(name, tmp_path, sliding_window=48, layer_types=kinds, **keys)
    reference = Reference(path)
    rules = (LayerRule("sliding_attention", 48), FULL) * (LAYERS // 2)
    torch.testing.assert_close(
        reference.logprobs(TOKENS, rules), reference.logprobs(TOKENS, None), rtol=0, atol=1e-5
    )


def test_chunked_layers_alone_forget_what_lies_before_the_chunk(checkpoint: Path) -> None:
    reference = Reference(checkpoint)
    rules = everywhere(LayerRule("chunked_attention", 32))
    other = [*reversed(TOKENS[:64]), *TOKENS[64:]]
    one, two = reference.logprobs(TOKENS, rules), reference.logprobs(other, rules)
    torch.testing.assert_close(one[64:], two[64:], rtol=0, atol=1e-5)
    assert (one[:64] - two[:64]).abs().max() > 1


def test_an_answer_continues_the_prompt(checkpoint: Path) -> None:
    reference = Reference(checkpoint)
    rules = (*everywhere(LayerRule("sliding_attention", 16, 2))[1:], FULL)
    prompt = TOKENS[:50]
    answer = reference.answer(prompt, rules, new_tokens=16)
    assert len(answer.prompt_logprobs) == 49
    assert len(answer.tokens) == len(answer.logprobs) == len(answer.margins) == 16
    assert len(set(answer.tokens)) > 4
    table = reference.logprobs([*prompt, *answer.tokens], rules)
    for step, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = table[len(prompt) - 1 + step]
        assert int(row.argmax()) == token
        assert float(row[token]) == pytest.approx(logprob, abs=NOISE)


def test_the_tokenizer_is_one_token_a_byte(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "naïve café\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\nassistant: "
