"""What the gateway adds to an engine's own port, in a session of its own: ``make bench-gateway``.

    python -m benchmarks.gateway_serve                       # the demo's engines, then a fake one
    python -m benchmarks.gateway_serve --device gpu          # Qwen3-0.6B's shape, then a fake one
    python -m benchmarks.gateway_serve --system fake:benchmarks/configs/fake.yaml --streams 8

The same requests go to the engine's port and through the gateway, in by the ``--door`` that is
named, in ABBA order, each stream sending its next request when its last has ended. Prompts are
``--prompt`` bytes of text; bodies are filled up with blanks, which cost reading but make no tokens.
Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import shape
from benchmarks.gateway import SALT_DIGITS, Bodies, numbers
from benchmarks.session import EnginePort, Session, System
from load_tests.compare import Side, order
from load_tests.drive import closed_loop, cpu_share, headers_of
from load_tests.stream import Record
from load_tests.summary import CPU_LIMIT, figure, percentile

ROOT = Path(__file__).resolve().parent.parent
DEMO = System("ours", str(ROOT / "configs/demo-cpu.yaml"))
GPU = System("ours", str(ROOT / "benchmarks/configs/single-gpu.yaml"))
FAKE = System("fake", str(ROOT / "benchmarks/configs/fake.yaml"))

HEADS = (
    "body bytes",
    "streams",
    "TTFT p50 engine ms",
    "gateway",
    "p95 engine",
    "gateway",
    "p99 engine",
    "gateway",
    "e2e p50 engine",
    "gateway",
    "ratio",
    "requests/s engine",
    "gateway",
    "gateway CPU ms/request",
    "client CPU %",
    "refused",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Size:
    """One cell: so many streams of requests of this size, ``requests`` of each in a block."""

    streams: int
    body_bytes: int
    prompt_bytes: int
    output_tokens: int
    requests: int


@dataclass(slots=True)
class Hop:
    """What both sides measured of one size: A is the engine's port, B the gateway."""

    size: Size
    records: dict[Side, list[Record]] = field(default_factory=lambda: {"A": [], "B": []})
    seconds: dict[Side, float] = field(default_factory=lambda: {"A": 0.0, "B": 0.0})
    gateway_cpu_s: float = 0.0
    client_cpu: float = 0.0  # of one core, in the busiest block

    def times(self, side: Side, metric: str) -> list[float]:
        ok = (record for record in self.records[side] if record.outcome == "ok")
        return [value for record in ok if (value := getattr(record, metric)) is not None]

    def answers_s(self, side: Side) -> float:
        """Answers a second."""
        return len(self.times(side, "e2e_ms")) / self.seconds[side]

    @property
    def answered(self) -> int:
        """Requests that the gateway answered."""
        return len(self.times("B", "e2e_ms"))


def measure(
    session: Session, size: Size, rounds: int, model: str, engine: EnginePort | None = None
) -> Hop:
    """Run ``rounds`` of four blocks, after one block of each side that is not counted.

    The engine is, unless given, that of the first pool, which must have one and hold the requests.
    """
    engine = engine or session.engines[0]
    hosts: dict[Side, str] = {"A": engine.url, "B": session.url}
    headers = {"A": headers_of(engine.header), "B": headers_of("")}
    prompt = size.prompt_bytes - SALT_DIGITS - 1
    bodies = Bodies(model, size.body_bytes, prompt, size.output_tokens)
    hop = Hop(size)
    for side in hosts:
        closed_loop(
            hosts[side], [bodies.ask() for _ in range(size.streams)], size.streams, headers[side]
        )
    for _, side in order(rounds):
        asks = [bodies.ask() for _ in range(size.streams * size.requests)]
        before = session.cpu_s()
        with cpu_share() as share:
            records = closed_loop(hosts[side], asks, size.streams, headers[side])
        if side == "B":
            hop.gateway_cpu_s += session.cpu_s() - before
        hop.records[side] += records
        hop.seconds[side] += max(record.ended or 0 for record in records)
        hop.client_cpu = max(hop.client_cpu, share[0])
    return hop


