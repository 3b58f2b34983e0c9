"""Lengths without a tokenizer, against real tokenizers on generated English, Chinese and code."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from serve_app.lengths import LengthEstimator

ENGLISH = " ".join(" ".join(topics.values()).split())
CODE = "".join(
    path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))
)
CHINESE = """
我们 今天 系统 的 了 是 在 可以 模型 请求 数据 服务器 问题 时间 学习 语言 上下文 窗口 长度
因此 如果 需要 重新 计算 结果 非常 重要 研究 方法 提出 一个 新 注意力 机制 能够 减少 内存 使用
城市 天气 经济 发展 历史 文化 朋友 认为 这个 那个 没有 什么 怎么 为什么 完成 测试 报告 说明
"""
CHINESE_WORDS = CHINESE.split()

Tokenize = Callable[[str], int]


def chinese(rng: random.Random, characters: int) -> str:
    weights = [1 / rank for rank in range(1, len(CHINESE_WORDS) + 1)]
    words = rng.choices(CHINESE_WORDS, weights, k=characters // 2)
    return "".join(word + ("。" if rng.random() < 0.08 else "") for word in words)[:characters]


def excerpt(rng: random.Random, source: str, characters: int) -> str:
    start = rng.randrange(max(1, len(source) - characters))
    return source[start : start + characters]


def mixed(rng: random.Random) -> str:
    """One message: English, Chinese, code, or up to three of them; lengths over three decades."""
    kinds = rng.choices("ECP", k=rng.choice([1, 1, 1, 2, 3]))
    parts = []
    for kind in kinds:
        characters = int(10 ** rng.uniform(1.3, 4.0))
        if kind == "C":
            parts.append(chinese(rng, characters // 2))
        else:
            parts.append(excerpt(rng, ENGLISH if kind == "E" else CODE, characters))
    return "\n".join(parts)


def chat(rng: random.Random) -> dict[str, Any]:
    turns = rng.choice([1, 1, 2, 4])
    return {"messages": [{"role": "user", "content": mixed(rng)} for _ in range(turns)]}


def byte_tokens(text: str) -> int:
    return len(text.encode())


def exact_chat_tokens(body: dict[str, Any], tokenize: Tokenize, overhead: int) -> int:
    """What an engine would count: a template adds ``overhead`` tokens for each message."""
    return overhead + sum(overhead + tokenize(message["content"]) for message in body["messages"])


@pytest.fixture(scope="session")
def bpe() -> Tokenize:
    """A byte-level BPE of 4,000 tokens, trained on other draws of the same kinds of text."""
    rng = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((mixed(rng) for _ in range(120)), trainer)
    return lambda text: len(tokenizer.encode(text).ids)


def serve(
    tokenize: Tokenize, overhead: int, requests: int, seed: int
) -> tuple[list[bool], list[float]]:
    """Estimate, answer and learn, one request after another: misses, and padding of the long."""
    rng = random.Random(seed)
    lengths = LengthEstimator()
    missed, padding = [], []
    for _ in range(requests):
        body = chat(rng)
        estimate = lengths.estimate(body)
        exact = exact_chat_tokens(body, tokenize, overhead)
        missed.append(estimate.fit_tokens < exact + estimate.output_tokens)
        if exact > 1000:
            padding.append((estimate.fit_tokens - estimate.output_tokens) / exact)
        lengths.observe(estimate, exact)
    return missed, padding


def test_bpe_misses_under_one_percent_after_a_hundred_requests(bpe: Tokenize) -> None:
    missed, padding = serve(bpe, overhead=5, requests=900, seed=2)
    assert sum(missed[100:]) / 800 < 0.01
    assert statistics.median(padding[50:]) < 1.3  # safe, but not by doubling every prompt


def test_byte_tokenizer_misses_under_one_percent_after_a_hundred_requests() -> None:
    missed, padding = serve(byte_tokens, overhead=9, requests=2000, seed=3)
    assert sum(missed[100:]) / 1900 < 0.01
    assert statistics.median(padding[50:]) < 1.1
    assert sum(missed[:100]) < 15  # even the first answers teach: one scale for all scripts


def test_a_new_tokenizer_is_learned_again(bpe: Tokenize) -> None:
    """The model behind a name is replaced: estimates follow within a few hundred answers."""
    rng = random.Random(4)
    lengths = LengthEstimator()
    errors = []
    for number in range(900):
        body = chat(rng)
        estimate = lengths.estimate(body)
        exact = exact_chat_tokens(body, bpe if number < 300 else byte_tokens, 5)
        errors.append(abs(estimate.prompt_tokens / exact - 1))
        lengths.observe(estimate, exact)
    assert statistics.median(errors[300:310]) > 0.3
    assert statistics.median(errors[700:]) < 0.1


@pytest.mark.parametrize(
    ("prompt", "tokens", "sequences", "longest"),
    [
        ([1, 2, 3], 3, 1, 3),
        ([[1, 2, 3], [4, 5]], 5, 2, 3),
    ],
)
def test_token_ids_are_exact(prompt: Any, tokens: int, sequences: int, longest: int) -> None:
    estimate = LengthEstimator().estimate({"prompt": prompt, "max_tokens": 7})
    assert estimate.exact
    assert (estimate.prompt_tokens, estimate.sequences) == (tokens, sequences)
    assert estimate.fit_tokens == longest + 7
    assert estimate.total_tokens == tokens + 7 * sequences


@pytest.mark.parametrize(
    ("body", "output", "sequences"),
    [
        ({"messages": []}, 256, 1),
        ({"prompt": "a"}, 16, 1),
        ({"messages": [], "max_tokens": 9}, 9, 1),
        ({"messages": [], "max_tokens": 9, "max_completion_tokens": 8, "n": 3}, 8, 3),
        ({"messages": [], "max_tokens": None, "n": None}, 256, 1),
        ({"prompt": ["a", "b"], "n": 2, "best_of": 4, "max_tokens": 5}, 5, 8),
    ],
)
def test_output_budget(body: dict[str, Any], output: int, sequences: int) -> None:
    estimate = LengthEstimator(default_output_tokens=256).estimate(body)
    assert (estimate.output_tokens, estimate.sequences) == (output, sequences)


def test_a_list_of_prompts_fits_by_its_longest() -> None:
    lengths = LengthEstimator()
    one = lengths.estimate({"prompt": "word " * 4000})
    many = lengths.estimate({"prompt": ["word " * 4000, *["word " * 40] * 100]})
    assert many.fit_tokens == pytest.approx(one.fit_tokens, rel=0.02)
    assert many.prompt_tokens > 1.8 * one.prompt_tokens


def test_every_text_counts() -> None:
    lengths = LengthEstimator()
    text = "a word and another " * 50
    plain = {"messages": [{"role": "user", "content": text}]}
    bare = lengths.estimate({"messages": [{"role": "user", "content": ""}]}).prompt_tokens
    expected = lengths.estimate(plain).prompt_tokens
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    for message in (
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "", "reasoning_content": text},
    ):
        estimate = lengths.estimate({"messages": [message]}).prompt_tokens
        assert estimate == pytest.approx(expected, rel=0.05)
    for key in ("tools", "functions", "documents"):
        extra = {**plain, key: [{"description": text}]}
        assert lengths.estimate(extra).prompt_tokens > 1.9 * expected - bare


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = ("messages", "prompt", "tools", "documents", "suffix", "n", "best_of", "max_tokens")


@settings(max_examples=150, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(KEYS), JSON | st.text(alphabet="\ud800é漢🙂a")),
    exact=st.integers(-1, 10**7),
)
def test_never_raises_and_stays_positive(body: dict[str, Any], exact: int) -> None:
    lengths = LengthEstimator()
    for _ in range(3):
        estimate = lengths.estimate(body)
        assert estimate.prompt_tokens >= 0
        assert estimate.fit_tokens >= estimate.output_tokens
        lengths.observe(estimate, exact)
        assert 0 < lengths.margin < 10**8


@pytest.mark.parametrize("size", [400_000, 1_000_000])
@pytest.mark.parametrize("kind", ["english", "chinese", "code"])
def test_a_large_body_costs_a_few_milliseconds(size: int, kind: str) -> None:
    piece = {"english": ENGLISH, "code": CODE, "chinese": chinese(random.Random(6), 9000)}[kind]
    text = (piece * (size // len(piece.encode()) + 1)).encode()[:size].decode(errors="ignore")
    body = {"messages": [{"role": "user", "content": text}]}
    lengths = LengthEstimator()
    spent = []
    for _ in range(15):
        began = time.perf_counter()
        lengths.estimate(body)
        spent.append(time.perf_counter() - began)
    assert min(spent) < 0.003


def test_a_first_answer_far_from_the_defaults_does_not_widen_the_margin() -> None:
    """A byte-level model: four times the tokens of the defaults, and every answer says so."""
    lengths = LengthEstimator(default_output_tokens=64)

    def body(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    lengths.observe(lengths.estimate(body("wait for it " * 500)), 6003)
    short = lengths.estimate(body("What is the code of Ada, and why? " * 3))
    assert short.prompt_tokens == pytest.approx(105, rel=0.2)
    assert short.fit_tokens < 400
