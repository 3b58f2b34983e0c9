"""The quality command: what it refuses, and one run on real engines, cut off and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from serve_app import cli
from serve_app.demo import model as demo
from serve_app.demo.shape import Shape
from tests.serving import ROOT
from tests.test_cli import ENGINE_ENV


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "demo"
    demo.build(path)
    return path


def refusal(*args: str) -> str:
    """The one sentence that a refused command prints; no engine is started for it."""
    result = CliRunner().invoke(cli.app, ["quality", *args])
    assert result.exit_code == 1, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--dataset", "/nowhere.txt", "needle or a file of text: No such file"),
        ("--dataset", "/", "Is a directory"),
        ("--max-model-len", "16384", "but the model was made for 8192 tokens"),
        ("--lengths", "8k", "it must be from 128 to 8144 tokens"),
        ("--windows", "wide", "numbers such as 256,1k,full"),
        ("--engine-args", "{", "--engine-args is not JSON"),
        ("--engine-args", "[]", "must be a JSON object"),
        ("--engine-args", '{"max_model_len": 9}', "give it by --max-model-len"),
        ("--engine-args", '{"kv_cache_dtype": "int3"}', "kv_cache_dtype is 'int3'"),
        ("--engine-args", '{"max_num_seqs": "many"}', "invalid literal for int"),
        ("--engine-args", '{"block_sise": 32}', "Did you mean block_size?"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    model: Path, tmp_path: Path, option: str, value: str, said: str
) -> None:
    line = refusal("--model", str(model), option, value, "--out", str(tmp_path / "out"))
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "config.json does not exist" in refusal("--model", str(tmp_path), "--out", "x")


def test_a_text_that_is_none_is_refused(model: Path, tmp_path: Path) -> None:
    for content, said in ((b" \n", "has no text"), (b"\xff\xfe\x00", "is not UTF-8 text")):
        (tmp_path / "text").write_bytes(content)
        assert said in refusal("--model", str(model), "--dataset", str(tmp_path / "text"))


def test_a_model_that_takes_no_plan_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    config = {**demo.config(Shape(), "full"), "model_type": "deepseek_v3", "kv_lora_rank": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "(MLA)" in refusal("--model", str(tmp_path), "--out", str(tmp_path / "out"))


def second_engine(pid: int) -> psutil.Process:
    """The child of a command that has measured one plan and begins the next."""
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return children[0]


def test_a_run_that_is_cut_off_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    """Two plans on a text of our own; interrupted in the second, gone on with, and run again."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text((ROOT / "docs" / "guide.md").read_text())
    command = [sys.executable, "-c", "from serve_app.cli import app; app()", "quality"]
    command += ["--model", str(model), "--dataset", str(text), "--out", str(out)]
    command += ["--windows", "64", "--sinks", "0", "--full-every", "0", "--max-model-len", "512"]
    command += ["--questions", "1", "--sequences", "1", "--loss", "100"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**os.environ, **ENGINE_ENV, "COLUMNS": "120"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish() -> tuple[str, str]:
        printed, notes = start().communicate(timeout=300)
        logs = "".join(log.read_text()[-3000:] for log in out.glob("*.log"))
        assert "The cheapest plan within a loss of 10000% is window 64" in printed, notes + logs
        return printed, notes

    def stored() -> dict[str, Any]:
        results: dict[str, Any] = json.loads((out / "results.json").read_text())["results"]
        return results

    with start() as first:
        assert first.stderr is not None
        assert any(line.startswith("full: ") for line in first.stderr)
        engine = second_engine(first.pid)
        first.send_signal(signal.SIGINT)
        assert "the same command goes on from here" in first.stderr.read()
    assert first.returncode == 130
    assert not engine.is_running()
    kept = stored()
    assert list(kept) == ["full"]

    printed, notes = finish()
    assert "1 of 2 plans are in" in notes
    assert stored()["full"] == kept["full"]
    full, window = stored()["full"], stored()["window 64"]
    assert (full["plan"], window["plan"]) == (
        "the model as it is",
        "4 x sliding 64, from additional_config",
    )
    assert [(band["low"], band["high"]) for band in full["perplexity"]] == [
        (0, 128),
        (128, 256),
        (256, 512),
    ]
    assert sum(band["tokens"] for band in full["perplexity"]) == 510
    # Nothing is out of the window's reach at first; later on, what is forgotten is missed.
    rises = [
        abs(w["nats"] - f["nats"])
        for f, w in zip(full["perplexity"], window["perplexity"], strict=True)
    ]
    assert rises[-1] > 1e-3
    assert all(0.7 * one["length"] <= one["tokens"] <= one["length"] for one in full["answers"])
    assert all(len(tokens) == 48 for tokens in full["continuations"])
    assert full["decode_ms"] > 0
    summary = json.loads((out / "quality.json").read_text())
    reference, local = summary["plans"]
    assert (reference["worst_rise"], reference["agreement"]) == (0, 1)
    assert local["kv_bytes"] < reference["kv_bytes"]
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")

    before = (out / "results.json").stat().st_mtime_ns
    again, notes = finish()
    assert again == printed
    assert "2 of 2 plans are in" in notes
    assert (out / "results.json").stat().st_mtime_ns == before
