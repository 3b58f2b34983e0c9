"""The plans of a grid, their names, and what a job's numbers may be."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.pattern import LocalAttention
from serve_app.quality.grid import (
    bands,
    context_lengths,
    counts,
    make_grid,
    name_of,
    numbers,
)


def grid(**changes: Any) -> Any:
    asked: dict[str, Any] = {
        "windows": [256, 512, None],
        "chunks": [],
        "sinks": [0, 64],
        "full_every": [0, 4],
        "longest": 4096,
        "layers": 8,
    }
    return make_grid(**{**asked, **changes})


def test_it_has_every_plan_once_and_full_attention_first() -> None:
    plans = grid().plans
    assert next(iter(plans.items())) == ("full", None)
    assert len(plans) == 1 + 2 * 2 * 2
    assert plans["window 512+64, 1/4 full"] == {
        "sliding_window": 512,
        "attention_sinks": 64,
        "full_attention_every": 4,
    }
    assert grid(windows=[256, 256]).plans == grid(windows=[256]).plans


def test_every_plan_is_one_that_the_plugin_takes_and_names_are_its_own() -> None:
    plans = grid(chunks=[128]).plans
    patterns = [pattern for pattern in plans.values() if pattern]
    assert len({LocalAttention(**pattern).rules(8) for pattern in patterns}) == len(patterns)
    assert [name_of(pattern) for pattern in patterns] == list(plans)[1:]


def test_sinks_go_with_windows_only() -> None:
    assert list(grid(windows=[None], chunks=[256], sinks=[64]).plans) == [
        "full",
        "chunk 256",
        "chunk 256, 1/4 full",
    ]


def test_plans_that_are_full_attention_are_left_out_with_a_sentence() -> None:
    made = grid(windows=[256, 4096], sinks=[0], full_every=[0, 1, 9])
    assert list(made.plans) == ["full", "window 256"]
    assert len(made.left_out) == 3
    assert made.left_out[0].startswith("--full-every 1 leaves every layer full")
    assert made.left_out[1].startswith("--full-every 9 leaves none of 8 layers full, as 0 does;")
    assert made.left_out[2].startswith("sliding_window 4096 holds all 4096 tokens")


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="sliding_window"):
        grid(windows=[0])


def test_numbers_are_read_as_people_write_them() -> None:
    assert numbers("--windows", "256, 1k,Full", full=True) == [256, 1024, None]
    assert counts("--sinks", "0,64") == [0, 64]


@pytest.mark.parametrize("text", ["many", "", "64,", "-1", "full", "1.5k", "²"])
def test_other_words_are_refused_with_the_option_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--sinks is .*such as 0,64"):
        counts("--sinks", text)


def test_bands_double_and_cover_the_longest() -> None:
    assert bands(1000) == [(0, 128), (128, 256), (256, 512), (512, 1000)]
    assert bands(1100) == [(0, 128), (128, 256), (256, 512), (512, 1100)]
    assert bands(128) == [(0, 128)]


def test_contexts_end_with_the_longest_that_leaves_room_for_an_answer() -> None:
    assert context_lengths(None, 8192) == (1024, 2048, 4096, 8144)
    assert context_lengths(None, 2048) == (512, 1024, 2000)
    assert context_lengths(None, 256) == (208,)
    assert context_lengths("2k,256,256", 4096) == (256, 2048)


@pytest.mark.parametrize("text", ["1024", "64", "0"])
def test_contexts_too_long_or_too_short_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="from 128 to 976 tokens"):
        context_lengths(text, 1024)
