"""The gateway and the router on two GPUs: the hop, the flood, then mixed traffic at several rates.

    python -m benchmarks.gpu_router                 # two GPUs, Qwen3-0.6B's shape
    python -m benchmarks.gpu_router --shape 8b      # Llama 3.1 8B's
    python -m benchmarks.gpu_router --tiny          # any CPU, a tiny shape, short blocks

Starts the systems that ``--floods`` and ``--systems`` name once, each of two engines, side by side
on the same GPUs, and measures them in turn: the gateway of "pools" against its engine's own port,
each pair under a flood of long requests, and all of them at ``--rates`` as ``benchmarks.routers``
does. Prints its tables last.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flood, gateway_serve, routers, shape
from benchmarks.gateway import numbers
from benchmarks.gateway_serve import Size
from benchmarks.routers import SCALES, SYSTEMS
from benchmarks.session import Session, System

HERE = Path(__file__).resolve().parent
PROMPT = 500  # bytes of text; the template makes it about 512 tokens


@dataclass(frozen=True, slots=True)
class Flood:
    """Two systems to compare, and the long requests as a share of what two engines do."""

    a: str
    b: str
    load: float

    @classmethod
    def parse(cls, text: str) -> Flood:
        """Read ``A/B:LOAD``."""
        names, _, load = text.partition(":")
        a, _, b = names.partition("/")
        if a not in SYSTEMS or b not in SYSTEMS:
            raise ValueError(f"{text!r} is not A/B:LOAD with two of {', '.join(SYSTEMS)}")
        return cls(a, b, float(load))


def floods(text: str) -> list[Flood]:
    return [Flood.parse(each) for each in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure gateway and router on two GPUs.")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try this out")
    parser.add_argument("--shape", choices=shape.ONE_GPU, default="0.6b")
    parser.add_argument("--door", choices=("own", "proxy", "ha-proxy"), default="own")
    parser.add_argument(
        "--floods",
        type=floods,
        default=floods("default-steps/steps:1,default-steps/pools:0.3"),
        help=f"A/B:LOAD, commas; names are {', '.join(SYSTEMS)}",
    )
    parser.add_argument(
        "--systems", type=routers.system_names, default="", help="further ones for --rates, commas"
    )
    parser.add_argument("--rates", default="", help="requests/s of mixed traffic, commas")
    parser.add_argument("--rate-seconds", type=int, default=15, help="of each run of --rates")
    parser.add_argument("--short-rate", type=float, default=20.0, help="requests/s")
    parser.add_argument("--long", type=flood.pair, default=(12000, 24000), help="prompt tokens")
    parser.add_argument("--seconds", type=float, default=25.0, help="of arrivals in a block")
    parser.add_argument("--hop-requests", type=int, default=4, help="of each stream in a block")
    parser.add_argument("--streams", type=numbers, default=[32, 128], help="commas; of the hop")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-router"))
    return parser.parse_args()


def systems(chosen: argparse.Namespace) -> dict[str, System]:
    """Those that were named, with the shape's directory as their model."""
    device = "tiny" if chosen.tiny else "gpu"
    model = chosen.out / f"{device}-shape"
    shape.build(model, shape.TINY if chosen.tiny else shape.ONE_GPU[chosen.shape])
    flooded = [name for each in chosen.floods for name in (each.b, each.a)]
    named = dict.fromkeys([*flooded, *chosen.systems])
    return {
        name: System(
            SYSTEMS[name][0],
            str(HERE / f"configs/{SYSTEMS[name][1]}-{device}.yaml"),
            model=str(model.resolve()),
            door=chosen.door,
        )
        for name in named
    }


def main() -> None:
    chosen = arguments()
    began = time.monotonic()
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        stack.callback(Session.stop_all, sessions)
        for name, system in systems(chosen).items():
            sessions[name] = Session(system)
            if chosen.tiny:  # a few cores start one at a time faster than all at once
                sessions[name].wait()
        for name, session in sessions.items():
            if not chosen.tiny:
                session.wait()
            print(f"{time.monotonic() - began:.0f} s: {name} is up", flush=True)
        tables = []
        if "pools" in sessions:  # one engine a pool, so both sides of the hop use the same one
            tables.append(_hop(chosen, sessions["pools"]))
        for each in chosen.floods:
            print(f"{time.monotonic() - began:.0f} s: flood, {each}", flush=True)
            tables.append(_flood(chosen, sessions[each.a], sessions[each.b], each))
            print(tables[-1], flush=True)
        if chosen.rates:
            print(f"{time.monotonic() - began:.0f} s: mixed traffic", flush=True)
            tables.append(_mixed(chosen, sessions))
        print(f"{time.monotonic() - began:.0f} s: done\n")
        print("\n\n".join(tables), flush=True)


def _hop(chosen: argparse.Namespace, session: Session) -> str:
    hops = []
    for streams in chosen.streams:
        size = Size(streams, 1024, PROMPT, 128, chosen.hop_requests)
        hops.append(gateway_serve.measure(session, size, 1, "bench"))
        print(gateway_serve.table(hops[-1:]), flush=True)
    return f"Gateway hop, {session.system}\n\n{gateway_serve.table(hops)}"


def _flood(chosen: argparse.Namespace, a: Session, b: Session, between: Flood) -> str:
    options = argparse.Namespace(
        short=(32, 128),
        short_rate=chosen.short_rate,
        short_output=16,
        long=chosen.long,
        load=between.load,
        engines=2,
        long_output=16,
        seconds=chosen.seconds,
        rounds=1,
        seed=0,
        out=chosen.out / f"{between.a}-{between.b}",
    )
    title = f"Flood: A is {between.a}, B is {between.b}"
    return f"{title}\n\n{flood.run(options, {'A': a, 'B': b}, 'bench')}"


def _mixed(chosen: argparse.Namespace, sessions: dict[str, Session]) -> str:
    scale = SCALES["cpu" if chosen.tiny else "gpu"]
    options = argparse.Namespace(
        systems=list(sessions),
        rates=chosen.rates.split(","),
        rounds=1,
        mix=scale.mix,
        seconds=chosen.rate_seconds,
        out=chosen.out,
    )
    runs = routers.measure(options, sessions)
    return f"Mixed traffic, {scale.mix}\n\n{routers.table(runs, scale.mix)}"


if __name__ == "__main__":
    main()
