"""Mixed traffic of several length classes at an open-loop Poisson rate.

    locust -f load_tests/benchmark.py --headless -u 1 -t 60s --rate 4

Each Locust user is one Poisson source that never waits for an answer: a slow server meets the same
load as a fast one. ``-u`` sources send ``-u`` x ``--rate`` requests a second, so Locust's page and
the shapes in ``shapes.py`` change the rate by changing the users.
"""

from __future__ import annotations

import argparse
import random
from itertools import count
from time import perf_counter
from typing import Any, ClassVar

import gevent
from locust import events, task
from locust.env import Environment

from load_tests.client import StreamingUser, sleep_until
from load_tests.prompts import DEMO_MIX, Deck, LengthClass, parse_mix
from load_tests.run import Run, add_arguments, conclude, prompt_maker, refuse


@events.init_command_line_parser.add_listener
def options(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--rate", type=float, default=1.0, help="requests/s of each user")
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="gamma shape of the arrivals: 1 is Poisson, below 1 comes in bursts",
    )
    parser.add_argument(
        "--mix", default=DEMO_MIX, help="name=share:low-high:output:ttft_ms:itl_ms, with commas"
    )


class OpenLoop(StreamingUser):
    """One Poisson source."""

    mix: ClassVar[list[LengthClass]]
    deck: ClassVar[Deck]
    rate: ClassVar[float]
    burstiness: ClassVar[float]
    numbers: ClassVar[count[int]]
    seed: ClassVar[int]

    def on_start(self) -> None:
        super().on_start()
        self.rng = random.Random(f"{self.seed}/source {next(self.numbers)}")
        self.next_at = perf_counter()

    @task
    def arrive(self) -> None:
        self.next_at += self.rng.gammavariate(self.burstiness, 1 / (self.burstiness * self.rate))
        sleep_until(self.next_at)
        self.launch(self.deck.draw(self.rng), self.next_at)


@events.init.add_listener
def before(environment: Environment, **_: Any) -> None:
    if environment.parsed_options.headless:
        prepare(environment)  # here, before ``--run-time`` begins to count
        gevent.sleep(0)  # the event loop's clock stood still: wake it, or the run is cut short


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    if not environment.parsed_options.headless:
        prepare(environment)  # only now has the page given the host
    OpenLoop.load_run = Run.open(environment, "benchmark")


def prepare(environment: Environment) -> None:
    options = environment.parsed_options
    OpenLoop.load_run = None
    maker = prompt_maker(environment)
    try:
        OpenLoop.mix = parse_mix(options.mix)
        OpenLoop.deck = Deck(OpenLoop.mix, maker, reuse=options.reuse_prompts)
    except ValueError as error:
        refuse(environment, str(error))
    OpenLoop.rate, OpenLoop.burstiness = options.rate, options.burstiness
    OpenLoop.numbers, OpenLoop.seed = count(), options.seed


@events.test_stop.add_listener
def report(environment: Environment, **_: Any) -> None:
    if OpenLoop.load_run is not None:  # None: refused before it began
        targets = {each.name: each for each in OpenLoop.mix}
        conclude(environment, OpenLoop.load_run, targets)
