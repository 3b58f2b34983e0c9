from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from load_tests.compare import Round, compare, order
from load_tests.null_server import ROOT, null_server

MIX = "short=0.7:150-300:16:500:50,long=0.3:900:16:1000:50"


def rounds(count: int, ratio: float, drift: float = 1.0, seed: int = 0) -> list[Round]:
    """What a machine that slows by ``drift`` a round would measure."""
    rng = random.Random(seed)

    def side(base: float) -> list[float]:
        return [base * rng.gauss(1, 0.05) for _ in range(40)]

    return [(side(10 * drift**i), side(10 * ratio * drift**i)) for i in range(count)]


def test_rounds_are_abba_and_then_baab() -> None:
    assert "".join(side for _, side in order(3)) == "ABBABAABABBA"
    assert [number for number, _ in order(2)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_drift_of_the_machine_does_not_move_the_ratio() -> None:
    compared = compare(rounds(8, ratio=1.2, drift=1.3))
    assert compared.ratio == pytest.approx(1.2, rel=0.03)
    assert compared.low < 1.2 < compared.high
    assert compared.high - compared.low < 0.1


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    truths = [compare(rounds(8, ratio=1.0, seed=seed)) for seed in range(100)]
    held = sum(each.low <= 1.0 <= each.high for each in truths)
    assert held >= 80  # 95 % is for many rounds; eight resampled promise a little less


def test_two_rounds_have_a_ratio_and_no_interval() -> None:
    compared = compare(rounds(2, ratio=2.0))
    assert compared.ratio == pytest.approx(2, rel=0.1)
    assert math.isnan(compared.low)
    assert "[" not in str(compared)


@pytest.mark.parametrize("empty", [[], [([], [1.0])], [([0.0], [1.0])]])
def test_nothing_to_compare_is_a_dash(empty: list[Round]) -> None:
    assert str(compare(empty)) == "-"


def told(ttft_ms: str, itl_ms: str) -> AbstractContextManager[str]:
    return null_server("--ttft-ms", ttft_ms, "--itl-ms", itl_ms)


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ab_sees_the_slower_server(tmp_path: Path) -> None:
    options = ("--mix", MIX, "--rate", "15", "--seconds", "1", "--rounds", "3")
    with told("40", "4") as a, told("80", "4") as b:
        out = run("-m", "load_tests.ab", "--a", a, "--b", b, *options, "--out", f"{tmp_path}/f")
    told_of = json.loads((tmp_path / "f").read_text())
    short = told_of["classes"]["short"]
    assert short["ttft_ms"]["low"] <= short["ttft_ms"]["ratio"] <= short["ttft_ms"]["high"]
    assert 1.3 < short["ttft_ms"]["ratio"] < 2.5  # 2 as told; wide, for a busy machine
    assert 0.7 < short["itl_ms"]["ratio"] < 1.4
    assert told_of["valid"] == (not told_of["verdict"]["faults"])
    assert ("\nVALID\n" if told_of["valid"] else "INVALID, do not quote") in out
    assert told_of["floor"]["requests"] > 5  # the first round's traffic, at a null server
    assert told_of["floor"]["failed"] == 0
    assert "client floor at this rate" in out


def test_ab_says_that_a_client_as_slow_as_the_servers_is_not_fit(tmp_path: Path) -> None:
    options = ("--mix", MIX, "--rate", "20", "--seconds", "1", "--rounds", "1", "--floor", "0.5")
    with null_server() as a, null_server() as b:
        out = run("-m", "load_tests.ab", "--a", a, "--b", b, *options, "--out", f"{tmp_path}/f")
    told_of = json.loads((tmp_path / "f").read_text())
    assert not told_of["valid"]
    assert "INVALID, do not quote" in out
    assert "the client's own part is too large" in out
    assert told_of["floor"]["requests"] < 20  # half a second of it


def bench_gateway(engine: str, gateway: str, tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    options = ("--streams", "1,4", "--bodies", "1024,100000", "--rounds", "3", *more)
    targets = ("--engine", engine, "--gateway", gateway, "--out", f"{tmp_path}/f")
    run("benchmarks/gateway.py", *targets, *options)
    cells: list[dict[str, Any]] = json.loads((tmp_path / "f").read_text())["cells"]
    return cells


def test_gateway_benchmark_measures_the_time_added(tmp_path: Path) -> None:
    with told("20", "1") as engine, told("120", "1") as gateway:
        cells = bench_gateway(engine, gateway, tmp_path)
    assert [(c["body_bytes"], c["streams"]) for c in cells] == [
        (1024, 1),
        (1024, 4),
        (100000, 1),
        (100000, 4),
    ]
    for cell in cells:
        assert cell["failed"] == 0
        for metric in ("ttft", "e2e"):  # 100 ms as told; wide, for a machine with other work
            assert 50 < cell[metric]["b"] - cell[metric]["a"] < 200
            assert cell[metric]["low"] > 1


def test_the_gateway_itself_is_measured_before_a_fake_engine(tmp_path: Path) -> None:
    options = ("--streams", "1,4", "--bodies", "1024,100000", "--rounds", "3")
    run("benchmarks/fake_engine.py", *options, "--out", f"{tmp_path}/f")
    cells = json.loads((tmp_path / "f").read_text())["cells"]
    assert [cell["failed"] for cell in cells] == [0, 0, 0, 0]
    assert all(cell["e2e"]["ratio"] > 1 for cell in cells)


def test_gateway_benchmark_reports_what_a_side_refuses(tmp_path: Path) -> None:
    with null_server() as engine, null_server("--fault", "400", "--fault-every", "5") as gateway:
        cells = bench_gateway(engine, gateway, tmp_path)
    assert sum(cell["failed"] for cell in cells) > 5
    assert {cell["error"] for cell in cells} == {"HTTP 400: told to say 400"}
