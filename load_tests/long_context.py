"""What length costs: one request at a time over a sweep of prompt lengths, each with a needle.

    locust -f load_tests/long_context.py --headless --lengths 1k,4k,16k,64k

The sweep is shuffled within each repeat, so that a drift of the machine falls on every length
alike, and ends by itself. ``-u`` keeps that many requests under way. Retrieval is reported, not
required: an untrained model, or one whose window forgets, finds nothing.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any, ClassVar

import gevent
from locust import events, task
from locust.env import Environment
from locust.exception import StopUser

from load_tests.prompts import SALT, PromptMaker
from load_tests.run import Run, add_arguments, conclude, prompt_maker, refuse
from load_tests.stream import Ask, Record
from load_tests.summary import columns, figure, percentile
from load_tests.user import StreamingUser, end

DEPTHS = (0.1, 0.5, 0.9)


@events.init_command_line_parser.add_listener
def options(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--lengths", default="256,512,1k,2k,4k", help="prompt tokens, k = 1024")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="requests of each length")


class Sweep(StreamingUser):
    """Takes the next prompt of the sweep when its last answer has ended."""

    left: ClassVar[deque[Ask]] = deque()

    @task
    def next(self) -> None:
        if not self.left:
            raise StopUser
        ask = self.left.popleft()
        is_last = not self.left
        self.launch(ask, perf_counter()).join()
        if is_last:
            assert self.load_run is not None
            self.load_run.join()  # the answers that other users still wait for
            gevent.spawn(end, self.environment)


@events.init.add_listener
def before(environment: Environment, **_: Any) -> None:
    if environment.parsed_options.headless:
        prepare(environment)  # here, before ``--run-time`` begins to count
        gevent.sleep(0)  # the event loop's clock stood still: wake it, or the run is cut short


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    if not environment.parsed_options.headless:
        prepare(environment)  # only now has the page given the host
    Sweep.load_run = Run.open(environment, "long-context")


def prepare(environment: Environment) -> None:
    options = environment.parsed_options
    Sweep.load_run = None
    maker = prompt_maker(environment)
    try:
        lengths = [parse_length(text) for text in options.lengths.split(",")]
        Sweep.left = sweep(maker, lengths, options.repeats, options.output_tokens)
    except ValueError as error:
        refuse(environment, str(error))


@events.test_stop.add_listener
def report(environment: Environment, **_: Any) -> None:
    if Sweep.load_run is not None:  # None: refused before it began
        conclude(environment, Sweep.load_run, {})
        print(f"\n{cost_table(Sweep.load_run.records)}\n")


def parse_length(text: str) -> int:
    """``4096`` or ``4k``."""
    number, thousand = text.strip().lower(), 1024
    return int(number[:-1]) * thousand if number.endswith("k") else int(number)


def sweep(
    maker: PromptMaker, lengths: Sequence[int], repeats: int, output_tokens: int
) -> deque[Ask]:
    """Every length once in each repeat, in a new order, the needle at the next depth."""
    rng, asks = random.Random(maker.seed), []
    for repeat in range(repeats):
        for length in rng.sample(lengths, len(lengths)):
            depth = DEPTHS[repeat % len(DEPTHS)]
            prompt = maker.make(str(length), length, output_tokens, depth=depth)
            asks.append(prompt.ask(rng.randrange(10 ** len(SALT))))
    return deque(asks)


def cost_table(records: Sequence[Record]) -> str:
    """Prefill and decode cost and needles found, a line for each length; medians."""
    lines: list[Sequence[str]] = [
        ("prompt", "served", "prefill", "", "decode", "", "needles"),
        ("tokens", "", "s", "tok/s", "ms/tok", "tok/s", "found"),
    ]
    for tokens in sorted({record.prompt_tokens_asked for record in records}):
        asked = [record for record in records if record.prompt_tokens_asked == tokens]
        ok = [record for record in asked if record.outcome == "ok" and record.ttft_ms is not None]
        ttft = percentile((r.ttft_ms for r in ok if r.ttft_ms is not None), 0.5)
        itl = percentile((r.itl_ms for r in ok if r.itl_ms is not None), 0.5)
        found = sum(record.found is True for record in ok)
        lines.append(
            (
                f"{tokens:,}",
                f"{len(ok)}/{len(asked)}",
                figure(ttft / 1e3),
                figure(1e3 * tokens / ttft),
                figure(itl),
                figure(1e3 / itl),
                f"{found}/{len(ok)}",
            )
        )
    return columns(lines, rule_after=2)
