"""Many GPUs of one host: replicas behind the router, one of them killed, engines over several GPUs,
two pools.

    python -m benchmarks.scaling                                  # every GPU there is, all parts
    python -m benchmarks.scaling --parts tensor --shapes 70b --sizes 2,4
    python -m benchmarks.scaling --tiny --sizes 1,2               # any CPU, a tiny shape

Parts; a session is started once for all that is measured on it:

- ``replicas``: 1, 2, 4 ... engines of one GPU each, as many streams on each, and what the gateways
  take of a core for 1,000 tokens/s. On the first, the line for one GPU of the table of engines. On
  the last, one is killed under load: what was lost, and how long until it was replaced.
- ``tensor``: one engine over 2, 4 ... GPUs: a lone request, and many streams.
- ``pipeline``: the same with stages of layers; vLLM has none on CPUs, so not with ``--tiny``.
- ``pools``: short requests on an engine of one GPU beside long ones on an engine of two, which has
  another attention plan. With two GPUs: short ones on two engines of half a GPU, long ones on one.

Weights are random. Clients are processes of their own, one an engine, and go through the gateways'
port, of which there is one an engine too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks import shape
from benchmarks.session import Session, System

IMPORT_S = 5.0  # until clients in new processes can send
REPLACED_S = 300.0
POLL_S = 0.1
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without weights; ``gib`` is what it would take in bfloat16."""

    config: dict[str, Any]
    gib: float


SHAPES = {
    "0.6b": Shape(shape.QWEN3_06B, 1.2),
    "8b": Shape(shape.LLAMA_8B, 15),
    "70b": Shape(shape.LLAMA_70B, 132),
    "tiny": Shape(shape.TINY, 0),
}


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that send ``requests`` each, one after the other. Lengths are tokens."""

    streams: int
    requests: int
    prompt: int
    output: int


@dataclass(slots=True)
class Driven:
    """What clients saw. Times are milliseconds, ``began`` and ``ended`` of the monotonic clock."""

    began: float
    ended: float
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0  # failed after the first token
    lost: int = 0  # failed before it
    client_cpu: float = 0.0

    def __add__(self, other: Driven) -> Driven:
        return Driven(
            min(self.began, other.began),
            max(self.ended, other.ended),
            self.ttft_ms + other.ttft_ms,
            self.itl_ms + other.itl_ms,
            self.tokens + other.tokens,
            self.cut + other.cut,
            self.lost + other.lost,
            max(self.client_cpu, other.client_cpu),
        )

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.ended - self.began)


def drive(url: str, load: Load, at: float) -> Driven:
    """Send a load from the time ``at`` on. Runs in a process of its own."""
    # Here, because Locust patches the whole process when it is imported.
    from benchmarks.gateway import Bodies
    from load_tests.drive import closed_loop, cpu_share, headers_of

    room = 1024 + 2 * load.prompt
    bodies = Bodies("bench", room, load.prompt - 32, load.output)
    asks = [bodies.ask() for _ in range(load.streams * load.requests)]
    time.sleep(max(0.0, at - time.monotonic()))
    began = time.monotonic()
    with cpu_share() as share:
        records = closed_loop(url, asks, load.streams, headers_of(""))
    failed = [record for record in records if record.outcome != "ok"]
    return Driven(
        began,
        time.monotonic(),
        [record.ttft_ms for record in records if record.ttft_ms is not None],
        [record.itl_ms for record in records if record.itl_ms is not None],
        sum(record.output_tokens or 0 for record in records),
        sum(record.ttft_ms is not None for record in failed),
        sum(record.ttft_ms is None for record in failed),
        share[0],
    )


@contextmanager
def clients(url: str, loads: Sequence[Load]) -> Iterator[list[Future[Driven]]]:
    """A process for each load, all beginning together."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(loads), mp_context=fresh) as pool:
        at = time.monotonic() + IMPORT_S
        yield [pool.submit(drive, url, load, at) for load in loads]


def drive_all(url: str, loads: Sequence[Load]) -> Driven:
    with clients(url, loads) as running:
        return total(future.result() for future in running)


def total(parts: Iterator[Driven]) -> Driven:
    whole = next(parts)
    for part in parts:
        whole += part
    return whole


