"""An engine of two workers in a placement group, and a pool that the cluster has no room for.

``benchmarks/tensor_parallel.py`` kills a worker, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serving import START_TIMEOUT_S, Server, demo_pool, write_deployment

SAID_WITHIN_S = 40  # 30, and what a busy machine adds


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model split over two workers, and a pool for which no node is large enough."""
    pools = {
        "pair": {"tensor_parallel_size": 2, "num_cpus": 0.5, "max_model_len": 1024},
        "vast": {"tensor_parallel_size": 2, "num_cpus": 5000},
    }
    directory = tmp_path_factory.mktemp("split")
    deploy = write_deployment({name: demo_pool("long") | pools[name] for name in pools}, directory)
    with (directory / "config.yaml").open("a") as file:
        file.write("cluster_grows: true\n")  # nobody refuses the pool that waits for ever
    running = Server(deploy)
    try:
        yield running
    finally:
        running.stop(within_s=5)  # Serve gives a replica that waits for its place 30 s more


def state(server: Server) -> dict[str, dict[str, object]]:
    """What ``/ready`` answers; nothing while nobody does."""
    try:
        answer: dict[str, dict[str, object]] = httpx.get(f"{server.url}/ready", timeout=5).json()
    except httpx.HTTPError:
        return {"pools": {}}
    return answer


def test_a_pool_without_room_says_what_is_missing(split: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "vast" not in state(split)["pools"]:
        assert time.monotonic() < deadline, split.log[-4000:]
        time.sleep(0.5)
    began = time.monotonic()
    while "vast" not in state(split).get("missing", {}):
        assert time.monotonic() < began + SAID_WITHIN_S, state(split)
        time.sleep(0.5)
    missing = state(split)["missing"]
    assert list(missing) == ["vast"]  # the other is placed, and starts or answers
    said = str(missing["vast"])
    assert said.startswith("An engine of pool vast needs 15000 CPU on one node; free are ")
    assert said.endswith(" CPU missing.")
    assert f"no engine of pool vast: {said}" in split.log


def test_two_workers_answer_as_one_engine(split: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while state(split)["pools"].get("pair", 0) != 1:
        assert time.monotonic() < deadline, split.log[-4000:]
        time.sleep(0.5)
    body = {"model": "demo", "prompt": [65] * 700, "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{split.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-pool"] == "pair"
    assert answer.json()["usage"]["prompt_tokens"] == 700
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert sum("Worker_TP" in process.name() for process in split.processes()) == 2
