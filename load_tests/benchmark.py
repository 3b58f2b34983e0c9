"""Mixed traffic of several length classes at an open-loop rate.

    locust -f load_tests/benchmark.py --headless -u 1 -t 60s --rate 4
    locust -f load_tests/benchmark.py --headless -u 1 -t 60s --rate 4 --lengths azure-conversation
    locust -f load_tests/benchmark.py --headless -u 1 --trace trace.csv --speed 2

Each Locust user is one Poisson source that never waits for an answer: a slow server meets the same
load as a fast one. ``-u`` sources send ``-u`` x ``--rate`` requests a second, so Locust's page and
the shapes in ``shapes.py`` change the rate by changing the users. A trace has times of its own: one
user replays it, any other sends nothing, and the test ends with it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import gevent
from locust import events, task
from locust.env import Environment
from locust.exception import StopUser

from load_tests.client import sleep_until
from load_tests.prompts import Prompt, PromptMaker
from load_tests.run import Run, add_arguments, conclude, prompt_maker, refuse
from load_tests.stream import Ask
from load_tests.summary import Targets
from load_tests.traffic import (
    DEMO_CLASSES,
    DEMO_MIX,
    PUBLISHED,
    Deck,
    fresh_salt,
    mix_deck,
    parse_bounds,
    parse_mix,
    poisson,
    published_deck,
    read_trace,
    replay,
)
from load_tests.user import StreamingUser, end


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
    parser.add_argument(
        "--lengths", choices=tuple(PUBLISHED), help="published lengths instead of a mix"
    )
    parser.add_argument(
        "--trace", default="", help="CSV of time,prompt_tokens,output_tokens to replay instead"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace's clock")
    parser.add_argument(
        "--classes",
        default=DEMO_CLASSES,
        help="with --lengths or --trace: name=most_tokens:ttft_ms:itl_ms, with commas",
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=math.inf,
        help="with --lengths or --trace: most tokens of prompt and output",
    )


class OpenLoop(StreamingUser):
    """One source of requests."""

    targets: ClassVar[Mapping[str, Targets]]
    deck: ClassVar[Deck]
    trace: ClassVar[list[tuple[float, Prompt]]]  # times from the start; empty without a trace
    reuse: ClassVar[bool]
    rate: ClassVar[float]
    burstiness: ClassVar[float]
    numbers: ClassVar[count[int]]
    seed: ClassVar[int]

    def on_start(self) -> None:
        super().on_start()
        number = next(self.numbers)
        rng = random.Random(f"{self.seed}/source {number}")
        self.arrivals = self._replay(rng, number) if self.trace else self._poisson(rng)

    def _poisson(self, rng: random.Random) -> Iterator[tuple[float, Ask]]:
        return poisson(
            self.deck, rng, rate=self.rate, burstiness=self.burstiness, start=perf_counter()
        )

    def _replay(self, rng: random.Random, number: int) -> Iterator[tuple[float, Ask]]:
        start = perf_counter()
        for at, prompt in self.trace if number == 0 else ():
            yield start + at, prompt.ask(0 if self.reuse else fresh_salt(rng))
        if number == 0:
            gevent.spawn(end, self.environment)

    @task
    def arrive(self) -> None:
        due, ask = next(self.arrivals, (0.0, None))
        if ask is None:
            raise StopUser
        sleep_until(due)
        self.launch(ask, due)


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
        prepare_traffic(options, maker)
    except (OSError, ValueError) as error:
        refuse(environment, str(error))
    OpenLoop.rate, OpenLoop.burstiness = options.rate, options.burstiness
    OpenLoop.reuse = options.reuse_prompts
    OpenLoop.numbers, OpenLoop.seed = count(), options.seed


def prepare_traffic(options: argparse.Namespace, maker: PromptMaker) -> None:
    """Make every prompt of the run.

    Raises:
        OSError, ValueError: the trace cannot be read; an option is malformed.
    """
    OpenLoop.trace = []
    if not options.trace and not options.lengths:
        mix = parse_mix(options.mix)
        OpenLoop.targets = {each.name: each for each in mix}
        OpenLoop.deck = mix_deck(mix, maker, reuse=options.reuse_prompts)
        return
    bounds, longest = parse_bounds(options.classes), options.longest
    OpenLoop.targets = {each.name: each for each in bounds}
    if options.trace:
        with Path(options.trace).open(newline="", encoding="utf-8") as file:
            trace = read_trace(file)
        seconds = options.run_time or math.inf
        OpenLoop.trace = replay(
            trace, bounds, maker, speed=options.speed, seconds=seconds, longest=longest
        )
    else:
        OpenLoop.deck = published_deck(
            PUBLISHED[options.lengths], bounds, maker, longest=longest, reuse=options.reuse_prompts
        )


@events.test_stop.add_listener
def report(environment: Environment, **_: Any) -> None:
    if OpenLoop.load_run is not None:  # None: refused before it began
        conclude(environment, OpenLoop.load_run, OpenLoop.targets)