@dataclass(frozen=True, slots=True)
class Host:
    """Where this runs, and what is chosen of it."""

    out: Path
    tiny: bool
    gpus: int
    sizes: list[int]  # GPUs of an engine, or engines
    gpu_gib: float
    shapes: list[str]  # the first one is that of all parts but tensor
    kill_requests: int  # of each stream
    rows: dict[str, list[Sequence[str]]] = field(default_factory=dict)  # by table

    def add(self, name: str, *cells: str) -> None:
        """Keep a line of the table ``name``, and show it."""
        self.rows.setdefault(name, []).append(cells)
        print(table(HEADS[name], [cells]), flush=True)

    @contextmanager
    def serve(
        self, name: str, pools: dict[str, dict[str, Any]], gateways: int = 1
    ) -> Iterator[Session]:
        """A session of the shape ``name`` with these pools."""
        model = self.out / f"{name}-shape"
        shape.build(model, SHAPES[name].config)
        engine = {"load_format": "dummy", "enable_prefix_caching": False}
        if self.tiny:
            engine |= {"dtype": "float32", "enforce_eager": True, "block_size": 32}
            pools = {key: {**pool, "env": CPU_ENV} for key, pool in pools.items()}
        else:
            engine |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.9}
        config = {
            "model": str(model.resolve()),
            "served_model_name": "bench",
            "device": "cpu" if self.tiny else "gpu",
            "engine_args": engine,
            "gateway": {"replicas": gateways, "default_output_tokens": 64},
            "pools": pools,
        }
        path = self.out / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        began = time.monotonic()
        with Session(System("ours", str(path))) as session:
            print(
                f"{name}, {', '.join(pools)}: up after {time.monotonic() - began:.0f} s", flush=True
            )
            yield session

    def load(self, streams: int, prompt: int, output: int, requests: int = 4) -> Load:
        """A load, or its miniature."""
        if self.tiny:
            return Load(min(streams, 4), requests, min(prompt, 200), min(output, 16))
        return Load(streams, requests, prompt, output)

    def fits(self, name: str, gpus: int) -> bool:
        """Whether weights leave room for a KV cache on so many GPUs."""
        return self.tiny or SHAPES[name].gib < 0.8 * gpus * self.gpu_gib


def replicas(host: Host) -> None:
    for size in host.sizes:
        pools = {"all": _pool(replicas=size)}
        with host.serve(host.shapes[0], pools, gateways=size) as session:
            drive_all(session.url, [host.load(8, 512, 16, 1)] * size)  # warm-up
            if size == 1:
                _lone_and_many(host, session, host.shapes[0], "TP=1")
            before = session.cpu_s()
            driven = drive_all(session.url, [host.load(64, 512, 256)] * size)
            used = session.cpu_s() - before
            host.add(
                "replicas",
                str(size),
                f"{driven.tokens_per_s:,.0f}",
                f"{middle(driven.ttft_ms):.0f}",
                f"{middle(driven.itl_ms):.2f}",
                f"{1e3 * used / driven.tokens:.2f}",
                *_client(driven),
            )
            if size == max(host.sizes) > 1:
                _kill(host, session, size)


def tensor(host: Host) -> None:
    _spread(host, "TP", "tensor_parallel_size")


def pipeline(host: Host) -> None:
    _spread(host, "PP", "pipeline_parallel_size")


def _spread(host: Host, label: str, key: str) -> None:
    """One engine over each number of GPUs, spread over them in the way of the pool's ``key``."""
    for name in host.shapes:
        for size in host.sizes:
            if size == 1 and name == host.shapes[0]:
                continue  # measured with the replicas
            if not host.fits(name, size):
                print(f"{name} does not fit {size} GPUs of {host.gpu_gib:.0f} GiB")
                continue
            with host.serve(name, {"all": _pool(**{key: size})}) as session:
                drive_all(session.url, [host.load(8, 512, 16, 1)])  # warm-up
                _lone_and_many(host, session, name, f"{label}={size}")


def _lone_and_many(host: Host, session: Session, name: str, engine: str) -> None:
    lone = drive_all(session.url, [host.load(1, 4096, 128)])
    many = drive_all(session.url, [host.load(64, 1024, 256, 3)])
    host.add(
        "engine",
        name,
        engine,
        f"{middle(lone.ttft_ms):.0f}",
        f"{middle(lone.itl_ms):.2f}",
        f"{many.tokens_per_s:,.0f}",
        *_client(many),
    )


