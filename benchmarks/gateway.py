"""What the gateway adds: the same requests through it and at the engine's own port, in ABBA order.

    python benchmarks/gateway.py --gateway http://127.0.0.1:8000 --engine http://127.0.0.1:41234 \\
        --engine-header "x-engine-token: ..."

Streams run closed-loop: each sends its next request when its last has ended. A body is text up to
``--longest-prompt`` bytes (set it for a real engine's context) and blanks between JSON tokens from
there on, which cost reading but make no tokens. A size that either side refuses is reported as
refused, with its answer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from load_tests.compare import Compared, Side, compare, order
from load_tests.drive import closed_loop, cpu_share, headers_of
from load_tests.prompts import first_model, text_of
from load_tests.stream import Ask, Record
from load_tests.summary import CPU_LIMIT, columns, figure, finite

SALT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: A is the engine, B the gateway."""

    streams: int
    body_bytes: int
    ttft: Compared
    e2e: Compared
    failed: int
    error: str | None
    client_cpu: float  # of one core; a full client hides what the gateway adds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the time that the gateway adds.")
    parser.add_argument("--gateway", required=True, help="base URL of the gateway")
    parser.add_argument("--engine", required=True, help="base URL of the engine behind it")
    parser.add_argument("--engine-header", default="", help="'Name: value' that the engine wants")
    parser.add_argument("--gateway-header", default="", help="'Name: value' that the gateway wants")
    parser.add_argument("--model", default="", help="default: the first that the gateway lists")
    parser.add_argument("--streams", type=numbers, default=[1, 8, 32], help="comma-separated")
    parser.add_argument(
        "--bodies", type=numbers, default=[1 << 10, 1 << 15, 1 << 20], help="bytes, commas"
    )
    parser.add_argument("--longest-prompt", type=int, default=1 << 30, help="bytes of text")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4, help="of each stream in a block")
    parser.add_argument("--rounds", type=int, default=4, help="of four blocks each")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    chosen = arguments()
    hosts: dict[Side, str] = {"A": chosen.engine.rstrip("/"), "B": chosen.gateway.rstrip("/")}
    headers: dict[Side, dict[str, str]] = {
        "A": headers_of(chosen.engine_header),
        "B": headers_of(chosen.gateway_header),
    }
    model = chosen.model or first_model(hosts["B"], headers["B"])
    cells = []
    for body_bytes in chosen.bodies:
        for streams in chosen.streams:
            print(f"{streams} streams, bodies of {body_bytes:,} bytes", file=sys.stderr, flush=True)
            cells.append(measure(chosen, hosts, headers, model, streams, body_bytes))
    print(gateway_table(cells))
    if chosen.out:
        chosen.out.write_text(json.dumps(finite({"command": sys.argv, "cells": cells}), indent=1))
    if all(math.isnan(cell.ttft.ratio) for cell in cells):
        sys.exit("no size was served by both")


def measure(
    chosen: argparse.Namespace,
    hosts: dict[Side, str],
    headers: dict[Side, dict[str, str]],
    model: str,
    streams: int,
    body_bytes: int,
) -> Cell:
    """Run one cell's rounds, after one request to each side that opens connections."""
    maker = Bodies(model, body_bytes, chosen.longest_prompt, chosen.output_tokens)
    records: list[dict[Side, list[Record]]] = [{"A": [], "B": []} for _ in range(chosen.rounds)]
    for side, host in hosts.items():
        (first,) = closed_loop(host, [maker.ask()], 1, headers[side])
        if first.outcome != "ok":
            return Cell(streams, body_bytes, compare([]), compare([]), 1, first.error, 0.0)
    cpu: list[float] = []
    for number, side in order(chosen.rounds):
        asks = [maker.ask() for _ in range(streams * chosen.requests)]
        with cpu_share() as share:
            records[number][side] += closed_loop(hosts[side], asks, streams, headers[side])
        cpu += share
    every = [record for sides in records for each in sides.values() for record in each]
    failed = [record for record in every if record.outcome != "ok"]
    return Cell(
        streams,
        body_bytes,
        compare([(times(r["A"], "ttft_ms"), times(r["B"], "ttft_ms")) for r in records]),
        compare([(times(r["A"], "e2e_ms"), times(r["B"], "e2e_ms")) for r in records]),
        len(failed),
        failed[0].error if failed else None,
        max(cpu),
    )


class Bodies:
    """Request bodies of an exact size, each with a salt of its own."""

    def __init__(self, model: str, body_bytes: int, longest_prompt: int, output: int) -> None:
        self._rng = random.Random(body_bytes)
        self._output = output
        self._text = ""
        self._fields = {
            "model": model,
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        room = body_bytes - len(self.ask().body)
        if room < 0:
            raise SystemExit(f"a body of {body_bytes} bytes is too small: it takes {-room} more")
        self._text = text_of(self._rng, room + 100)[: min(room, longest_prompt)]
        self._blanks = b" " * (room - len(self._text))

    _blanks = b""

    def ask(self) -> Ask:
        salt = f"{self._rng.randrange(10**SALT_DIGITS):0{SALT_DIGITS}d} "
        fields = {**self._fields, "messages": [{"role": "user", "content": salt + self._text}]}
        body = json.dumps(fields).encode()
        body = body[:1] + self._blanks + body[1:]
        return Ask(f"{len(body)} B", "/v1/chat/completions", body, 0, self._output)


def times(records: Sequence[Record], metric: str) -> list[float]:
    return [
        value
        for record in records
        if record.outcome == "ok" and (value := getattr(record, metric)) is not None
    ]


def gateway_table(cells: Sequence[Cell]) -> str:
    """Medians in milliseconds, what the gateway adds, and gateway / engine with its interval."""
    heads: list[Sequence[str]] = [
        ("body", "streams", *("TTFT",) * 4, *("e2e",) * 4, "failed", "client"),
        ("bytes", "", *("engine ms", "gateway ms", "added ms", "ratio [95 %]") * 2, "", "CPU %"),
    ]
    lines = [
        (
            f"{cell.body_bytes:,}",
            str(cell.streams),
            *(text for part in (cell.ttft, cell.e2e) for text in compared(part)),
            str(cell.failed),
            figure(100 * cell.client_cpu),
        )
        for cell in cells
    ]
    errors = [
        f"{cell.streams} streams of {cell.body_bytes:,} bytes: {cell.error}"
        for cell in cells
        if cell.error
    ]
    full = [cell for cell in cells if cell.client_cpu >= CPU_LIMIT]
    warning = ["INVALID where the client's CPU is full: it hides what the gateway adds"] * bool(
        full
    )
    return "\n".join([columns([*heads, *lines], rule_after=2), *errors, *warning])


def compared(part: Compared) -> tuple[str, str, str, str]:
    engine, gateway, ratio = part.cells()
    return engine, gateway, figure(part.added), ratio


if __name__ == "__main__":
    main()
