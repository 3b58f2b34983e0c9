"""What the gateway adds to a real engine: starts one and runs ``gateway.py`` against both ports.

    python benchmarks/serve_gateway.py --streams 1,8 --bodies 1024     # options are gateway.py's

The engine is the first pool of a configuration, the demo model's by default. Run it on an
otherwise idle machine; Ray, the engine, the gateway and the client share its cores.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import ray
from ray import serve

from serve_app.config import AppConfig, load_config
from serve_app.deployments import application
from serve_app.request import TOKEN_HEADER, EngineInfo

ROOT = Path(__file__).resolve().parent.parent
ANSWER_AND_TEMPLATE = 64  # tokens of a request beside its prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the gateway adds to an engine.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo-cpu.yaml")
    chosen, options = parser.parse_known_args()
    config = first_pool(load_config(chosen.config))
    (pool,) = config.pools
    port = free_port()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(config), name="bench")
        handle = serve.get_deployment_handle(f"engine-{pool}", "bench")
        (engine,) = handle.broadcast("describe").results(timeout_s=30)
        command = [sys.executable, str(ROOT / "benchmarks" / "gateway.py")]
        targets = addresses(engine, port)
        longest = ["--longest-prompt", str(config.pools[pool].max_model_len - ANSWER_AND_TEMPLATE)]
        sys.exit(subprocess.run([*command, *targets, *longest, *options], check=False).returncode)
    finally:
        serve.shutdown()
        ray.shutdown()


def first_pool(config: AppConfig) -> AppConfig:
    """The configuration with its first pool alone, and one replica of it."""
    name, pool = next(iter(config.pools.items()))
    return config.model_copy(update={"pools": {name: pool.model_copy(update={"replicas": 1})}})


def addresses(engine: EngineInfo, port: int) -> list[str]:
    """``gateway.py``'s options for the two sides."""
    return [
        *("--gateway", f"http://127.0.0.1:{port}"),
        *("--engine", engine.url),
        *("--engine-header", f"{TOKEN_HEADER}: {engine.token}"),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
