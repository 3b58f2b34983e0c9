"""The same traffic at two servers in turn, in ABBA order: is B better than A, and is it sure?

    python -m load_tests.ab --a http://127.0.0.1:8000 --b http://127.0.0.1:8100 --rate 4

Both sides of a round get the same lengths at the same times; the salts are new in each block, so
that A and B may share an engine without its prefix cache answering for either. Two configurations
are compared as two servers, one URL each.

At the end a null server gets the first round's traffic (``--floor`` seconds of it): where the
client's own time is a tenth of what it measured, the comparison is INVALID.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from load_tests.compare import Round, Side, compare, order
from load_tests.drive import cpu_share, headers_of, open_loop
from load_tests.floor import Floor, client_floor, floor_line
from load_tests.prompts import PromptMaker, first_model, server_count
from load_tests.stream import Ask, Record
from load_tests.summary import (
    Verdict,
    columns,
    finite,
    floor_faults,
    is_good,
    percentile,
    verdict,
)
from load_tests.traffic import DEMO_MIX, Deck, mix_deck, parse_mix

Measured = dict[int, dict[Side, list[Record]]]  # round, side, records

METRICS = ("ttft_ms", "itl_ms", "e2e_ms")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare two servers in ABBA order.")
    parser.add_argument("--a", required=True, help="base URL of the one compared against")
    parser.add_argument("--b", required=True, help="base URL of the other")
    parser.add_argument("--a-header", default="", help="'Name: value', sent to A")
    parser.add_argument("--b-header", default="", help="'Name: value', sent to B")
    parser.add_argument("--model", default="", help="default: the first that A lists")
    parser.add_argument("--mix", default=DEMO_MIX, help="as in benchmark.py")
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s, Poisson")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a block")
    parser.add_argument("--rounds", type=int, default=4, help="of four blocks each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--floor", type=float, default=3.0, help="seconds replayed at a null server; 0 for none"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    hosts: dict[Side, str] = {"A": chosen.a.rstrip("/"), "B": chosen.b.rstrip("/")}
    headers = {"A": headers_of(chosen.a_header), "B": headers_of(chosen.b_header)}
    mix = parse_mix(chosen.mix)
    targets = {each.name: each for each in mix}
    model = chosen.model or first_model(hosts["A"], headers["A"])
    count = server_count(hosts["A"], model, headers["A"], chat=True)
    deck = mix_deck(mix, PromptMaker(model, count, chosen.seed))
    measured: Measured = defaultdict(lambda: {"A": [], "B": []})
    cpu: list[float] = []
    for block, (number, side) in enumerate(order(chosen.rounds)):
        print(f"round {number + 1}/{chosen.rounds}: {side}", flush=True)
        schedule = arrivals(deck, chosen, number, block)
        with cpu_share() as share:
            measured[number][side] += open_loop(hosts[side], schedule, headers[side])
        cpu += share
    sides = {side: [r for each in measured.values() for r in each[side]] for side in hosts}
    records = [record for mine in sides.values() for record in mine]
    floor = client_floor(arrivals(deck, chosen, 0, 0), records, chosen.floor)
    judged = judge(sides, cpu, floor)
    print(f"\n{ab_table(measured, list(targets))}\n")
    for side, host in hosts.items():
        mine = sides[side]
        ok = sum(record.outcome == "ok" for record in mine)
        good = sum(is_good(record, targets[record.length_class]) for record in mine)
        print(f"{side} {host}: {ok} of {len(mine)} answered, {good} within their targets")
    print("VALID" if judged.valid else f"INVALID, do not quote: {'; '.join(judged.faults)}")
    print(floor_line(floor))
    if chosen.out:
        compared = {
            name: {metric: compare(rounds_of(measured, name, metric)) for metric in METRICS}
            for name in targets
        }
        told = {"valid": judged.valid, "verdict": judged, "floor": floor, "classes": compared}
        chosen.out.write_text(json.dumps(finite(told)))


def arrivals(
    deck: Deck, chosen: argparse.Namespace, number: int, block: int
) -> list[tuple[float, Ask]]:
    """The traffic of a round, the same in each of its blocks but for the salts."""
    rng, salts = random.Random(f"{chosen.seed}/{number}"), random.Random(f"{chosen.seed}#{block}")
    made, at = [], rng.expovariate(chosen.rate)
    while at < chosen.seconds:
        made.append((at, deck.draw(rng, salts)))
        at += rng.expovariate(chosen.rate)
    return made


def judge(
    sides: Mapping[Side, Sequence[Record]], cpu: Sequence[float], floor: Floor | None
) -> Verdict:
    """Whether the client was fit to measure both sides, by the run and by its floor."""
    records = [record for mine in sides.values() for record in mine]
    judged = verdict(records, len(records), cpu)
    ttft = [[r.ttft_ms for r in mine if r.ttft_ms is not None] for mine in sides.values()]
    fastest = min((percentile(each, 0.5) for each in ttft if each), default=math.nan)
    faults = floor_faults(floor, fastest)
    return replace(judged, faults=(*judged.faults, *faults))


def rounds_of(measured: Measured, name: str, metric: str) -> list[Round]:
    """One metric of one length class by round: what A measured, what B did."""

    def values(records: Sequence[Record]) -> list[float]:
        ok = (r for r in records if r.length_class == name and r.outcome == "ok")
        return [value for r in ok if (value := getattr(r, metric)) is not None]

    return [(values(sides["A"]), values(sides["B"])) for sides in measured.values()]


def ab_table(measured: Measured, names: Sequence[str]) -> str:
    """Medians of A and B in milliseconds and B / A with its 95 % interval, for each class."""
    heads = [
        ("class", *("TTFT",) * 3, *("ITL",) * 3, *("e2e",) * 3),
        ("", *("A ms", "B ms", "B/A [95 %]") * 3),
    ]
    lines = [
        (name, *(c for m in METRICS for c in compare(rounds_of(measured, name, m)).cells()))
        for name in names
    ]
    return columns([*heads, *lines], rule_after=len(heads))


if __name__ == "__main__":
    main()
