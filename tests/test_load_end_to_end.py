"""Each locust file for twenty seconds against the real server, as ``make load`` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
        ("benchmark", ("-t", "20s", "--rate", "1.5"), ("short", "medium")),
        ("long_context", ("-t", "20s", "--lengths", "256,1k,2k"), ("256", "1024", "2048")),
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
    for length_class in classes:
        assert length_class in printed
