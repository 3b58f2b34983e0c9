from __future__ import annotations

from load_tests.kv_usage import fetch, parse
from load_tests.null_server import null_server

OURS = """\
# HELP engine_kv_cache_usage_ratio Share of KV blocks in use.
# TYPE engine_kv_cache_usage_ratio gauge
engine_kv_cache_usage_ratio{pool="short",replica="ab1"} 0.25
engine_kv_cache_usage_ratio{pool="long",replica="cd2"} 1e-05
engine_preemptions{pool="long",replica="cd2"} 3.0
"""
VLLMS = 'vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.5\n'


def test_engines_are_named_by_pool_and_replica_or_number() -> None:
    assert parse(OURS) == {"short ab1": 0.25, "long cd2": 1e-05}
    assert parse(VLLMS) == {"0": 0.5}
    assert parse("engine_kv_cache_usage_ratio 0.5") == {"engine": 0.5}
    assert parse("<html>") == {}


def test_a_server_is_asked_and_may_not_answer() -> None:
    with null_server() as host:
        assert fetch(host, {}) == {"0": 0.0}
    assert fetch("http://127.0.0.1:9", {}) == {}
