"""What a plan loses against full attention, and which one is recommended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from serve_app.quality.grid import Result, make_grid
from serve_app.quality.verdict import Verdict, common_share, judge

LENGTHS, DEPTHS = (256, 512), (0.1, 0.9)
PLANS = make_grid(
    windows=[256], chunks=[], sinks=[0], full_every=[0, 4], longest=1024, layers=8
).plans
KV_BYTES = {"full": 1000, "window 256": 250, "window 256, 1/4 full": 400}


def result(nats: Sequence[float], right: Sequence[bool], says: int, tokens: int = 128) -> Result:
    """Two bands of perplexity, four questions and two continuations."""
    cells = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    edges = [(0, 128), (128, 256)]
    return {
        "plan": "words",
        "block_size": 16,
        "text_tokens": 1023,
        "perplexity": [
            {"low": low, "high": high, "tokens": tokens, "nats": each}
            for (low, high), each in zip(edges, nats, strict=True)
        ],
        "answers": [
            {"length": length, "depth": depth, "tokens": length, "right": yes, "said": ""}
            for (length, depth), yes in zip(cells, right, strict=True)
        ],
        "continuations": [[1, 2, 3, 4], [5, 6, says, 8]],
        "decode_ms": 2.0,
    }


RESULTS = {
    "full": result((1.0, 1.0), (True, True, True, True), 7),
    "window 256": result((1.0, 1.2), (False, True, False, False), 9),
    "window 256, 1/4 full": result((1.0, 1.01), (True, True, True, True), 7),
}


def verdict(loss: float = 0.05, **changes: Any) -> Verdict:
    results: Mapping[str, Result] = {**RESULTS, **changes}
    return judge(PLANS, results, KV_BYTES, loss=loss, longest=1024, vocabulary=264)


def test_a_row_holds_a_plan_against_full_attention() -> None:
    full, mixed, bare = verdict().rows
    assert (full.name, mixed.name, bare.name) == ("full", "window 256, 1/4 full", "window 256")
    assert (full.worst_rise, full.found, full.agreement) == (0, 1, 1)
    assert full.perplexity == pytest.approx(math.e)
    assert bare.worst_rise == pytest.approx(math.exp(0.2) - 1)
    assert [rise.rise for rise in bare.rises] == pytest.approx([0, math.exp(0.2) - 1])
    assert [(cell.length, cell.depth, cell.found) for cell in bare.cells] == [
        (256, 0.1, 0),
        (256, 0.9, 1),
        (512, 0.1, 0),
        (512, 0.9, 0),
    ]
    assert bare.agreement == 0.75


def test_agreement_ends_at_the_first_difference() -> None:
    assert common_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert common_share([[1], [2]], [[1], [3]]) == 0.5


def test_a_band_of_few_tokens_is_not_judged() -> None:
    few = result((1.0, 9.0), (True,) * 4, 7, tokens=3)
    rises = {row.name: row.worst_rise for row in verdict(**{"window 256": few}).rows}
    assert rises["window 256"] == 0


def test_the_cheapest_plan_within_the_loss_is_recommended() -> None:
    strict = verdict(0.05)
    assert strict.recommended is not None
    assert strict.recommended.name == "window 256, 1/4 full"
    assert strict.within == {"window 256, 1/4 full"}
    assert "2.5 x less KV cache, perplexity +1.0% at worst, 100%" in strict.sentence
    lenient = verdict(0.9)
    assert lenient.recommended is not None
    assert lenient.recommended.name == "window 256"


def test_lost_answers_count_as_a_loss_too() -> None:
    forgets = result((1.0, 1.0), (True, True, True, False), 7)
    assert "window 256" not in verdict(0.2, **{"window 256": forgets}).within
    assert "window 256" in verdict(0.3, **{"window 256": forgets}).within


def test_where_no_plan_is_good_enough_it_says_so_and_names_the_nearest() -> None:
    none = verdict(0.001)
    assert none.recommended is None
    assert none.sentence.startswith("No plan stays within a loss of 0%; the nearest is window 256,")
    alone = judge(
        PLANS, {"full": RESULTS["full"]}, KV_BYTES, loss=0.05, longest=1024, vocabulary=264
    )
    assert alone.sentence == "No local plan was measured."


def test_a_plan_that_saves_nothing_is_not_recommended() -> None:
    own = judge(PLANS, RESULTS, {**KV_BYTES, "full": 300}, loss=0.05, longest=1024, vocabulary=264)
    assert own.within == {"window 256, 1/4 full"}
    assert own.recommended is None
    assert "the nearest is window 256," in own.sentence
    small = judge(
        PLANS, RESULTS, {**KV_BYTES, "full": 200}, loss=0.05, longest=1024, vocabulary=264
    )
    assert small.sentence == "No plan has a smaller KV cache than the model as it is."


def test_a_model_that_finds_nothing_is_not_judged_by_retrieval() -> None:
    lost = result((1.0, 1.0), (False, False, False, True), 7)
    (warning,) = verdict(full=lost).warnings
    assert "answers 25% of the questions" in warning
    assert not verdict().warnings


def test_a_text_shorter_than_the_longest_sequence_is_warned_of() -> None:
    (warning,) = judge(PLANS, RESULTS, KV_BYTES, loss=0.05, longest=2048, vocabulary=264).warnings
    assert "The text has 1,023 tokens" in warning


def test_a_text_that_the_model_does_not_know_is_warned_of() -> None:
    strange = result((6.0, 6.0), (True, True, True, True), 7)
    (warning,) = verdict(full=strange).warnings
    assert "perplexity is 403, worse than guessing among 264 tokens" in warning
