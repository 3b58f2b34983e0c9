"""What the shipped weights do under each pattern of attention: the price of a window, made visible.

Questions are held out (``needles``) and asked of ``train``'s own Llama, whose masks the engine is
tested against elsewhere.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from serve_app.demo import model as demo
from serve_app.demo import train
from serve_app.demo.needles import Generator, Prompt
from serve_app.demo.shape import Shape, rules_of
from serve_app.pattern import FULL, LayerRule, LocalAttention

LAYERS = Shape().layers
CHUNK, WINDOW = {"attention_chunk_size": 256}, {"sliding_window": 256}
EVERY_2, EVERY_4 = {"full_attention_every": 2}, {"full_attention_every": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one directory for each of the shipped models."""
    path = tmp_path_factory.mktemp("trained")
    for attention in demo.TRAINED:
        demo.build(path / attention, attention)
    return path


def load(directory: Path, rules: tuple[LayerRule, ...]) -> train.Llama:
    model = train.Llama(Shape(), rules)
    train.load(model, directory)
    return model


def under(pattern: dict[str, Any]) -> tuple[LayerRule, ...]:
    return LocalAttention(**pattern).rules(LAYERS) if pattern else (FULL,) * LAYERS


@cache
def questions(tokens: int, back: int, count: int) -> list[Prompt]:
    """Prompts whose fact begins about ``back`` tokens before their end."""
    generator = Generator(1, held_out=True)
    return [generator.prompt(tokens, depth=1 - back / tokens, facts=6) for _ in range(count)]


@torch.no_grad()
def found(model: train.Llama, prompts: list[Prompt]) -> float:
    said = [
        answer
        for i in range(0, len(prompts), 4)
        for answer in train.right(model, prompts[i : i + 4], "cpu")
    ]
    return sum(said) / len(said)


def test_full_attention_finds_a_code_at_any_depth(directory: Path) -> None:
    model = load(directory / "full", under({}))
    for back in (1900, 1500, 700, 100):
        assert found(model, questions(2048, back, 8)) == 1
    assert found(model, questions(4096, 3500, 8)) >= 0.9


def test_a_window_forgets_what_lies_behind_it(directory: Path) -> None:
    model = load(directory / "full", under(WINDOW))
    assert found(model, questions(2048, 1500, 20)) <= 0.1
    assert found(model, questions(2048, 120, 20)) >= 0.9


@pytest.mark.parametrize("every", [EVERY_2, EVERY_4], ids=["every second", "every fourth"])
def test_some_full_layers_find_it_again(directory: Path, every: dict[str, int]) -> None:
    assert found(load(directory / "full", under(WINDOW | every)), questions(2048, 1500, 20)) >= 0.95


def test_nothing_crosses_a_boundary_where_every_layer_is_chunked(directory: Path) -> None:
    model = load(directory / "full", under(CHUNK))
    # The prompt ends 208 tokens into a chunk: a fact 100 back is in it, one 1,500 back is not.
    assert found(model, questions(2000, 100, 20)) >= 0.7
    assert found(model, questions(2000, 1500, 20)) == 0


def test_an_answer_that_begins_a_chunk_needs_a_model_trained_with_chunks(directory: Path) -> None:
    """The chunked layers of such an answer do not see the question, whatever the full ones do."""
    inside, begins = questions(2000, 1500, 20), questions(2048, 1500, 20)
    model = load(directory / "full", under(CHUNK | EVERY_4))
    assert found(model, inside) >= 0.7
    assert found(model, begins) <= 0.1
    trained = load(directory / "chunked-3-1", rules_of(Shape(), "chunked-3-1"))
    assert found(trained, inside) >= 0.8
    assert found(trained, begins) >= 0.8


def test_training_cannot_widen_a_window(directory: Path) -> None:
    model = load(directory / "sliding", rules_of(Shape(), "sliding"))
    assert found(model, questions(2048, 1500, 20)) <= 0.1
    assert found(model, questions(256, 200, 20)) >= 0.95


@torch.no_grad()
def perplexity(model: train.Llama, start: int) -> float:
    """Of text like the one it was trained on, from the token ``start`` on."""
    generator = Generator(5)
    tokens = torch.tensor([generator.prompt(1024, facts=2).tokens() for _ in range(8)])
    logits = model(tokens)[:, start - 1 : -1]
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten()).exp())


def test_sinks_do_not_help_this_model_past_its_window(directory: Path) -> None:
    """StreamingLLM's large models collapse without the first tokens; this one loses little."""
    full, sliding, sinks = (
        perplexity(load(directory / "full", under(pattern)), 512)
        for pattern in ({}, WINDOW, {"sliding_window": 252, "attention_sinks": 4})
    )
    assert full < sliding < 1.05 * full
    assert sliding < sinks < 1.05 * sliding
