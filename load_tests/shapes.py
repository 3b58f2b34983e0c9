"""Load that changes over time, beside a locustfile: it sets users, and so the rate, by the clock.

    locust -f load_tests/benchmark.py,load_tests/shapes.py --headless --rate 2 --shape spike

``--shape`` picks one of `SHAPES`; ``--peak`` is its highest number of users and ``--shape-seconds``
its length.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from locust import LoadTestShape, events

STEPS = 5


def steps(part: float) -> float:
    """From a fifth of the peak to the peak, in equal steps: where does goodput stop growing?"""
    return math.ceil(STEPS * part) / STEPS if part > 0 else 1 / STEPS


def spike(part: float) -> float:
    """A fifth of the peak, the peak for the middle fifth, then back: does the queue recover?"""
    return 1.0 if 0.4 <= part < 0.6 else 0.2


def ramp(part: float) -> float:
    """Evenly up and down again: does the way down meet the way up?"""
    return 2 * min(part, 1 - part)


SHAPES: dict[str, Callable[[float], float]] = {"steps": steps, "spike": spike, "ramp": ramp}


def users_at(shape: str, peak: int, part: float) -> int | None:
    """Users at ``part`` (0 to 1) of a shape's length, at least one; None once it is over."""
    return max(1, round(peak * SHAPES[shape](part))) if part < 1 else None


@events.init_command_line_parser.add_listener
def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=tuple(SHAPES), default="steps")
    parser.add_argument("--peak", type=int, default=10, help="users at the shape's highest")
    parser.add_argument("--shape-seconds", type=float, default=60.0)


class Shape(LoadTestShape):
    """Asks the chosen shape how many users there should be now."""

    def tick(self) -> tuple[int, float] | None:
        chosen = self.runner.environment.parsed_options
        part = self.get_run_time() / chosen.shape_seconds
        users = users_at(chosen.shape, chosen.peak, part)
        return None if users is None else (users, float(chosen.peak))
