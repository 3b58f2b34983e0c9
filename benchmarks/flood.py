"""Short requests under a flood of long ones: two systems, the same arrivals, in ABBA order.

    python -m benchmarks.flood --a default:benchmarks/configs/mixed-cpu.yaml \\
        --b ours:configs/demo-cpu.yaml

Both systems are up at once, each in a Ray session of its own, and take turns; the idle one costs
next to nothing. Arrivals are open-loop and Poisson: short requests all the time, long ones at a
rate of their own. A block ends when its last answer has. Prints a Markdown table last and leaves
every request in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.session import Session, System
from load_tests.compare import Side, order
from load_tests.prompts import SALT, text_of
from load_tests.stream import Ask, Record
from load_tests.summary import CPU_LIMIT, figure, percentile

Name = Literal["short", "long"]
NAMES: tuple[Name, ...] = ("short", "long")
SALT_ROOM = len(SALT) + 1
SIDES: tuple[Side, Side] = ("A", "B")
TARGET_SHORT = 5.0  # short-class p99 TTFT, A / B at least
TARGET_LONG = 1.2  # long-class p99 TTFT, B / A at most


@dataclass(frozen=True, slots=True)
class Traffic:
    """One class of requests: Poisson arrivals a second, prompt lengths drawn evenly, in bytes."""

    name: Name
    rate: float
    prompt: tuple[int, int]
    output: int


class Writer:
    """Makes request bodies; a byte of text is a token of the models measured here."""

    def __init__(self, model: str, longest: int) -> None:
        self._model = model
        self._text = text_of(random.Random(0), longest)

    def ask(self, traffic: Traffic, prompt: int, salt: int) -> Ask:
        text = f"{salt:0{len(SALT)}d} {self._text}"[:prompt]
        fields = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": traffic.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(fields).encode()
        return Ask(traffic.name, "/v1/chat/completions", body, prompt, traffic.output)


def arrivals(
    mix: Sequence[Traffic], seconds: float, writer: Writer, trace: str, salts: random.Random
) -> list[tuple[float, Ask]]:
    """The requests of one block. Times and lengths depend on ``trace`` alone."""
    made: list[tuple[float, Ask]] = []
    for traffic in mix:
        rng = random.Random(f"{trace}/{traffic.name}")
        for at in _poisson(rng, traffic.rate, seconds):
            prompt = rng.randint(*traffic.prompt)
            made.append((at, writer.ask(traffic, prompt, salts.randrange(10 ** len(SALT)))))
    return sorted(made, key=lambda each: each[0])


def _poisson(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = rng.expovariate(rate) if rate else seconds
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side did in one block."""

    block: int
    side: Side
    records: list[Record]
    client_cpu: float


def measure(
    sessions: dict[Side, Session],
    mix: Sequence[Traffic],
    writer: Writer,
    *,
    seconds: float,
    rounds: int,
    seed: int,
) -> Iterator[Measured]:
    """Warm both sides up, then run the blocks."""
    # Here, because Locust patches the whole process when it is imported.
    from load_tests.drive import cpu_share, headers_of, open_loop

    headers = headers_of("")
    salts = random.Random(f"{seed}/salts")
    for side in SIDES:
        for _ in range(2):
            warm = [
                (i / 10, writer.ask(each, each.prompt[i % 2], salts.randrange(10 ** len(SALT))))
                for each in mix
                for i in range(10 if each.name == "short" else 4)
            ]
            open_loop(sessions[side].url, warm, headers)
    for block, (number, side) in enumerate(order(rounds)):
        schedule = arrivals(mix, seconds, writer, f"{seed}/{number}", salts)
        with cpu_share() as share:
            records = open_loop(sessions[side].url, schedule, headers)
        yield Measured(block, side, records, share[0])


def ttft(blocks: Sequence[Measured], side: Side, name: Name) -> list[float]:
    """Times to the first token of what was answered."""
    return [
        record.ttft_ms
        for block in blocks
        if block.side == side
        for record in block.records
        if record.length_class == name and record.outcome == "ok" and record.ttft_ms is not None
    ]


def e2e(blocks: Sequence[Measured], side: Side, name: Name) -> list[float]:
    return [
        record.e2e_ms
        for block in blocks
        if block.side == side
        for record in block.records
        if record.length_class == name and record.outcome == "ok" and record.e2e_ms is not None
    ]


