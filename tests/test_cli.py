"""The ``local-attention`` command: what it refuses, what it shows, what it prints."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from load_tests.null_server import null_server
from serve_app import cli
from serve_app.demo import model as demo
from serve_app.keys import hash_key

ROOT = Path(__file__).parent.parent
ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "demo"
    demo.build(path)
    return path


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A real HTTP server on a free port, its answers given by a function."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def reply(handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.rfile.read(int(handler.headers.get("content-length", 0)))
    handler.send_response(status)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refusal(*args: str) -> str:
    """The one line that a refused command prints."""
    code, out, err = run(*args)
    assert code == 1
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def deployment(tmp_path: Path, model: Path) -> Callable[..., str]:
    """Writes a deployment file and its configuration, with the given changes."""

    def write(port: int = 0, host: str = "127.0.0.1", **changes: Any) -> str:
        config = {
            "model": str(model),
            "served_model_name": "demo",
            "device": "cpu",
            "pools": {"only": {"max_model_len": 64}},
            **changes,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        deploy = {
            "http_options": {"host": host, "port": port},
            "applications": [{"args": {"config": str(tmp_path / "config.yaml")}}],
        }
        (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(deploy))
        return str(tmp_path / "deploy.yaml")

    return write


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from serve_app.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('vllm', 'torch', 'ray', 'httpx') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo-model", "serve", "offline", "client", "quality"):
        assert command in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"


def test_demo_model_is_written(tmp_path: Path) -> None:
    code, _, err = run("demo-model", str(tmp_path / "new"))
    assert code == 0
    assert str(tmp_path / "new") in err
    assert (tmp_path / "new" / "config.json").is_file()


def test_demo_model_refuses_a_directory_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert "thesis.txt" in refusal("demo-model", str(tmp_path))


def test_serve_refuses_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal("serve", str(tmp_path / "none.yaml"))


def test_serve_refuses_a_port_in_use(deployment: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} of 127.0.0.1" in refusal("serve", deployment(port))


def test_serve_refuses_to_be_reached_by_others_without_keys(
    deployment: Callable[..., str], tmp_path: Path
) -> None:
    huge = {"huge": {"max_model_len": 64, "env": {"VLLM_CPU_KVCACHE_SPACE": "1000000"}}}
    path = deployment(host="0.0.0.0", pools=huge)
    assert "no API keys are set" in refusal("serve", path)
    assert "GiB is available" in refusal("serve", "--insecure", path)  # past that check
    (tmp_path / "keys").write_text(f"alice {hash_key('k')}")
    path = deployment(host="0.0.0.0", pools=huge, gateway={"api_keys_file": "keys"})
    assert "GiB is available" in refusal("serve", path)


def test_serve_refuses_an_unknown_key(deployment: Callable[..., str]) -> None:
    assert "polls is not known" in refusal("serve", deployment(polls={}))


def test_serve_refuses_an_unknown_engine_argument(deployment: Callable[..., str]) -> None:
    path = deployment(engine_args={"block_sise": 32})
    assert "block_sise. Did you mean block_size?" in refusal("serve", path)


def test_serve_refuses_a_missing_model(deployment: Callable[..., str], tmp_path: Path) -> None:
    line = refusal("serve", deployment(model=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in line


def test_serve_refuses_more_memory_than_there_is(deployment: Callable[..., str]) -> None:
    pool = {"max_model_len": 64, "env": {"VLLM_CPU_KVCACHE_SPACE": "1000000"}}
    assert "GiB is available" in refusal("serve", deployment(pools={"huge": pool}))


def test_serve_says_what_it_waits_for_until_it_is_ready() -> None:
    answers = iter(
        [
            (503, {"ready": False, "pools": {"short": 0, "long": 0}}),
            (503, {"ready": False, "pools": {"short": 1, "long": 0}}),
            (503, {"ready": False, "pools": {"short": 1, "long": 0}}),
            (200, {"ready": True, "pools": {"short": 1, "long": 1}}),
        ]
    )
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with server(lambda handler: reply(handler, *next(answers))) as url:
            states = list(cli._states(url, child))
    finally:
        child.communicate(b"\n")
    assert states == [
        "waiting for the engines of short and long: loading the model",
        "waiting for the engines of long: loading the model",
        f"ready: {url}/v1 (Ctrl-C stops it)",
    ]


def test_serve_stops_waiting_when_the_server_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert list(cli._states("http://127.0.0.1:9", child)) == []


def test_client_streams_the_answer_and_sends_the_models_name() -> None:
    bodies = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            reply(handler, 200, {"data": [{"id": "tiny"}]})
            return
        bodies.append(json.loads(handler.rfile.read(int(handler.headers["content-length"]))))
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        for text in ("Hel", "lo, 世界"):
            chunk = {"choices": [{"delta": {"content": text}}]}
            handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        last = {"choices": [], "usage": {"completion_tokens": 4}}
        handler.wfile.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())

    with server(answer) as url:
        code, out, err = run("client", "--url", url, "--prompt", "Hi", "--max-tokens", "9")
    assert (code, out) == (0, "Hello, 世界\n")
    assert re.fullmatch(r"TTFT [\d,]+ ms, 4 tokens, [\d,.]+ tokens/s\n", err)
    assert bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_client_keeps_the_conversation() -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            reply(handler, 200, {"data": [{"id": "tiny"}]})
            return
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        seen.append([message["content"] for message in body["messages"]])
        chunk = {"choices": [{"delta": {"content": f"answer {len(seen)}"}}]}
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

    with server(answer) as url:
        result = CliRunner().invoke(cli.app, ["client", "--url", url], input="one\ntwo\n")
    assert result.exit_code == 0
    assert seen == [["one"], ["one", "answer 1", "two"]]


def test_client_prints_the_servers_own_words() -> None:
    error = {"error": {"message": "The prompt has 9000 tokens, but the limit is 8192."}}

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            reply(handler, 200, {"data": [{"id": "tiny"}]})
        else:
            reply(handler, 400, error)

    with server(answer) as url:
        line = refusal("client", "--url", url, "--prompt", "x")
    assert line == f"error: {error['error']['message']}"


def test_client_without_a_server_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    line = refusal("client", "--url", f"http://127.0.0.1:{port}", "--prompt", "x")
    assert "local-attention serve" in line


def test_client_takes_a_load_tests_options_with_a_test_mode_only() -> None:
    assert "--rate is not an option" in refusal("client", "--prompt", "x", "--rate", "2")


def load_test(mode: str, *options: str) -> str:
    """What the command prints of a load test against the null server."""
    command = [sys.executable, "-c", "from serve_app.cli import app; app()", "client"]
    with null_server("--itl-ms", "1") as url:
        done = subprocess.run(
            [*command, "--test-mode", mode, "--url", url, *options],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_client_runs_the_benchmark_with_progress_and_a_table(tmp_path: Path) -> None:
    short = ("--run-time", "3s", "--progress", "1", "--floor", "0", "--rate", "10")
    out = load_test("benchmark", *short, "--out", str(tmp_path / "run"))
    assert re.search(r"^   2 s: \d+ sent, \d+ answered, 0 failed, 0 refused", out, re.MULTILINE)
    assert re.search(r"^short +\d+", out, re.MULTILINE)
    assert "Aggregated" not in out  # Locust's own tables
    assert (tmp_path / "run" / "summary.json").exists()
    code, printed, _ = run("report", str(tmp_path / "run"))
    assert (code, printed) == (0, f"{tmp_path}/run/report.html\n")


def test_client_sweeps_lengths(tmp_path: Path) -> None:
    options = ("--lengths", "256,1k", "--repeats", "1", "--floor", "0")
    out = load_test("long-context", *options, "--out", str(tmp_path / "run"))
    assert re.search(r"^1,024 +1/1 ", out, re.MULTILINE)


def test_report_of_nothing_is_one_line(tmp_path: Path) -> None:
    assert "summary.json" in refusal("report", str(tmp_path))


def test_offline_refuses_sinks_without_a_window(model: Path) -> None:
    args = ("--attention-chunk-size", "32", "--attention-sinks", "4")
    line = refusal("offline", "--model", str(model), "--prompt", "x", *args)
    assert "sliding_window" in line


def test_offline_refuses_a_missing_model(tmp_path: Path) -> None:
    line = refusal("offline", "--model", str(tmp_path / "nowhere"), "--prompt", "x")
    assert "config.json" in line


def offline(model: Path, *args: str) -> str:
    command = [sys.executable, "-c", "from serve_app.cli import app; app()", "offline"]
    done = subprocess.run(
        [*command, "--model", str(model), "--prompt", "abcdefgh" * 16, "--max-tokens", "24", *args],
        # In the command's own process, which is a process less to start.
        env={**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_prints_text_that_depends_on_the_pattern(model: Path) -> None:
    with ThreadPoolExecutor() as both:
        windows = both.map(
            lambda tokens: offline(model, "--sliding-window", tokens), ["1024", "32"]
        )
        wide, narrow = windows
    assert len(wide) == 24 + 1
    assert narrow != wide


def test_what_the_user_sets_wins_over_what_the_server_starts_with() -> None:
    started = cli.server_environment({"RAY_worker_niceness": "5", "HOME": "/home/me"})
    assert started["RAY_worker_niceness"] == "5"
    assert started["HOME"] == "/home/me"
    assert started["VLLM_NO_USAGE_STATS"] == "1"