def table(hops: Sequence[Hop]) -> str:
    """One line a size, in Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " ---: |" * len(HEADS)]
    lines += ["| " + " | ".join(_cells(hop)) + " |" for hop in hops]
    errors = {
        record.error
        for hop in hops
        for side in hop.records.values()
        for record in side
        if record.error
    }
    full = any(hop.client_cpu >= CPU_LIMIT for hop in hops)
    warning = ["- The client was full where its CPU is 90 % or more: do not quote those lines."]
    return "\n".join(
        [*lines, *(f"- error: {error}" for error in errors), *(warning if full else [])]
    )


def _cells(hop: Hop) -> Iterator[str]:
    sides: tuple[Side, Side] = ("A", "B")
    yield f"{hop.size.body_bytes:,}"
    yield str(hop.size.streams)
    for q in (0.5, 0.95, 0.99):
        for side in sides:
            yield figure(percentile(hop.times(side, "ttft_ms"), q))
    whole = {side: percentile(hop.times(side, "e2e_ms"), 0.5) for side in sides}
    for side in sides:
        yield figure(whole[side])
    yield f"{whole['B'] / whole['A']:.2f}"
    for side in sides:
        yield figure(hop.answers_s(side))
    yield figure(1e3 * hop.gateway_cpu_s / max(1, hop.answered))
    yield figure(100 * hop.client_cpu)
    outcomes = Counter(record.outcome for side in hop.records.values() for record in side)
    yield str(outcomes["rejected"])  # 429 and 503: a queue was full
    yield str(outcomes.total() - outcomes["ok"] - outcomes["rejected"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the time that the gateway adds.")
    parser.add_argument("--system", type=System.parse, help="KIND:CONFIG; default: real, then fake")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of the real one")
    parser.add_argument("--door", choices=("own", "proxy", "ha-proxy"), default="own")
    parser.add_argument("--streams", type=numbers, default=[1, 32, 512], help="comma-separated")
    parser.add_argument("--bodies", type=numbers, default=[1 << 10, 1 << 15, 400 << 10, 1 << 20])
    parser.add_argument("--prompt", type=int, default=300, help="bytes of text")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each stream in a block")
    parser.add_argument("--rounds", type=int, default=1, help="of four blocks each")
    parser.add_argument("--out", type=Path, default=Path("runs/gateway"), help="for GPUs' model")
    return parser.parse_args()


def systems(chosen: argparse.Namespace) -> list[System]:
    """The one that was named, or a real engine's and a fake one's."""
    if chosen.system:
        return [chosen.system]
    if chosen.device == "cpu":
        return [DEMO, FAKE]
    return [replace(GPU, model=shape.model_for("gpu", chosen.out)), FAKE]


def run(system: System, sizes: Sequence[Size], rounds: int) -> str:
    """Serve ``system``, measure every size, return the table."""
    from serve_app.config import load_config

    model = load_config(system.config).served_model_name
    hops = []
    with Session(system) as session:
        for size in sizes:
            hops.append(measure(session, size, rounds, model))
            print(table(hops[-1:]).splitlines()[2], flush=True)
    return table(hops)


def main() -> None:
    chosen = arguments()
    sizes = [
        Size(streams, body, chosen.prompt, chosen.output_tokens, chosen.requests)
        for body in chosen.bodies
        for streams in chosen.streams
    ]
    tables = []
    for system in systems(chosen):
        tables.append(f"\n{system}, door: {chosen.door}, {chosen.output_tokens} tokens out\n")
        tables.append(run(replace(system, door=chosen.door), sizes, chosen.rounds))
    if not chosen.system:
        # 50,000 tokens of English are about 200 KB of text, all of which the gateway looks at.
        prompts = [Size(streams, 205_000, 200_000, 16, 8) for streams in (1, 4)]
        streaming = [Size(8, 1024, 300, 1000, 2)]
        tables.append("\nfake engine: 50,000-token prompts; then 1,000 tokens out\n")
        fake = replace(FAKE, door=chosen.door)
        tables.append(run(fake, [*prompts, *streaming], chosen.rounds))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
