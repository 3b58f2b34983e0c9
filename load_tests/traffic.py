"""What to send: mixes of length classes, published length distributions, and traces."""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from load_tests.prompts import SALT, Prompt, PromptMaker
from load_tests.stream import Ask

# Fits the demo's two pools (1,024 and 8,192 tokens) on a few CPU cores.
DEMO_MIX = (
    "short=0.70:150-400:32:1000:100,medium=0.25:400-900:32:2000:100,long=0.05:2000-4000:32:8000:200"
)
DEMO_CLASSES = "short=1000:1000:100,long=:8000:200"


@dataclass(frozen=True, slots=True)
class LengthClass:
    """Requests of like length: their share of the traffic and what counts as good service."""

    name: str
    share: float
    prompt_tokens: tuple[int, int]  # lowest and highest, both included
    output_tokens: int
    ttft_target_ms: float
    itl_target_ms: float


def parse_mix(text: str) -> list[LengthClass]:
    """Read ``name=share:low-high:output:ttft_ms:itl_ms`` entries, separated by commas."""
    return [_parse_class(entry.strip()) for entry in text.split(",")]


def _parse_class(entry: str) -> LengthClass:
    try:
        name, _, fields = entry.partition("=")
        share, prompt, output, ttft, itl = fields.split(":")
        low, _, high = prompt.partition("-")
        lengths = int(low), int(high or low)
        parsed = LengthClass(name, float(share), lengths, int(output), float(ttft), float(itl))
    except ValueError:
        message = f"length class {entry!r} is not name=share:low-high:output:ttft_ms:itl_ms"
        raise ValueError(message) from None
    if parsed.share <= 0 or not 0 < lengths[0] <= lengths[1] or parsed.output_tokens < 1:
        raise ValueError(f"length class {entry!r} needs a share, lengths and an output above 0")
    return parsed


@dataclass(frozen=True, slots=True)
class Bound:
    """A length class of given lengths: prompts of up to ``most_tokens`` that no other takes."""

    name: str
    most_tokens: float
    ttft_target_ms: float
    itl_target_ms: float


def parse_bounds(text: str) -> list[Bound]:
    """Read ``name=most_tokens:ttft_ms:itl_ms`` entries, separated by commas, shortest first; the
    last has no ``most_tokens``."""
    return sorted(map(_parse_bound, text.split(",")), key=lambda bound: bound.most_tokens)


def _parse_bound(entry: str) -> Bound:
    try:
        name, _, fields = entry.strip().partition("=")
        most, ttft, itl = fields.split(":")
        return Bound(name, int(most) if most else math.inf, float(ttft), float(itl))
    except ValueError:
        message = f"length class {entry!r} is not name=most_tokens:ttft_ms:itl_ms"
        raise ValueError(message) from None


def class_of(bounds: Sequence[Bound], prompt_tokens: int) -> str:
    """The first class that takes so long a prompt, or else the last."""
    return next((b.name for b in bounds if prompt_tokens <= b.most_tokens), bounds[-1].name)


def spread(low: int, high: int, count: int) -> list[int]:
    """``count`` lengths from ``low`` to ``high``, evenly spaced in their logarithm."""
    if count == 1 or low == high:
        return [high] * count
    step = math.log(high / low) / (count - 1)
    return [round(low * math.exp(step * i)) for i in range(count)]


class Deck:
    """Draws prepared prompts at random, group by share, with a fresh salt each time."""

    def __init__(
        self, groups: Sequence[tuple[float, Sequence[Prompt]]], *, reuse: bool = False
    ) -> None:
        """``groups`` are shares and prompts. ``reuse`` keeps the salt: a prefix cache may
        answer."""
        self._shares = [share for share, _ in groups]
        self._prompts = [prompts for _, prompts in groups]
        self._reuse = reuse

    def draw(self, rng: random.Random, salts: random.Random | None = None) -> Ask:
        """One prompt, chosen by ``rng``, salted by ``salts`` (by default the same)."""
        (prompts,) = rng.choices(self._prompts, self._shares)
        prompt = rng.choice(prompts)
        return prompt.ask(0 if self._reuse else fresh_salt(salts or rng))


def fresh_salt(rng: random.Random) -> int:
    return rng.randrange(10 ** len(SALT))