def table(systems: dict[Side, System], blocks: Sequence[Measured]) -> str:
    """Times to first token by class and side, and how the sides compare, in Markdown."""
    lines = [
        "| class | system | requests | failed | TTFT p50 ms | p95 | p99 | e2e p50 ms | p99 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in NAMES:
        for side in SIDES:
            mine = [
                record
                for block in blocks
                if block.side == side
                for record in block.records
                if record.length_class == name
            ]
            failed = sum(record.outcome != "ok" for record in mine)
            first, whole = ttft(blocks, side, name), e2e(blocks, side, name)
            times = [
                *(percentile(first, q) for q in (0.5, 0.95, 0.99)),
                *(percentile(whole, q) for q in (0.5, 0.99)),
            ]
            cells = [name, f"{side} {systems[side]}", str(len(mine)), str(failed)]
            lines.append("| " + " | ".join([*cells, *(figure(each) for each in times)]) + " |")
    return "\n".join([*lines, "", *_verdicts(blocks)])


def _verdicts(blocks: Sequence[Measured]) -> Iterator[str]:
    for name, target in (("short", TARGET_SHORT), ("long", TARGET_LONG)):
        a, b = (ttft(blocks, side, name) for side in SIDES)  # type: ignore[arg-type]
        better = name == "short"
        ratios = [
            percentile(a, q) / percentile(b, q) if better else percentile(b, q) / percentile(a, q)
            for q in (0.5, 0.95, 0.99)
        ]
        shown = ", ".join(figure(ratio) for ratio in ratios)
        met = ratios[2] >= target if better else ratios[2] <= target
        says = "A / B (target at least 5 at p99)" if better else "B / A (target at most 1.2 at p99)"
        yield f"- {name}: TTFT {says}: {shown} at p50, p95, p99: {'met' if met else 'MISSED'}."
    busiest = max(block.client_cpu for block in blocks)
    full = " INVALID: the client was full." if busiest >= CPU_LIMIT else ""
    yield f"- The client used {busiest:.0%} of a core in its busiest block.{full}"


def pair(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--a", required=True, type=System.parse, help="KIND:CONFIG compared with")
    parser.add_argument("--b", required=True, type=System.parse, help="KIND:CONFIG of the other")
    parser.add_argument("--short", type=pair, default=(32, 128), help="prompt tokens, LOW-HIGH")
    parser.add_argument("--short-rate", type=float, default=3.0, help="requests/s")
    parser.add_argument("--short-output", type=int, default=16, help="tokens")
    parser.add_argument("--long", type=pair, default=(6000, 8000), help="prompt tokens, LOW-HIGH")
    parser.add_argument(
        "--load", type=float, default=0.9, help="long requests, as a share of what A's engines do"
    )
    parser.add_argument("--engines", type=int, default=2, help="of each system")
    parser.add_argument("--long-output", type=int, default=16, help="tokens")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in a block")
    parser.add_argument("--rounds", type=int, default=1, help="of four blocks each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/flood"))
    return parser.parse_args()


def alone_s(url: str, writer: Writer, long: Traffic) -> float:
    """Seconds to the first token of one long request and nothing else: the median of four."""
    from load_tests.drive import closed_loop, headers_of

    middle, rng = sum(long.prompt) // 2, random.Random()
    asks = [writer.ask(long, middle, rng.randrange(10 ** len(SALT))) for _ in range(5)]
    records = closed_loop(url, asks, 1, headers_of(""))
    if error := next((record.error for record in records if record.error), None):
        raise RuntimeError(f"a long request failed: {error}")
    return percentile([record.ttft_ms or 0.0 for record in records[1:]], 0.5) / 1e3


def run(chosen: argparse.Namespace, sessions: dict[Side, Session], model: str) -> str:
    """Measure, write every request down, and return the table."""
    writer = Writer(model, chosen.long[1])
    short = Traffic("short", chosen.short_rate, chosen.short, chosen.short_output)
    long = Traffic("long", 0.0, chosen.long, chosen.long_output)
    service = alone_s(sessions["A"].url, writer, long)
    mix = (short, replace(long, rate=chosen.load * chosen.engines / service))
    shown = (
        f"Short: {short.rate:g}/s of {short.prompt[0]}-{short.prompt[1]} tokens. Long: "
        f"{mix[1].rate:.2f}/s of {long.prompt[0]}-{long.prompt[1]} tokens, {service:.3f} s each "
        f"alone: {chosen.load:.0%} of what {chosen.engines} engines do. {short.output} and "
        f"{long.output} tokens out; blocks of {chosen.seconds:g} s."
    )
    print(shown, flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    blocks = []
    with (chosen.out / "requests.jsonl").open("w") as file:
        for block in measure(
            sessions,
            mix,
            writer,
            seconds=chosen.seconds,
            rounds=chosen.rounds,
            seed=chosen.seed,
        ):
            blocks.append(block)
            for record in block.records:
                line = {"block": block.block, "side": block.side, **asdict(record)}
                file.write(json.dumps(line) + "\n")
            says = {n: figure(percentile(ttft([block], block.side, n), 0.99)) for n in NAMES}
            print(f"block {block.block}: {block.side}, TTFT p99 ms: {says}", flush=True)
    systems = {side: session.system for side, session in sessions.items()}
    return f"{shown}\n\n{table(systems, blocks)}"


def main() -> None:
    from serve_app.config import load_config

    chosen = arguments()
    systems: dict[Side, System] = {"A": chosen.a, "B": chosen.b}
    with ExitStack() as stack:
        sessions = {side: Session(system) for side, system in systems.items()}  # starting together
        for session in sessions.values():
            stack.callback(session.stop)
        for session in sessions.values():
            session.wait()
        print(run(chosen, sessions, load_config(chosen.b.config).served_model_name))


if __name__ == "__main__":
    main()
