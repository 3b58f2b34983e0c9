"""The comparisons of ``docs/measurements.md`` in a short form, as one starts them on a CPU.

Real engines answer. What comes out says that a script measures, not what is faster: all three run
at once, since most of their time goes into loading engines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import ROOT

OPTIONS = {
    "attention_kinds": ("--kinds", "sinks", "--lengths", "512", "--crowd", "2"),
    "routers": ("--systems", "default", "--rates", "2", "--seconds", "5"),
    "against_vllm": (
        *("--streams", "2", "--requests", "2"),
        *("--rounds", "1", "--starts", "1", "--output-tokens", "8"),
    ),
}


@dataclass(frozen=True)
class Finished:
    out: Path
    table: list[list[str]]  # the cells of each line of the tables that it printed
    printed: str


Runs = dict[str, Future[Finished]]


def run(script: str, out: Path) -> Finished:
    """``python -m benchmarks.SCRIPT --device cpu``. Fails where the script does."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [*command, *OPTIONS[script]],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return Finished(out, cells, done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(run, name, tmp_path_factory.mktemp(name)) for name in OPTIONS}


def test_kinds_of_attention(runs: Runs) -> None:
    done = runs["attention_kinds"].result()
    sweep, crowd = [cells for cells in done.table if cells[0] == "sinks"][-2:]
    assert sweep[1] == "512"
    assert float(sweep[2]) > 0  # TTFT
    assert float(sweep[3]) > 0  # decode
    assert float(crowd[1].split(" of ")[0]) > 1  # sequences that the KV cache holds
    assert crowd[2:4] == ["2", "2"]  # asked at once, answered
    assert (done.out / "report.html").stat().st_size > 10_000


def test_routers(runs: Runs) -> None:
    done = runs["routers"].result()
    table = [cells for cells in done.table if cells[0] == "2"]
    assert table
    for rate, length_class, label, requests, answered, ttft, *_ in table:
        assert (rate, label) == ("2", "Serve's default router")
        assert length_class in {"short", "long"}
        assert requests == answered
        assert float(ttft) > 0
    assert (done.out / "report.html").stat().st_size > 10_000


def test_against_vllm_alone(runs: Runs) -> None:
    done = runs["against_vllm"].result()
    (cells,) = [cells for cells in done.table if cells[1] == "2"]
    assert cells[-1] == "0"  # failed
    assert float(cells[11]) > 0  # answers a second, vLLM
    assert float(cells[12]) > 0  # and ours
    assert "- 2 streams: throughput" in done.printed
