"""Starts ``serve run deploy.yaml`` as a user would, on ports and in a directory of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.config import QUIET

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90


def free_port() -> int:
    """A port below those that the system gives to whoever asks for any while Serve starts."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _prepare() -> None:
    """Ask the kernel to end this process when the test run ends, even if that is killed, and heed
    SIGINT, which shells let their background jobs ignore."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; Ray's processes follow theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_deployment(pools: dict[str, Any], directory: Path) -> Path:
    """A ``deploy.yaml`` in ``directory`` that serves the demo model with these pools."""
    config = yaml.safe_load((ROOT / "configs" / "demo-cpu.yaml").read_text())
    config |= {"pools": pools, "model": str(ROOT / "models" / "demo")}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    deploy = yaml.safe_load((ROOT / "deploy.yaml").read_text())
    deploy["applications"][0]["args"]["config"] = str(directory / "config.yaml")
    (directory / "deploy.yaml").write_text(yaml.safe_dump(deploy))
    return directory / "deploy.yaml"


def demo_pool(name: str) -> dict[str, Any]:
    """One pool of the demo's configuration, as the file has it."""
    config = yaml.safe_load((ROOT / "configs" / "demo-cpu.yaml").read_text())
    return dict(config["pools"][name])


class Server:
    """A running application. ``url`` is its address; ``log`` is what it printed so far.

    ``scale`` overrides the number of replicas of deployments such as ``engine-short``.
    """

    def __init__(
        self, deploy: Path = ROOT / "deploy.yaml", scale: dict[str, int] | None = None
    ) -> None:
        # Ray puts Unix sockets below this directory, and their paths may have 107 bytes only.
        self._directory = Path(tempfile.mkdtemp(prefix="la-", dir="/tmp"))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = yaml.safe_load(deploy.read_text())
        for application in settings["applications"]:
            application["args"]["config"] = str(ROOT / application["args"]["config"])
            application["args"]["listen"] = f"127.0.0.1:{port}"
        self._settings = settings
        config = self._write(scale or {})
        self._log = self._directory / "log"
        # Not the product's own niceness: clients in the tests' process must keep up with engines
        # on two cores, so Ray's workers come after them.
        environment = (
            QUIET
            | os.environ
            | {
                "RAY_ADDRESS": "local",  # never join a cluster that happens to run here
                "RAY_TMPDIR": str(self._directory),
                "HF_HUB_OFFLINE": "1",
            }
        )
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", str(config)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_prepare,
            )

    def _write(self, scale: dict[str, int]) -> Path:
        (application,) = self._settings["applications"]
        application["deployments"] = [
            {"name": name, "num_replicas": count} for name, count in scale.items()
        ]
        file = self._directory / "deploy.yaml"
        file.write_text(yaml.safe_dump(self._settings))
        return file

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def scale(self, **replicas: int) -> None:
        """Deploy the same file again with other numbers of replicas; returns at once.

        ``engine_short=2`` means two replicas of the deployment ``engine-short``.
        """
        self._write({name.replace("_", "-"): count for name, count in replicas.items()})
        self._apply()

    def deploy(self, deploy: Path) -> None:
        """Deploy another file in place of the one that runs; returns at once."""
        (application,) = yaml.safe_load(deploy.read_text())["applications"]
        self._settings["applications"][0]["args"]["config"] = application["args"]["config"]
        self._apply()

    def _apply(self) -> None:
        dashboard = re.search(r"dashboard at \S*(http://[\d.]+:\d+)", self.log)
        assert dashboard, self.log
        token = Path.home() / ".ray" / "auth_token"
        headers = {"authorization": f"Bearer {token.read_text()}"} if token.exists() else {}
        httpx.put(  # what `serve deploy` does
            f"{dashboard.group(1)}/api/serve/applications/",
            json=self._settings,
            headers=headers,
            timeout=60,
        ).raise_for_status()

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas, in the order in which they started."""
        title = f"ray::ServeReplica:local-attention:{deployment}"
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append((process.create_time(), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def processes(self) -> Iterator[psutil.Process]:
        """Those that run for it: Ray's, Serve's and the engines'."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("RAY_TMPDIR") == str(self._directory):
                    yield process

    def wait_ready(self) -> None:
        """Return when every pool has an engine; raise with the log when that cannot happen."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"serve run ended:\n{self.log[-4000:]}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"not ready after {START_TIMEOUT_S} s:\n{self.log[-4000:]}")

    def stop(self, within_s: float = STOP_TIMEOUT_S) -> None:
        """Interrupt it as Ctrl-C would, and end what is left of its own processes."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
