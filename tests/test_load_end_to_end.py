"""Each locust file against the real server for some seconds: ``make load`` in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.report import write_report
from tests.serving import ROOT, Server


def run_locust(server: Server, out: Path, name: str, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        f"load_tests/{name}.py",
        "--headless",
        "-u",
        "1",
    ]
    command += ["--host", server.url, "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("benchmark", ("-t", "12s", "--rate", "2", "--floor", "1"), ("short", "medium")),
        (
            "long_context",
            ("--lengths", "256,1k,2k", "--repeats", "2", "--floor", "1"),
            ("256", "1024", "2048"),
        ),
    ],
)
def test_a_locust_file_measures_every_length_class(
    server: Server, tmp_path: Path, name: str, options: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    printed = run_locust(server, tmp_path, name, *options)
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["length_class"] for record in records} >= set(classes)
    assert all(record["outcome"] == "ok" for record in records)
    assert all(0 < record["ttft_ms"] <= record["e2e_ms"] for record in records)
    assert all(record["prompt_tokens"] == record["prompt_tokens_asked"] for record in records)
    assert all(record["output_tokens"] == 32 for record in records)
    assert all(record["pool"] in ("short", "long") for record in records)
    needles = [record["found"] for record in records if record["length_class"] == "256"]
    assert needles == [True] * (2 if name == "long_context" else 0)  # the demo's full attention
    for length_class in classes:
        assert length_class in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["classes"][-1]["count"] == len(records)
    # A busy machine may make the client late: then the run says so, and why.
    assert summary["valid"] == (not summary["verdict"]["faults"])
    assert ("VALID: schedule delay" if summary["valid"] else "INVALID, do not quote") in printed
    assert summary["floor"]["failed"] == 0


def test_the_servers_kv_cache_is_sampled_while_it_is_loaded(server: Server, tmp_path: Path) -> None:
    options = ("-u", "4", "-r", "4", "--lengths", "4k", "--repeats", "4", "--output-tokens", "64")
    run_locust(server, tmp_path, "long_context", *options, "--floor", "0")
    samples = [json.loads(x) for x in (tmp_path / "kv_usage.jsonl").read_text().splitlines()]
    engines = {name.split()[0] for sample in samples for name in sample["usage"]}
    assert engines == {"short", "long"}
    page = write_report([tmp_path])
    assert (page.parent / "kv.png").exists()