def mix_deck(
    mix: Sequence[LengthClass], maker: PromptMaker, *, variants: int = 8, reuse: bool = False
) -> Deck:
    """A deck of ``variants`` prompts of each class."""

    def prompts(each: LengthClass) -> list[Prompt]:
        return [
            maker.make(each.name, tokens, each.output_tokens, depth=(i + 0.5) / variants)
            for i, tokens in enumerate(spread(*each.prompt_tokens, variants))
        ]

    return Deck([(each.share, prompts(each)) for each in mix], reuse=reuse)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Published quantiles of prompt and output lengths, in tokens, at ``levels``. Between them,
    lengths are interpolated in logarithms."""

    levels: tuple[float, ...]
    prompt: tuple[int, ...]
    output: tuple[int, ...]

    def prompt_at(self, level: float) -> int:
        return self._at(self.prompt, level)

    def output_at(self, level: float) -> int:
        return self._at(self.output, level)

    def _at(self, values: tuple[int, ...], level: float) -> int:
        place = min(bisect_right(self.levels, level), len(values) - 1)
        (low, high), (a, b) = self.levels[place - 1 : place + 1], values[place - 1 : place + 1]
        return round(a * math.exp(math.log(b / a) * (level - low) / (high - low)))


LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)
# Azure: LLM inference traces of November 2023, github.com/Azure/AzurePublicDataset (CC-BY),
# described in Patel et al., "Splitwise", ISCA 2024. LMSYS-Chat-1M: Zheng et al., ICLR 2024, table 1
# has the means (69.5 tokens a prompt, 214.5 a response) and no quantiles; these are those of an
# exponential distribution of that mean, cut so that the interpolated mean is the published one.
PUBLISHED = {
    "azure-conversation": Quantiles(
        LEVELS, prompt=(1, 207, 1020, 2735, 14050), output=(1, 54, 129, 424, 1000)
    ),
    "azure-code": Quantiles(LEVELS, prompt=(1, 147, 1469, 5194, 7437), output=(1, 7, 13, 55, 1899)),
    "lmsys-chat": Quantiles(LEVELS, prompt=(1, 7, 48, 160, 329), output=(1, 23, 149, 494, 998)),
}
DRAWS = 64  # prompts prepared from a published distribution, at evenly spaced quantiles


def published_deck(
    lengths: Quantiles,
    bounds: Sequence[Bound],
    maker: PromptMaker,
    *,
    longest: float = math.inf,
    reuse: bool = False,
) -> Deck:
    """A deck with the prompt and output lengths of ``lengths``, drawn independently."""
    levels = [(i + 0.5) / DRAWS for i in range(DRAWS)]
    outputs = random.Random(maker.seed).sample(levels, DRAWS)
    prompts = [
        _prompt(maker, bounds, lengths.prompt_at(one), lengths.output_at(other), longest)
        for one, other in zip(levels, outputs, strict=True)
    ]
    return Deck([(1.0, prompts)], reuse=reuse)


def _prompt(
    maker: PromptMaker, bounds: Sequence[Bound], tokens: int, output: int, longest: float
) -> Prompt:
    """A prompt of about these lengths: not shorter than its needle needs, and not longer with its
    answer than ``longest``."""
    output = int(min(output, longest // 2))
    tokens = int(min(max(tokens, maker.shortest()), longest - output))
    return maker.make(class_of(bounds, tokens), tokens, output)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; ``at`` is seconds from its start."""

    at: float
    prompt_tokens: int
    output_tokens: int


def read_trace(file: TextIO) -> list[Arrival]:
    """A CSV of time, prompt tokens and output tokens, with or without a header. Times are seconds
    or, as in Azure's files, dates; these count from the first.

    Raises:
        ValueError: naming the line that is none of these.
    """
    arrivals = []
    for number, row in enumerate(csv.reader(file), 1):
        if not row or (number == 1 and not any(cell.strip().isdigit() for cell in row)):
            continue
        try:
            at, prompt, output = row
            arrival = Arrival(_time(at), int(prompt), int(output))
        except ValueError:
            message = f"line {number} of the trace, {','.join(row)!r}, is not time,prompt,output"
            raise ValueError(message) from None
        if arrival.prompt_tokens < 0 or arrival.output_tokens < 0 or arrival.at < 0:
            raise ValueError(f"line {number} of the trace has a negative number")
        arrivals.append(arrival)
    if not arrivals:
        raise ValueError("the trace is empty")
    arrivals.sort(key=lambda arrival: arrival.at)
    first = arrivals[0].at if arrivals[0].at > _YEAR_S else 0.0
    return [Arrival(a.at - first, a.prompt_tokens, a.output_tokens) for a in arrivals]


_YEAR_S = 3.2e7  # no trace is that long: a time beyond it is a date


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def replay(
    trace: Sequence[Arrival],
    bounds: Sequence[Bound],
    maker: PromptMaker,
    *,
    speed: float,
    seconds: float = math.inf,
    longest: float = math.inf,
) -> list[tuple[float, Prompt]]:
    """Prompts for what of ``trace`` falls into its first ``seconds`` when it runs ``speed`` times
    as fast, each with its time."""
    return [
        (a.at / speed, _prompt(maker, bounds, a.prompt_tokens, max(1, a.output_tokens), longest))
        for a in trace
        if a.at / speed < seconds
    ]


def poisson(
    deck: Deck, rng: random.Random, *, rate: float, burstiness: float, start: float
) -> Iterator[tuple[float, Ask]]:
    """Endless arrivals after ``start`` with gamma gaps: ``burstiness`` 1 is Poisson, below it
    they come in bursts."""
    at = start
    while True:
        at += rng.gammavariate(burstiness, 1 / (burstiness * rate))
        yield at, deck.draw(rng)
