"""The table and the defaults of ``make bench-gateway``, in a process of their own: Locust, which
the benchmark's client is made of, patches the process it is imported into."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from load_tests.null_server import ROOT

PROGRAM = """
import json
import sys

from benchmarks.gateway_serve import Hop, Size, arguments, systems, table
from load_tests.stream import Record

def record(ttft, e2e, error=None):
    outcome = "ok" if error is None else "rejected" if "429" in error else "failed"
    made = Record("p", 0.0, 300, outcome, ended=1.0, error=error)
    made.ttft_ms, made.e2e_ms = ttft, e2e
    return made

def hop(client_cpu):
    made = Hop(Size(8, 1024, 300, 16, 4), gateway_cpu_s=0.02, client_cpu=client_cpu)
    made.records["A"] += [record(10, 90), record(20, 100), record(30, 110)]
    made.records["B"] += [record(24, 140), record(28, 160), record(1, 1, "HTTP 500: no")]
    made.records["B"] += [record(1, 1, "HTTP 429: full")]
    made.seconds.update(A=2.0, B=4.0)
    return made

tables = [table([hop(share)]).splitlines() for share in (0.89, 0.9)]
defaults = {**vars(arguments()), "systems": [str(each) for each in systems(arguments())]}
json.dump({"tables": tables, "defaults": defaults}, sys.stdout, default=str)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_line_has_both_sides_of_each_figure(said: dict[str, Any]) -> None:
    heads, rule, line, *rest = said["tables"][0]
    figures = dict(enumerate(cell.strip() for cell in line.strip("|").split("|")))
    assert len(figures) == heads.count("|") - 1 == rule.count("---:")
    assert list(figures.values()) == [
        *("1,024", "8"),
        *("20.0", "26.0"),  # TTFT p50 of what was answered, engine and gateway
        *("29.0", "27.8", "29.8", "28.0"),
        *("100", "150", "1.50"),
        *("1.50", "0.50"),  # answers a second
        *("10.0", "89.0"),
        *("1", "1"),  # refused, failed
    ]
    assert sorted(rest) == ["- error: HTTP 429: full", "- error: HTTP 500: no"]


def test_a_full_client_is_not_to_be_quoted(said: dict[str, Any]) -> None:
    assert said["tables"][1][-1].startswith("- The client was full")


def test_without_options_both_systems_are_measured_from_1_kb_to_1_mb_and_1_to_512_streams(
    said: dict[str, Any],
) -> None:
    defaults = said["defaults"]
    assert defaults["systems"] == ["ours:demo-cpu", "fake:fake"]
    assert defaults["door"] == "own"
    assert defaults["streams"] == [1, 32, 512]
    assert defaults["bodies"] == [1024, 32768, 409600, 1048576]
