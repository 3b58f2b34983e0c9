"""The locustfiles as a user runs them, against the null server. Locust patches the process it is
imported into, so both stay in processes of their own."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from load_tests.null_server import ROOT, null_server
from tests.serving import free_port

MAKEFILE = ROOT / "Makefile"
MIX = "short=0.7:150-300:16:500:50,long=0.3:900:16:1000:50"


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    records: list[dict[str, Any]]
    summary: dict[str, Any]


def locust(files: str, host: str, out: Path, *arguments: str) -> Finished:
    paths = ",".join(f"load_tests/{name}" for name in files.split(","))
    command = [sys.executable, "-m", "locust", "-f", paths, "--headless", "--only-summary"]
    command += ["--host", host, "--out", str(out), "--floor", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines, summary = out / "requests.jsonl", out / "summary.json"
    return Finished(
        done.returncode,
        done.stdout + done.stderr,
        [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else [],
        json.loads(summary.read_text()) if summary.exists() else {},
    )


def benchmark(host: str, out: Path, *arguments: str) -> Finished:
    return locust("benchmark.py", host, out, "--mix", MIX, "-t", "2s", "--rate", "20", *arguments)


def test_benchmark_measures_what_the_server_was_told(tmp_path: Path) -> None:
    with null_server("--ttft-ms", "60", "--itl-ms", "8") as host:
        run = benchmark(host, tmp_path / "run", "--floor", "1")
    assert run.code == 0, run.out
    assert len(run.records) > 20
    assert {record["outcome"] for record in run.records} == {"ok"}
    assert len(run.records) == run.summary["classes"][-1]["count"]
    assert all(r["prompt_tokens"] == r["prompt_tokens_asked"] for r in run.records)
    assert {record["output_tokens"] for record in run.records} == {16}
    assert all(record["ttft_ms"] >= 60 for record in run.records)
    assert statistics.median(record["ttft_ms"] for record in run.records) < 70
    assert statistics.median(record["itl_ms"] for record in run.records) == pytest.approx(8, abs=1)
    assert statistics.median(g for r in run.records for g in r["gaps_ms"]) == pytest.approx(
        8, abs=2
    )
    assert all(record["e2e_ms"] >= 60 + 15 * 8 for record in run.records)
    assert all(record["sent"] >= record["scheduled"] for record in run.records)
    assert max(record["scheduled"] for record in run.records) > 1.4  # of the 2 s asked for
    assert run.summary["floor"]["failed"] == 0
    assert 0 < run.summary["floor"]["ttft_p50_ms"] < 20
    assert "VALID" in run.out
    for kind in ("POST", "TTFT", "ITL"):
        assert f"{kind:9}short" in run.out  # Locust's own table


@pytest.mark.parametrize("route", [(), ("--no-tokenize",)])
def test_lengths_count_the_chat_template(tmp_path: Path, route: tuple[str, ...]) -> None:
    with null_server("--template-tokens", "11", *route) as host:
        run = benchmark(host, tmp_path / "run", "-t", "1s")
    assert run.records
    assert all(r["prompt_tokens"] == r["prompt_tokens_asked"] for r in run.records)
    assert 900 in {record["prompt_tokens"] for record in run.records}


def test_chunks_of_several_tokens_keep_gap_and_itl_apart(tmp_path: Path) -> None:
    with null_server("--itl-ms", "5", "--tokens-per-chunk", "4") as host:
        run = benchmark(host, tmp_path / "run")
    # 16 tokens in 4 chunks: the last chunk comes 12 tokens' time after the first
    assert statistics.median(record["itl_ms"] for record in run.records) == pytest.approx(4, abs=1)
    assert statistics.median(g for r in run.records for g in r["gaps_ms"]) == pytest.approx(
        20, abs=3
    )


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("error-event", "error event: told to fail"),
        ("no-done", "the stream ended without [DONE]"),
        ("empty", "the stream held no content"),
        ("cut", "HTTPParseError: Incomplete response."),
        ("400", "HTTP 400: told to say 400"),
    ],
)
def test_a_fault_is_a_failure(tmp_path: Path, fault: str, error: str) -> None:
    with null_server("--fault", fault, "--fault-every", "2") as host:
        run = benchmark(host, tmp_path / "run")
    failed = [record for record in run.records if record["outcome"] == "failed"]
    assert run.code == 1
    assert abs(len(failed) - len(run.records) / 2) <= 1
    assert {record["error"] for record in failed} == {error}
    assert run.summary["classes"][-1]["failed"] == len(failed)
    assert error in run.out


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_counted_apart(tmp_path: Path, status: int) -> None:
    with null_server("--fault", str(status), "--fault-every", "2") as host:
        run = benchmark(host, tmp_path / "run")
    refused = [record for record in run.records if record["outcome"] == "rejected"]
    assert run.code == 0, run.out
    assert abs(len(refused) - len(run.records) / 2) <= 1
    assert all(r["refused"] == [status] and r["retry_after_s"] == 1 for r in refused)
    assert run.summary["classes"][-1]["refused"] == {str(status): len(refused)}
    assert run.summary["classes"][-1]["failed"] == 0


def test_retry_after_is_obeyed_on_request_and_counts_as_latency(tmp_path: Path) -> None:
    with null_server("--fault", "429", "--fault-every", "3") as host:
        run = benchmark(host, tmp_path / "run", "--obey-retry-after", "--rate", "8")
    waited = [record for record in run.records if record["refused"]]
    assert waited
    assert {record["outcome"] for record in run.records} == {"ok"}
    assert all(record["ttft_ms"] >= 1000 * len(record["refused"]) for record in waited)


def test_a_request_that_never_ends_makes_the_run_invalid(tmp_path: Path) -> None:
    with null_server("--fault", "hang", "--fault-every", "10") as host:
        run = benchmark(host, tmp_path / "run", "--drain", "1")
    lost = [record for record in run.records if record["outcome"] == "unfinished"]
    assert lost
    assert not run.summary["valid"]
    assert "INVALID" in run.out
    assert "have no outcome" in run.out


def test_one_seed_sends_the_same_requests(tmp_path: Path) -> None:
    with null_server() as host:
        runs = [
            benchmark(host, tmp_path / name, "--seed", seed)
            for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
        ]
    first, again, other = (
        [
            record["prompt_tokens_asked"]
            for record in sorted(r.records, key=lambda x: x["scheduled"])
        ]
        for r in runs
    )
    shared = min(len(first), len(again))
    assert shared > 10
    assert first[:shared] == again[:shared]
    assert first[:20] != other[:20]


def test_no_server_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    run = benchmark("http://127.0.0.1:9", tmp_path / "run")
    assert run.code == 1
    assert "http://127.0.0.1:9 does not answer like an OpenAI server" in run.out
    assert "Traceback" not in run.out


def test_a_mistake_in_the_mix_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with null_server() as host:
        run = benchmark(host, tmp_path / "run", "--mix", "short=1")
    assert run.code == 1
    assert "length class 'short=1' is not" in run.out
    assert "Traceback" not in run.out


def test_long_context_sweeps_every_length_and_ends(tmp_path: Path) -> None:
    with null_server("--ttft-ms", "20", "--itl-ms", "2") as host:
        run = locust(
            "long_context.py", host, tmp_path / "run", "--lengths", "256,2k", "--repeats", "3"
        )
    assert run.code == 0, run.out
    assert sorted(record["prompt_tokens"] for record in run.records) == [256] * 3 + [2048] * 3
    assert {record["found"] for record in run.records} == {False}  # the null server knows nothing
    cost = run.out[run.out.index("needles") :].splitlines()
    assert [line.split()[0] for line in cost[3:5]] == ["256", "2,048"]
    assert [line.split()[-1] for line in cost[3:5]] == ["0/3", "0/3"]


def test_a_crowd_at_once_is_waited_for_however_long_it_takes(tmp_path: Path) -> None:
    crowd = ("-u", "5", "-r", "5", "--lengths", "256", "--repeats", "10", "--drain", "0.1")
    with null_server("--ttft-ms", "1000") as host:
        run = locust("long_context.py", host, tmp_path / "run", *crowd)
    assert run.code == 0, run.out
    assert [record["outcome"] for record in run.records] == ["ok"] * 10
    assert "Traceback" not in run.out
    times = sorted(record["scheduled"] for record in run.records)
    assert times[5] - times[0] > 0.9  # five at once, then the others


def test_a_run_samples_the_kv_cache_and_says_how_it_was_made(tmp_path: Path) -> None:
    with null_server("--ttft-ms", "500") as host:
        key = ("--api-key", "secret")
        options = ("-t", "3s", "--label", "mine", "--progress", "1", *key)
        run = benchmark(host, tmp_path / "run", *options)
    lines = (tmp_path / "run" / "kv_usage.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert 2 <= len(samples) <= 5  # one a second, of 3 s and the drain
    assert samples[0]["at"] < samples[-1]["at"]
    assert max(sample["usage"]["0"] for sample in samples) > 0  # requests were under way
    assert (run.summary["kind"], run.summary["label"]) == ("benchmark", "mine")
    assert run.summary["offered_requests_s"] == pytest.approx(20, rel=0.4)
    assert "--api-key" in run.summary["command"]
    assert "secret" not in json.dumps(run.summary)
    assert {"python", "locust"} <= run.summary["versions"].keys()
    assert "cores" in run.summary["machine"]
    assert re.search(r"^ +1 s: \d+ sent, ", run.out, re.MULTILINE)


def test_a_client_that_cannot_keep_up_says_that_it_is_not_fit(tmp_path: Path) -> None:
    with null_server() as host:
        run = benchmark(host, tmp_path / "run", "-t", "2s", "--rate", "3000", "--drain", "5")
    assert not run.summary["valid"]
    assert "INVALID, do not quote" in run.out
    assert "requests left late" in run.out or "CPU was full" in run.out


def test_rates_are_run_one_after_another_and_drawn_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "load_tests.rates", "--rates", "5,20", "--out", str(tmp_path)]
    with null_server("--itl-ms", "1") as host:
        command += ["--host", host, "-t", "2s", "--floor", "0", "--mix", MIX]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    rates = [
        json.loads((tmp_path / f"rate-{rate}" / "summary.json").read_text())["offered_requests_s"]
        for rate in (5, 20)
    ]
    assert rates[0] < rates[1]
    assert (tmp_path / "report.html").exists()
    assert {each.stem for each in tmp_path.glob("*.png")} >= {"goodput", "throughput"}


def said(program: str) -> Any:
    """What a program prints as JSON, in a process of its own."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def users() -> dict[str, list[int | None]]:
    """Users of each shape with a peak of 10, at each twentieth of its length."""
    program = (
        "import json; from load_tests.shapes import SHAPES, users_at; "
        "print(json.dumps({s: [users_at(s, 10, t / 20) for t in range(21)] for s in SHAPES}))"
    )
    made: dict[str, list[int | None]] = said(program)
    return made


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("steps", [2] * 5 + [4] * 4 + [6] * 4 + [8] * 4 + [10] * 3),
        ("spike", [2] * 8 + [10] * 4 + [2] * 8),
        ("ramp", [1, *range(1, 11), *range(9, 0, -1)]),  # never none
    ],
)
def test_a_shape_has_its_users_at_each_part_and_then_ends(
    users: dict[str, list[int | None]], shape: str, expected: list[int]
) -> None:
    assert users[shape] == [*expected, None]


