"""Runs the load tests' locust files on behalf of a benchmark, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.session import ROOT

FINISHED = (0, 1)  # 1: some request failed, which the run's own table says


def run(file: str, host: str, out: Path, *options: str) -> None:
    """``load_tests/FILE.py`` against ``host``; its files are left in ``out``.

    Raises:
        RuntimeError: the test was refused or broke off.
    """
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "load_tests" / f"{file}.py")]
    command += ["--headless", "--skip-log-setup", "-u", "1", "--host", host, "--out", str(out)]
    code = subprocess.run([*command, *options], cwd=ROOT).returncode
    if code not in FINISHED or not (out / "summary.json").exists():
        raise RuntimeError(f"{file} against {host} left no summary (exit code {code})")
