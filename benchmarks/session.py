"""One Serve application in a Ray session of its own, for measurements.

    with Session(System("ours", "configs/demo-cpu.yaml")) as session:
        session.url             # where the application answers
        session.engines         # the engines' own ports and tokens, where it has gateways
        session.cpu_s()         # processor time of its gateways so far

The session is a child process with free ports and a directory of its own, so that several can be
up side by side, and none ever meets a cluster that happens to run on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

ROOT = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 90
_READY = "session ready: "

Kind = Literal["ours", "default", "fake"]
Door = Literal["own", "proxy", "ha-proxy"]


@dataclass(frozen=True, slots=True)
class System:
    """What to serve: ``ours``, the same engines behind Serve's ``default`` router, or our gateway
    before a ``fake`` engine that answers at once. ``model`` replaces the configuration's. Clients
    come in by a port of the gateway's ``own``, Serve's Python ``proxy`` or ``ha-proxy``; Serve's
    default router knows only the last two, and takes the proxy for ``own``."""

    kind: Kind
    config: str
    model: str | None = None
    door: Door = "own"

    @classmethod
    def parse(cls, text: str) -> System:
        """Read ``KIND:CONFIG``."""
        kind, _, config = text.partition(":")
        if kind not in ("ours", "default", "fake") or not config:
            raise ValueError(f"{text!r} is not ours:CONFIG, default:CONFIG or fake:CONFIG")
        return cls(kind, config)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{Path(self.config).stem}"


@dataclass(frozen=True, slots=True)
class EnginePort:
    """An engine's own HTTP port."""

    pool: str
    url: str
    header: str  # "Name: value" that it asks for


def free_port() -> int:
    """A port that is free, and that no connection takes before it is used: below those that the
    kernel gives out by itself (32,768 and above)."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(10_000, 32_768)
            probe.bind(("127.0.0.1", port))
            return port


class Session:
    """A running application. Entering waits until it serves."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.name = f"bench{free_port()}"
        # Ray puts Unix sockets below this directory, and their paths may have 107 bytes only.
        self._directory = Path(tempfile.mkdtemp(prefix="la-", dir="/tmp"))
        self._log = self._directory / "log"
        self.printed = ""  # by the session and its engines until they were ready
        order = {
            "kind": system.kind,
            "config": str(Path(system.config).resolve()),
            "model": system.model,
            "name": self.name,
            "port": free_port(),
            "listen": free_port() if system.door == "own" and system.kind != "default" else None,
            "directory": str(self._directory),
        }
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # as `local-attention serve` has it
            "RAY_raylet_start_wait_time_s": "120",  # several sessions may start at once
            "HF_HUB_OFFLINE": "1",
            **(_ha_proxy(self._directory) if system.door == "ha-proxy" else {}),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.session", json.dumps(order)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )

    def wait(self) -> Self:
        """Return once every engine is up. Raises with the end of the log where that fails."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_READY):
                told = json.loads(line.removeprefix(_READY))
                self.url: str = told["url"]
                self.engines = [EnginePort(**engine) for engine in told["engines"]]
                return self
            self.printed += line
        raise RuntimeError(f"{self.system} did not start:\n{self.log[-20000:]}")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def cpu_s(self, deployment: str = "gateway") -> float:
        """Processor seconds that the replicas of a deployment have used so far."""
        return sum(_cpu_s(pid) for pid in self.replicas(deployment))

    def stop(self) -> None:
        """End the application and its session."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    @staticmethod
    def stop_all(sessions: Mapping[str, Session]) -> None:
        """End several at once: most of it is waiting."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(Session.stop, sessions.values()))

    def __enter__(self) -> Self:
        try:
            return self.wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def replicas(self, deployment: str) -> list[int]:
        """Processes of a deployment, by the title that Ray gives them."""
        title = f"ray::ServeReplica:{self.name}:{deployment}".encode()
        return [
            int(each.parent.name)
            for each in Path("/proc").glob("[0-9]*/cmdline")
            if _read(each).startswith(title)
        ]


def _ha_proxy(directory: Path) -> dict[str, str]:
    """HAProxy mode, with files and side ports that no other session has."""
    at = "RAY_SERVE_HAPROXY_"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        f"{at}CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        f"{at}SOCKET_PATH": str(directory / "admin.sock"),
        f"{at}METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        f"{at}SERVER_STATE_FILE": str(directory / "server-state"),
        f"{at}METRICS_PORT": str(free_port()),
        f"{at}STATS_PORT": str(free_port()),
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def _cpu_s(pid: int) -> float:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The child: serve, say where, and end when the parent closes the pipe."""
    import ray
    from ray import serve

    order = json.loads(sys.argv[1])
    ray.init(
        address="local",
        num_cpus=256,  # a count for Ray's bookkeeping; what runs is what the configuration says
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=True,
        _temp_dir=order["directory"],
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": order["port"]})
        serve.run(_application(order), name=order["name"], route_prefix="/")
        url = f"http://127.0.0.1:{order['listen'] or order['port']}"
        told = {"url": url, "engines": _engines(order)}
        print(_READY + json.dumps(told), flush=True)
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()


def _application(order: dict[str, Any]) -> Any:
    from benchmarks import baseline, fake_deployment
    from serve_app import deployments
    from serve_app.config import load_config
    from serve_app.port import Address

    config = load_config(order["config"])
    listen = Address("127.0.0.1", order["listen"]) if order["listen"] else None
    if order["model"]:
        config = config.model_copy(update={"model": order["model"]})
    match order["kind"]:
        case "ours":
            return deployments.application(config, listen)
        case "fake":
            return deployments.application(config, listen, fake_deployment.FakeEngineDeployment)
        case _:
            return baseline.application(config)


def _engines(order: dict[str, Any]) -> list[dict[str, str]]:
    """Where the engines behind our gateways listen."""
    from ray import serve

    from serve_app.config import load_config
    from serve_app.request import TOKEN_HEADER

    if order["kind"] == "default":
        return []
    found = []
    for pool in load_config(order["config"]).pools:
        handle = serve.get_deployment_handle(f"engine-{pool}", order["name"])
        for info in handle.broadcast("describe").results():
            header = f"{TOKEN_HEADER}: {info.token}"
            found.append({"pool": pool, "url": info.url, "header": header})
    return found


if __name__ == "__main__":
    main()
