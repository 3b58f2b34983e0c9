"""Other load testers against our gateway, unchanged: its real application before a null server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.null_server import ROOT, listening, null_server
from serve_app.demo import model as demo

# `vllm bench serve` without the command line around it, which looks for the name of the GPU build.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture
def gateway() -> Iterator[str]:
    """The URL of a gateway whose engine answers after 20 ms, without Ray."""
    with null_server("--ttft-ms", "20", "--itl-ms", "2") as engine:
        command = (sys.executable, "benchmarks/fake_engine.py", "gateway", engine)
        with listening(*command) as url:
            yield url


@pytest.fixture
def model(tmp_path: Path) -> Path:
    demo.build(tmp_path / "demo")
    return tmp_path / "demo"


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_vllm_bench_serve_measures_the_gateway(gateway: str, model: Path, tmp_path: Path) -> None:
    traffic = ("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "8")
    run(
        *(sys.executable, "-c", VLLM_BENCH_SERVE),
        *("--backend", "openai-chat", "--base-url", gateway),
        *("--endpoint", "/v1/chat/completions"),
        *("--model", "demo", "--tokenizer", str(model), *traffic),
        *("--num-prompts", "6", "--request-rate", "20", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 6 * 8
    assert min(result["latencies"]) > (20 + 7 * 2) / 1e3


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
def test_guidellm_measures_the_gateway(gateway: str, model: Path, tmp_path: Path) -> None:
    """guidellm pins packages that ours exclude: install it elsewhere and put it on the path."""
    run(
        *("guidellm", "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={gateway},model=demo"),
        *("--profile", "kind=constant,rate=5", "--constraint", "kind=max_requests,count=5"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8"),
        *("--tokenizer", f"kind=hf_auto,model={model}"),
        *("--output", f"kind=json,path={tmp_path / 'result.json'}"),
    )
    (benchmark,) = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 5
    assert not requests["errored"]
