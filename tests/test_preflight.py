"""What is known to be wrong before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve_app import preflight
from serve_app.config import AppConfig
from serve_app.errors import ConfigError
from serve_app.keys import KEYS_VARIABLE, hash_key
from serve_app.preflight import GIB, Deployment


def deployment(model: Path, **changes: Any) -> Deployment:
    config = {
        "model": str(model),
        "served_model_name": "m",
        "device": "cpu",
        "pools": {"only": {"max_model_len": 64}},
        **changes,
    }
    return Deployment("127.0.0.1", 8000, Path("c.yaml"), AppConfig.model_validate(config))


def test_argument_names_read_from_the_source_are_vllms_own() -> None:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    fields = [*dataclasses.fields(AsyncEngineArgs), *dataclasses.fields(FrontendArgs)]
    assert preflight.engine_argument_names() == {field.name for field in fields}


def test_memory_counts_replicas_weights_and_kv_cache(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    pools = {
        "short": {"max_model_len": 64, "replicas": 2, "env": {"VLLM_CPU_KVCACHE_SPACE": "3"}},
        "long": {
            "max_model_len": 128,
            "tensor_parallel_size": 2,
            "engine_args": {"kv_cache_memory_bytes": 500},
        },
    }
    needed = preflight.needed_memory(deployment(tmp_path, pools=pools).config)
    overhead = 3 * preflight.ENGINE_OVERHEAD_BYTES
    assert needed == overhead + 3 * 1000 + 2 * 3 * GIB + 2 * 500


def test_too_little_memory_names_both_figures(tmp_path: Path) -> None:
    plan = deployment(tmp_path)
    preflight.check_memory(plan, preflight.ENGINE_OVERHEAD_BYTES)
    with pytest.raises(ConfigError, match=r"2\.0 GiB of memory, but 1\.0 GiB is available"):
        preflight.check_memory(plan, GIB)


def test_available_memory_is_what_this_machine_could_have() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < preflight.available_memory() <= total


def test_this_machine_is_compared_with_what_the_pools_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pools = {"only": {"max_model_len": 64, "num_cpus": 10_000}}
    plan = deployment(tmp_path, pools=pools)
    assert preflight.this_node()["CPU"] >= 1
    with pytest.raises(ConfigError, match="pool only needs 10000 CPU on one node"):
        preflight.check_machine(plan)


def test_a_model_by_name_is_left_to_vllm() -> None:
    preflight.check_model("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    "text", ["", "applications: []", "applications: [{args: {}}]", "- 1", "applications: 3"]
)
def test_a_deployment_without_a_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="one application whose args name a config"):
        preflight.read_deployment(path)


def test_a_deployment_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        preflight.read_deployment(path)


def test_the_url_is_one_that_a_client_can_use(tmp_path: Path) -> None:
    plan = deployment(tmp_path)
    assert plan.url == "http://127.0.0.1:8000"
    assert dataclasses.replace(plan, host="0.0.0.0").url == "http://127.0.0.1:8000"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(tmp_path: Path, host: str) -> None:
    preflight.check_exposure(dataclasses.replace(deployment(tmp_path), host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.example"])
def test_others_need_keys(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(deployment(tmp_path), host=host)
    with pytest.raises(ConfigError, match=f"{host}.*no API keys"):
        preflight.check_exposure(plan)
    monkeypatch.setenv(KEYS_VARIABLE, f"alice {hash_key('k')}")
    preflight.check_exposure(plan)


def test_a_keys_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    plan = deployment(tmp_path, gateway={"api_keys_file": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="none cannot be read"):
        preflight.check_exposure(dataclasses.replace(plan, host="0.0.0.0"))


def test_a_deployment_without_a_host_is_reached_by_others(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{model: m, served_model_name: m, device: cpu, pools: {only: {max_model_len: 64}}}"
    )
    (tmp_path / "d.yaml").write_text(f"applications: [{{args: {{config: {tmp_path}/c.yaml}}}}]")
    assert preflight.read_deployment(tmp_path / "d.yaml").host == "0.0.0.0"  # Serve's default
