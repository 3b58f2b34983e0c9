"""From measurements to a verdict: what each plan loses against the reference, and which to take.

Pure. The reference is the first plan: full attention, or the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve_app.quality.grid import Answer, Band, Pattern, Result

_ENOUGH_TOKENS = 100  # in a band of distances, before its perplexity is judged
_ENOUGH_FOUND = 0.5  # by the reference, before retrieval says something


@dataclass(frozen=True, slots=True)
class Rise:
    """Perplexity at distances ``low`` to ``high``, and its rise over the reference's as a share."""

    low: int
    high: int
    perplexity: float
    rise: float
    judged: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """The share of questions answered, of those of one context length and depth."""

    length: int
    depth: float
    found: float


@dataclass(frozen=True, slots=True)
class Row:
    """One plan's figures. ``worst_rise`` is the largest rise in perplexity of any judged band."""

    name: str
    pattern: Pattern | None
    plan: str
    perplexity: float
    worst_rise: float
    found: float
    agreement: float
    kv_bytes: int
    decode_ms: float
    rises: tuple[Rise, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rows, the reference first and then the dearest KV cache; names of those within ``loss``; the
    cheapest of them that saves something, or None; and a sentence on it.
    """

    rows: tuple[Row, ...]
    loss: float
    within: frozenset[str]
    recommended: Row | None
    sentence: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        best = self.recommended
        return {
            "loss": self.loss,
            "plans": [{**asdict(row), "within": row.name in self.within} for row in self.rows],
            "recommended": best and {"name": best.name, "local_attention": best.pattern},
            "sentence": self.sentence,
            "warnings": self.warnings,
        }


def judge(
    plans: Mapping[str, Pattern | None],
    results: Mapping[str, Result],
    kv_bytes: Mapping[str, int],
    *,
    loss: float,
    longest: int,
    vocabulary: int,
) -> Verdict:
    """Hold every plan that has a result against the first, which must have one.

    ``longest`` is the longest sequence in tokens, ``vocabulary`` how many tokens there are.

    Within ``loss`` means: in no band does perplexity rise by more than that share, and no more than
    that share of the questions is lost.
    """
    reference, *_ = plans
    rows = [
        _row(name, pattern, results[name], results[reference], kv_bytes[name])
        for name, pattern in plans.items()
        if name in results
    ]
    full, *local = rows
    within = [row for row in local if _lost(row, full) <= loss]
    cheaper = [row for row in within if row.kv_bytes < full.kv_bytes]
    best = min(cheaper, key=lambda row: (row.kv_bytes, row.worst_rise), default=None)
    return Verdict(
        rows=(full, *sorted(local, key=lambda row: -row.kv_bytes)),
        loss=loss,
        within=frozenset(row.name for row in within),
        recommended=best,
        sentence=_sentence(full, local, best, loss),
        warnings=tuple(_warnings(full, results[reference], longest, vocabulary)),
    )


def _row(name: str, pattern: Pattern | None, result: Result, full: Result, kv_bytes: int) -> Row:
    rises = tuple(_rises(result["perplexity"], full["perplexity"]))
    return Row(
        name=name,
        pattern=pattern,
        plan=result["plan"],
        perplexity=perplexity(result["perplexity"]),
        worst_rise=max((rise.rise for rise in rises if rise.judged), default=0.0),
        found=found(result["answers"]),
        agreement=common_share(result["continuations"], full["continuations"]),
        kv_bytes=kv_bytes,
        decode_ms=result["decode_ms"],
        rises=rises,
        cells=tuple(_cells(result["answers"])),
    )


def _rises(ours: Sequence[Band], full: Sequence[Band]) -> Iterator[Rise]:
    for mine, other in zip(ours, full, strict=True):
        yield Rise(
            low=mine["low"],
            high=mine["high"],
            perplexity=math.exp(mine["nats"]),
            rise=math.expm1(mine["nats"] - other["nats"]),
            judged=mine["tokens"] >= _ENOUGH_TOKENS,
        )


def _cells(answers: Sequence[Answer]) -> Iterator[Cell]:
    for length, depth in sorted({(one["length"], one["depth"]) for one in answers}):
        those = [one for one in answers if (one["length"], one["depth"]) == (length, depth)]
        yield Cell(length, depth, found(those))


def perplexity(measured: Sequence[Band]) -> float:
    """Of all tokens together."""
    tokens = sum(band["tokens"] for band in measured)
    return math.exp(sum(band["nats"] * band["tokens"] for band in measured) / tokens)


def found(answers: Iterable[Answer]) -> float:
    """The share of questions answered rightly; 0 where none was asked."""
    right = [one["right"] for one in answers]
    return sum(right) / max(1, len(right))


def common_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How much of each continuation stands before its first difference, averaged."""
    shares = []
    for mine, other in zip(ours, theirs, strict=True):
        same = 0
        while same < min(len(mine), len(other)) and mine[same] == other[same]:
            same += 1
        shares.append(same / max(1, len(other)))
    return sum(shares) / max(1, len(shares))


def _sentence(full: Row, local: Sequence[Row], best: Row | None, loss: float) -> str:
    limit = f"a loss of {loss:.0%}"
    if best is not None:
        return (
            f"The cheapest plan within {limit} is {best.name}: {full.kv_bytes / best.kv_bytes:.1f} "
            f"x less KV cache, {_losses(best, full)}."
        )
    cheaper = [row for row in local if row.kv_bytes < full.kv_bytes]
    if not local:
        return "No local plan was measured."
    if not cheaper:
        return "No plan has a smaller KV cache than the model as it is."
    nearest = min(cheaper, key=lambda row: (_lost(row, full), row.worst_rise))
    return (
        f"No plan stays within {limit}; the nearest is {nearest.name}, {_losses(nearest, full)}. "
        "Keep the model as it is, widen the windows, leave more layers full, or fine-tune the "
        "model with the plan."
    )


def _lost(row: Row, full: Row) -> float:
    """The share that decides: of perplexity or of answers, whichever is the larger."""
    return max(row.worst_rise, full.found - row.found)


def _losses(row: Row, full: Row) -> str:
    return (
        f"perplexity {row.worst_rise:+.1%} at worst, {row.found:.0%} of the questions answered "
        f"({full.name}: {full.found:.0%})"
    )


def _warnings(full: Row, result: Result, longest: int, vocabulary: int) -> Iterator[str]:
    if full.found < _ENOUGH_FOUND:
        yield (
            f"Without a plan the model answers {full.found:.0%} of the questions, so that "
            "retrieval says little of what a plan costs it; judge by perplexity and agreement."
        )
    if full.perplexity > vocabulary:
        yield (
            f"Without a plan perplexity is {full.perplexity:,.0f}, worse than guessing among "
            f"{vocabulary:,} tokens: the model does not know such text, and a rise says little."
        )
    if result["text_tokens"] < longest - 1:
        yield (
            f"The text has {result['text_tokens']:,} tokens, so that perplexity says nothing of "
            f"sequences up to {longest:,}; give a longer --dataset, or lower --max-model-len."
        )
