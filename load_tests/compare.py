"""Two targets compared in ABBA order: ratios of medians and how sure they are. Pure.

A machine drifts: it warms up, other work comes and goes. In a round A, B, B, A (the next one B, A,
A, B) a steady drift falls on both alike, so a round's two sides are compared with each other, and
the confidence interval comes from resampling whole rounds: requests of one round share its luck.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from load_tests.summary import figure, percentile

Side = Literal["A", "B"]
Round = tuple[Sequence[float], Sequence[float]]  # what A measured in one round, what B did

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians of A and B over all rounds, and B / A with its bootstrap confidence interval.

    The ratio is the geometric mean of the rounds' ratios of medians. NaN where a side measured
    nothing; the interval is NaN below three rounds, which are too few to resample.
    """

    a: float
    b: float
    ratio: float
    low: float
    high: float

    @property
    def added(self) -> float:
        return self.b - self.a

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return "-" if math.isnan(self.ratio) else f"{self.ratio:.3f}{interval}"

    def cells(self) -> tuple[str, str, str]:
        """A, B and the ratio, for a table."""
        return figure(self.a), figure(self.b), str(self)


def order(rounds: int) -> Iterator[tuple[int, Side]]:
    """The blocks to run: round number and side."""
    for number in range(rounds):
        sides: tuple[Side, ...] = ("A", "B", "B", "A") if number % 2 == 0 else ("B", "A", "A", "B")
        for side in sides:
            yield number, side


def compare(rounds: Sequence[Round], seed: int = 0) -> Compared:
    """B against A over ``rounds``; rounds in which a side's median is 0 or of nothing are left
    out."""
    medians = [(percentile(a, 0.5), percentile(b, 0.5)) for a, b in rounds]
    logs = [math.log(b / a) for a, b in medians if a > 0 and b > 0]
    low = high = math.nan
    if len(logs) >= FEWEST_ROUNDS:
        rng = random.Random(seed)
        drawn = [_mean(rng.choices(logs, k=len(logs))) for _ in range(DRAWS)]
        low = percentile(drawn, (1 - CONFIDENCE) / 2)
        high = percentile(drawn, (1 + CONFIDENCE) / 2)
    return Compared(
        a=percentile((value for side, _ in rounds for value in side), 0.5),
        b=percentile((value for _, side in rounds for value in side), 0.5),
        ratio=math.exp(_mean(logs)),
        low=math.exp(low),
        high=math.exp(high),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
