"""The gateway's own cost: runs ``gateway.py`` on it before an engine that answers at once.

    python benchmarks/fake_engine.py --streams 1,8 --bodies 1024     # options are gateway.py's

No Ray and no model: what is added is the gateway's code and one more hop. ``gateway_serve.py``
measures the same with a real engine behind Ray Serve.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import uvicorn
import uvloop

from load_tests.null_server import listening, null_server
from serve_app.api import create_app
from serve_app.batching import BatchingLimits
from serve_app.config import load_config
from serve_app.metrics import GatewayMetrics
from serve_app.request import EngineInfo
from serve_app.router import Pool, Router, keep_fresh
from serve_app.upstream import Upstream

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo-cpu.yaml"


def compare(options: list[str]) -> None:
    """The gateway's application under uvicorn, before a null server that answers at once."""
    with null_server() as engine, listening(sys.executable, __file__, "gateway", engine) as url:
        bench = [sys.executable, str(ROOT / "benchmarks" / "gateway.py")]
        targets = ["--gateway", url, "--engine", engine]
        subprocess.run([*bench, *targets, *options], cwd=ROOT, check=True)


async def gateway(engine: str) -> None:
    """Serve one gateway over one engine that has room for everything; prints its port."""
    config = load_config(CONFIG)
    room = 2**24
    info = EngineInfo("null", "any", engine, "-", prefill_tokens=room, kv_tokens=room)
    upstream = Upstream(config.served_model_name, 60, 60)
    pool = Pool("any", room, limits=BatchingLimits(max_queued=10_000))

    async def discover() -> list[EngineInfo]:
        return [info]

    fresh = asyncio.create_task(keep_fresh(pool, discover, upstream.probe, 1.0))
    app = create_app(config, Router([pool], upstream.open), GatewayMetrics())
    settings = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    listener = settings.bind_socket()
    print(listener.getsockname()[1], flush=True)
    await uvicorn.Server(settings).serve(sockets=[listener])
    fresh.cancel()
    await upstream.close()


def main() -> None:
    if sys.argv[1:2] == ["gateway"]:
        uvloop.run(gateway(sys.argv[2]))  # the loop that Ray gives a replica
    else:
        compare(sys.argv[1:])


if __name__ == "__main__":
    main()
