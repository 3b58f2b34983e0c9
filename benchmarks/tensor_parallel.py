"""One engine of two workers in a placement group, and what happens when one of them dies.

Run from the repository's root: ``python -m pytest -s benchmarks/tensor_parallel.py``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.serving import START_TIMEOUT_S, Server, demo_pool, write_deployment


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's long pool alone, split over two workers."""
    pool = demo_pool("long") | {"tensor_parallel_size": 2, "num_cpus": 0.5}
    running = Server(write_deployment({"pair": pool}, tmp_path_factory.mktemp("pair")))
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def complete(server: Server) -> httpx.Response:
    body = {"model": "demo", "prompt": [65] * 700, "max_tokens": 4, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def replicas(server: Server) -> set[str]:
    """The engines that the gateway lists."""
    return set(re.findall(r'replica="(\w+)"', httpx.get(f"{server.url}/metrics").text))


def workers(server: Server) -> set[psutil.Process]:
    """The processes of this server's engines that hold a part of the model."""
    return {p for p in server.processes() if "Worker_TP" in p.name()}


def test_two_workers_answer_as_one_engine(pair: Server) -> None:
    answer = complete(pair)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == 700
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert len(workers(pair)) == 2


def test_a_dead_worker_takes_its_engine_down_and_serve_replaces_it(pair: Server) -> None:
    before, group = replicas(pair), workers(pair)
    assert len(before) == 1
    min(group, key=lambda process: process.pid).kill()
    began = time.monotonic()
    _, left = psutil.wait_procs(group, timeout=30)
    assert not left, "the other worker outlived its engine"
    while not replicas(pair) - before or httpx.get(f"{pair.url}/ready").status_code != 200:
        assert time.monotonic() < began + START_TIMEOUT_S, pair.log[-4000:]
        time.sleep(0.5)
    assert complete(pair).status_code == 200
    print(f"a dead worker's engine was replaced after {time.monotonic() - began:.0f} s")
