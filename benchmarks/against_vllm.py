"""Our stack against `vllm serve` alone with the same engine arguments: is it as fast?

    python -m benchmarks.against_vllm                    # one GPU, Qwen3-0.6B's shape
    python -m benchmarks.against_vllm --shape 8b         # Llama 3.1 8B's
    python -m benchmarks.against_vllm --device cpu       # the demo model

Both are up at once, on the same device, and take turns in ABBA order: the same requests, each
stream sending its next when its last has ended. Two servers of the same engine are as far apart as
their starts make them, so both are started ``--starts`` times, and the median start is judged. The
targets are 0.97 of vLLM's throughput and 5 ms on its median TTFT. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import shape
from benchmarks.session import ROOT, EnginePort, Session, System, free_port
from load_tests.summary import CPU_LIMIT, figure, percentile

if TYPE_CHECKING:
    from benchmarks.gateway_serve import Hop

CONFIGS = Path(__file__).resolve().parent / "configs"
START_TIMEOUT_S = 300
TARGET_THROUGHPUT = 0.97  # of vLLM's
TARGET_TTFT_MS = 5.0  # more than vLLM's, at the median


@dataclass(frozen=True, slots=True)
class Side:
    """What one system did: answers a second, all of one length, and median TTFT."""

    answers_s: float
    ttft_ms: float


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our stack with vllm serve.")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shape", choices=shape.ONE_GPU, default="0.6b", help="of the GPU's model")
    parser.add_argument("--door", choices=("own", "proxy", "ha-proxy"), default="own")
    parser.add_argument("--streams", type=numbers, default=[], help="default: 1,32,128; CPU 1,8")
    parser.add_argument("--prompt", type=int, default=500, help="bytes of text: tokens here")
    parser.add_argument("--output-tokens", type=int, default=0, help="default: 128; CPU 32")
    parser.add_argument("--requests", type=int, default=4, help="of each stream in a block")
    parser.add_argument("--rounds", type=int, default=2, help="of four blocks each")
    parser.add_argument("--starts", type=int, default=3, help="of both servers")
    parser.add_argument("--out", type=Path, default=Path("runs/against-vllm"))
    chosen = parser.parse_args()
    on_gpu = chosen.device == "gpu"
    chosen.streams = chosen.streams or ([1, 32, 128] if on_gpu else [1, 8])
    chosen.output_tokens = chosen.output_tokens or (128 if on_gpu else 32)
    return chosen


def flags(arguments: dict[str, Any]) -> Iterator[str]:
    """vLLM's command line for engine arguments by name."""
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield f"--{flag}"
            yield json.dumps(value) if isinstance(value, dict) else str(value)


@contextmanager
def vllm_serve(engine_args: dict[str, Any], env: dict[str, str]) -> Iterator[str]:
    """vLLM's own server with these arguments; yields its URL once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *flags(engine_args)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not _answers(url, process):
                raise RuntimeError(f"vLLM did not start:\n{Path(log.name).read_text()[-4000:]}")
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def verdict(streams: int, starts: Sequence[tuple[Side, Side]], client_cpu: float) -> str:
    """Throughput ratio and difference of median TTFTs of vLLM and ours against their targets, in
    the median of ``starts``, with the least and the most of several."""
    ratios = sorted(ours.answers_s / vllm.answers_s for vllm, ours in starts)
    added = sorted(ours.ttft_ms - vllm.ttft_ms for vllm, ours in starts)
    ratio, more = statistics.median(ratios), statistics.median(added)
    throughput, ttft = f"{ratio:.3f}", _signed(more)
    if len(starts) > 1:
        throughput += f" [{ratios[0]:.3f} to {ratios[-1]:.3f}]"
        ttft += f" [{_signed(added[0])} to {_signed(added[-1])}]"
    full = " INVALID: the client was full." if client_cpu >= CPU_LIMIT else ""
    return (
        f"{streams} streams: throughput {throughput} of vLLM's (target at least "
        f"{TARGET_THROUGHPUT}: {'met' if ratio >= TARGET_THROUGHPUT else 'MISSED'}); TTFT p50 "
        f"{ttft} ms (target at most +{TARGET_TTFT_MS:g}: "
        f"{'met' if more <= TARGET_TTFT_MS else 'MISSED'}).{full}"
    )


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{figure(value)}"


def verdict_of(hops: Sequence[Hop]) -> str:
    """The verdict on what one size measured, one ``Hop`` a start."""
    vllm, ours = (
        [Side(hop.answers_s(side), percentile(hop.times(side, "ttft_ms"), 0.5)) for hop in hops]
        for side in ("A", "B")
    )
    client_cpu = max(hop.client_cpu for hop in hops)
    return verdict(hops[0].size.streams, list(zip(vllm, ours, strict=True)), client_cpu)


def measured(chosen: argparse.Namespace, path: Path, model: str) -> Iterator[Hop]:
    """Start both servers, and measure each number of streams."""
    from benchmarks.gateway_serve import Size, measure
    from serve_app.config import load_config

    config = load_config(path).model_copy(update={"model": model})
    ((pool_name, pool),) = config.pools.items()
    env = os.environ | {"HF_HUB_OFFLINE": "1", **pool.env}
    with ExitStack() as stack:
        session = Session(System("ours", str(path), model=model, door=chosen.door))
        stack.callback(session.stop)  # both start at once
        alone = stack.enter_context(vllm_serve(config.engine_args_of(pool_name), env))
        session.wait()
        vllm = EnginePort(pool_name, alone, header="")
        for streams in chosen.streams:
            body = chosen.prompt + 1000
            size = Size(streams, body, chosen.prompt, chosen.output_tokens, chosen.requests)
            yield measure(session, size, chosen.rounds, config.served_model_name, vllm)


def main() -> None:
    # Here, because Locust patches the whole process when it is imported.
    from benchmarks.gateway_serve import table

    chosen = arguments()
    path = CONFIGS / f"single-{chosen.device}.yaml"
    model = shape.model_for(chosen.device, chosen.out, shape.ONE_GPU[chosen.shape])
    starts: list[list[Hop]] = []
    for number in range(1, chosen.starts + 1):
        starts.append([])
        for hop in measured(chosen, path, model):
            starts[-1].append(hop)
            print(f"start {number}: {verdict_of([hop])}", flush=True)
    print("\n*engine* is `vllm serve`, *gateway* our stack.")
    for number, hops in enumerate(starts, 1):
        print(f"\nStart {number}:\n\n{table(hops)}")
    print()
    for same in zip(*starts, strict=True):
        print(f"- {verdict_of(same)}")


if __name__ == "__main__":
    main()