def pools(host: Host) -> None:
    plan = {"sliding_window": 64 if host.tiny else 4096, "full_attention_every": 4}
    two = {
        "short": _pool(max_model_len=1024 if host.tiny else 4096),
        "long": _pool(tensor_parallel_size=2, local_attention=plan),
    }
    if host.gpus == 2:  # two engines on one, and one on the other
        half = {"gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 20 * 2**30}
        two = {
            "short": _pool(max_model_len=4096, replicas=2, num_gpus=0.5, engine_args=half),
            "long": _pool(local_attention=plan),
        }
    short = host.load(64, 512, 256)
    long = Load(2, 2, 1500, 16) if host.tiny else Load(8, 4, 20_000, 256)
    with host.serve(host.shapes[0], two) as session:
        drive_all(session.url, [short, long])  # warm-up
        for name, loads in (("alone", [short]), ("alone", [long]), ("together", [short, long])):
            with clients(session.url, loads) as running:
                for load, future in zip(loads, running, strict=True):
                    driven = future.result()
                    host.add(
                        "pools",
                        "short" if load is short else "long",
                        name,
                        f"{middle(driven.ttft_ms):.0f}",
                        f"{middle(driven.itl_ms):.2f}",
                        f"{driven.tokens_per_s:,.0f}",
                        *_client(driven),
                    )


def _kill(host: Host, session: Session, size: int) -> None:
    """Kill one of the engines under load. Raises where it is not replaced in time."""
    loads = [host.load(32, 512, 256, host.kill_requests)] * size
    with clients(session.url, loads) as running:
        time.sleep(IMPORT_S + 3)
        os.kill(session.replicas("engine")[0], signal.SIGKILL)
        killed = time.monotonic()
        seen = _until(session.url, lambda engines: engines < size) - killed
        replaced = _until(session.url, lambda engines: engines == size) - killed
        driven = total(future.result() for future in running)
    host.add(
        "kill",
        str(size),
        str(len(driven.ttft_ms) + driven.lost),
        str(driven.cut),
        str(driven.lost),
        f"{seen:.1f}",
        f"{replaced:.1f}",
        "yes" if driven.ended > killed + replaced else "no",
    )


HEADS = {
    "engine": (
        "shape",
        "GPUs",
        "lone TTFT p50 ms",
        "lone ms a token",
        "64 streams, tokens/s",
        "failed",
        "client CPU",
    ),
    "replicas": (
        "engines",
        "tokens/s",
        "TTFT p50 ms",
        "ms a token",
        "gateways' CPU s per 1,000 tokens",
        "failed",
        "client CPU",
    ),
    "pools": ("pool", "", "TTFT p50 ms", "ms a token", "tokens/s", "failed", "client CPU"),
    "kill": (
        "engines",
        "requests",
        "cut after their first token",
        "lost before it",
        "seen after s",
        "replaced after s",
        "under load until then",
    ),
}
PARTS: dict[str, Callable[[Host], None]] = {
    "replicas": replicas,
    "tensor": tensor,
    "pipeline": pipeline,
    "pools": pools,
}


def _pool(**keys: Any) -> dict[str, Any]:
    return {"max_model_len": 32768, "num_cpus": 1, "drain_s": 5, **keys}


def _client(driven: Driven) -> list[str]:
    return [str(driven.cut + driven.lost), f"{driven.client_cpu:.0%}"]


def _until(url: str, enough: Callable[[int], bool]) -> float:
    """The time at which the gateways' count of engines is as asked for."""
    deadline = time.monotonic() + REPLACED_S
    while not enough(httpx.get(f"{url}/ready", timeout=10).json()["pools"]["all"]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the number of engines did not change for {REPLACED_S:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic()


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpus() -> list[float]:
    """The memory of each GPU in GiB."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True)
    return [int(line) / 1024 for line in listed.stdout.split()]


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def names(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one host with many GPUs.")
    parser.add_argument("--parts", type=names, help=f"commas; default: all of {', '.join(PARTS)}")
    parser.add_argument("--sizes", type=numbers, help="default: 1, 2, 4 ... up to the GPUs there")
    parser.add_argument("--shapes", type=names, default=["8b", "70b"], help="commas")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try this out")
    parser.add_argument("--kill-requests", type=int, default=40, help="of each stream")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    chosen = parser.parse_args()
    chosen.parts = chosen.parts or [part for part in PARTS if part != "pipeline" or not chosen.tiny]
    return chosen


def main() -> None:
    chosen = arguments()
    memory = [] if chosen.tiny else gpus()
    sizes = chosen.sizes or [2**n for n in range(8) if 2**n <= len(memory)] or [1]
    shapes = ["tiny"] if chosen.tiny else chosen.shapes
    gpu_gib = min(memory, default=0.0)
    host = Host(chosen.out, chosen.tiny, len(memory), sizes, gpu_gib, shapes, chosen.kill_requests)
    for part in chosen.parts:
        began = time.monotonic()
        PARTS[part](host)
        print(f"({part}: {time.monotonic() - began:.0f} s)\n", flush=True)
    for name, rows in host.rows.items():
        print(f"\n{name}\n\n{table(HEADS[name], rows)}", flush=True)


if __name__ == "__main__":
    main()
