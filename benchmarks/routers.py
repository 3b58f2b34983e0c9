"""The length-aware router against Serve's default one and one mixed pool: goodput by length class.

    python -m benchmarks.routers                     # two GPUs, Qwen3-0.6B's shape
    python -m benchmarks.routers --device cpu        # a tiny shape

The systems have two engines each, side by side on the same device, and take turns at each rate, in
an order that turns around: the same open-loop traffic with 5 % long prompts, from
``load_tests/benchmark.py``. Prints a Markdown table by class and leaves the runs and a report
(``report.html``: goodput over rate) in ``--out``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import loads, shape
from benchmarks.session import Kind, Session, System
from load_tests.report import FinishedRun, read_run, write_report
from load_tests.stream import Record
from load_tests.summary import Row, figure, rows
from load_tests.traffic import parse_mix

CONFIGS = Path(__file__).resolve().parent / "configs"
SYSTEMS: dict[str, tuple[Kind, str]] = {  # kind and configuration
    "pools": ("ours", "pools"),  # one engine a pool: short and long
    "steps": ("ours", "steps"),  # one pool of two engines
    "mixed": ("ours", "mixed"),  # the same with vLLM's own steps
    "default-steps": ("default", "steps"),
    "default": ("default", "mixed"),
}
LABELS = {
    "pools": "length-aware router",
    "default": "Serve's default router",
    "mixed": "one mixed pool",
    "steps": "one mixed pool, small steps",
    "default-steps": "Serve's router, small steps",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """What a device has time for."""

    shape: str  # of the configuration's name
    mix: str
    rates: str
    seconds: int


SCALES = {
    "gpu": Scale(
        "gpu", "short=0.95:150-500:64:250:20,long=0.05:12000-24000:64:2000:30", "10,20,40,60", 20
    ),
    "cpu": Scale("tiny", "short=0.95:150-400:8:1500:150,long=0.05:3000-6000:8:8000:300", "1,2", 6),
}


def system_names(text: str) -> list[str]:
    """Names of ``SYSTEMS``, separated by commas; none of an empty text."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: systems are {', '.join(SYSTEMS)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare routers under mixed lengths.")
    parser.add_argument("--device", choices=tuple(SCALES), default="gpu")
    parser.add_argument(
        "--systems",
        type=system_names,
        default="pools,default,mixed",
        help=f"commas; of {', '.join(SYSTEMS)}",
    )
    parser.add_argument("--rates", default="", help="requests/s, commas")
    parser.add_argument("--mix", default="", help="as in load_tests/benchmark.py")
    parser.add_argument("--seconds", type=int, default=0, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system at each rate")
    parser.add_argument("--out", type=Path, default=Path("runs/routers"))
    chosen = parser.parse_args()
    scale = SCALES[chosen.device]
    chosen.mix, chosen.rates = chosen.mix or scale.mix, (chosen.rates or scale.rates).split(",")
    chosen.seconds, chosen.shape = chosen.seconds or scale.seconds, scale.shape
    return chosen


def system(name: str, chosen: argparse.Namespace) -> System:
    kind, config = SYSTEMS[name]
    model = str((chosen.out / f"{chosen.shape}-shape").resolve())
    return System(kind, str(CONFIGS / f"{config}-{chosen.shape}.yaml"), model=model)


def measure(chosen: argparse.Namespace, sessions: dict[str, Session]) -> list[FinishedRun]:
    """Every system at every rate; the seed, and so the traffic, is a round's own."""
    runs = []
    for rate in chosen.rates:
        for number in range(chosen.rounds):
            names = chosen.systems if number % 2 == 0 else chosen.systems[::-1]
            for name in names:
                out = chosen.out / f"{name}-{rate}-{number}"
                options = ("--rate", rate, "--mix", chosen.mix, "-t", f"{chosen.seconds}s")
                more = ("--seed", f"{number}", "--label", LABELS[name], "--drain", "30")
                loads.run("benchmark", sessions[name].url, out, *options, *more)
                runs.append(read_run(out))
    return runs


def table(runs: Sequence[FinishedRun], mix: str) -> str:
    """By rate, class and system, the rounds taken together, in Markdown."""
    targets = {each.name: each for each in parse_mix(mix)}
    lines = [
        "| rate | class | system | requests | answered | TTFT p50 ms | p95 | p99 | goodput req/s "
        "| within targets |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.directory.name.split("-")[-2], run.label), []).append(run)
    for name in targets:
        for (rate, label), mine in groups.items():
            records: list[Record] = [record for run in mine for record in run.records]
            seconds = sum(run.summary["seconds"] for run in mine)
            made = {row.length_class: row for row in rows(records, seconds, targets)}
            if name in made:
                lines.append(_line(rate, label, made[name]))
    invalid = [run.directory.name for run in runs if not run.summary["valid"]]
    return "\n".join([*lines, *([f"\nINVALID: {', '.join(invalid)}"] if invalid else [])])


def _line(rate: str, label: str, row: Row) -> str:
    good = row.good or 0
    cells = (
        *(rate, row.length_class, label, str(row.count), str(row.ok)),
        *(figure(value) for value in (*row.ttft_ms, row.goodput_s)),
        f"{good / row.count:.1%}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    shape.build(
        chosen.out / f"{chosen.shape}-shape",
        shape.TINY if chosen.shape == "tiny" else shape.QWEN3_06B,
    )
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        stack.callback(Session.stop_all, sessions)
        for name in chosen.systems:  # one after another: they share the device's memory
            sessions[name] = Session(system(name, chosen))
            sessions[name].wait()
            print(f"{LABELS[name]} is up", flush=True)
        runs = measure(chosen, sessions)
    page = write_report([run.directory for run in runs], chosen.out)
    print(f"\n{table(runs, chosen.mix)}\n\n{page}")


if __name__ == "__main__":
    main()