def test_every_run_is_followed_by_three_seconds_of_floor_unless_told_otherwise() -> None:
    program = (
        "import argparse, json; from load_tests.run import add_arguments; "
        "parser = argparse.ArgumentParser(); add_arguments(parser); "
        "print(json.dumps(parser.parse_args([]).floor))"
    )
    assert said(program) == 3.0


def test_spike_raises_the_rate_in_its_middle(tmp_path: Path) -> None:
    shape = ("--shape", "spike", "--peak", "10", "--shape-seconds", "10", "--rate", "4")
    with null_server() as host:
        run = locust("benchmark.py,shapes.py", host, tmp_path / "run", *shape)
    assert run.code == 0, run.out
    sent = [record["scheduled"] for record in run.records]
    before, during = sum(at < 4 for at in sent) / 4, sum(4.5 <= at < 6 for at in sent) / 1.5
    assert during > 2 * before


def page_command(*more: str) -> list[str]:
    """What `make load-ui` runs, in this environment."""
    found = re.search(r"^load-ui:.*\n\t\$\(BIN\)/locust (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    assert found is not None
    return [sys.executable, "-m", "locust", *found[1].split(), *more]


def until(what: str, condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for a condition, a page that does not answer yet being none."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert process.poll() is None, f"the page ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_locusts_page_starts_a_test_and_outlives_one_that_is_refused(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "run"
    options = ("--out", str(out), "--mix", MIX, "--rate", "20", "--floor", "0")
    command = page_command("--web-port", str(port), *options)
    page = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def start(host: str) -> None:
        form = {"host": host, "user_count": "1", "spawn_rate": "1"}
        assert page.post("/swarm", data=form).json()["success"]

    def shown() -> Any:
        return page.get("/stats/requests").json()

    with null_server() as host, page, subprocess.Popen(command, cwd=ROOT, text=True) as locust:
        try:
            until("it shows", lambda: "Locust" in page.get("/").text, locust)
            start("http://127.0.0.1:9")
            until("refusal", lambda: shown()["state"] == "stopped", locust)
            assert not out.exists()
            start(host)
            kinds = {"POST", "TTFT"}
            until("figures", lambda: kinds <= {row["method"] for row in shown()["stats"]}, locust)
            page.post("/stop")
            until("the summary", (out / "summary.json").exists, locust)
            assert page.get("/").status_code == 200
        finally:
            locust.terminate()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["host"] == host
    assert summary["classes"][-1]["ok"] > 0


def test_a_trace_is_replayed_at_its_own_times_and_ends_the_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,prompt_tokens,output_tokens\n0.4,200,8\n1,1500,16\n3,300,8\n")
    options = ("--trace", str(trace), "--speed", "2", "-u", "2", "--classes", "s=999:9:9,l=:9:9")
    with null_server() as host:
        run = locust("benchmark.py", host, tmp_path / "run", *options)
    assert run.code == 0, run.out
    by_time = sorted(run.records, key=lambda record: record["scheduled"])
    assert [(r["prompt_tokens"], r["output_tokens"], r["length_class"]) for r in by_time] == [
        (200, 8, "s"),
        (1500, 16, "l"),
        (300, 8, "s"),
    ]
    first, second, third = (record["scheduled"] for record in by_time)
    assert second - first == pytest.approx(0.3, abs=0.001)
    assert third - first == pytest.approx(1.3, abs=0.001)


def test_published_lengths_are_a_mix_of_their_own(tmp_path: Path) -> None:
    options = ("--lengths", "azure-code", "--longest", "2000", "-t", "2s", "--rate", "20")
    with null_server() as host:
        run = locust("benchmark.py", host, tmp_path / "run", *options)
    assert run.code == 0, run.out
    assert {record["length_class"] for record in run.records} == {"short", "long"}
    assert all(r["prompt_tokens"] + r["output_tokens"] <= 2000 for r in run.records)


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--trace", "none.csv"), "none.csv"), (("--lengths", "azure-code", "--classes", "x"), "'x'")],
)
def test_a_mistake_in_the_traffic_is_one_line(
    tmp_path: Path, options: tuple[str, ...], error: str
) -> None:
    with null_server() as host:
        run = locust("benchmark.py", host, tmp_path / "run", *options)
    assert run.code == 1
    assert error in run.out
    assert "Traceback" not in run.out
