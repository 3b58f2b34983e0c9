"""What is known to be wrong before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve_app import preflight
from serve_app.config import AppConfig
from serve_app.errors import ConfigError
from serve_app.port import Address
from serve_app.preflight import GIB, Deployment


def deployment(model: Path, **changes: Any) -> Deployment:
    config = {
        "model": str(model),
        "served_model_name": "m",
        "device": "cpu",
        "pools": {"only": {"max_model_len": 64}},
        **changes,
    }
    parsed = AppConfig.model_validate(config)
    return Deployment(Address("127.0.0.1", 8000), Path("c.yaml"), parsed, insecure=False)


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


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(tmp_path: Path, host: str, url: str) -> None:
    plan = dataclasses.replace(deployment(tmp_path), address=Address(host, 8000))
    assert plan.url == url


def test_a_deployment_without_a_host_is_reached_by_others(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{model: m, served_model_name: m, device: cpu, pools: {only: {max_model_len: 64}}}"
    )
    (tmp_path / "d.yaml").write_text(f"applications: [{{args: {{config: {tmp_path}/c.yaml}}}}]")
    assert (
        preflight.read_deployment(tmp_path / "d.yaml").address.host == "0.0.0.0"
    )  # Serve's default


def write(directory: Path, listen: str) -> Path:
    (directory / "c.yaml").write_text(
        "{model: m, served_model_name: m, device: cpu, pools: {only: {max_model_len: 64}}}"
    )
    path = directory / "d.yaml"
    path.write_text(f"applications: [{{args: {{config: {directory}/c.yaml, {listen}}}}}]\n")
    return path


def test_gateways_that_listen_themselves_are_where_clients_go(tmp_path: Path) -> None:
    path = write(tmp_path, "listen: '[::1]:9000'")
    with path.open("a") as file:
        file.write("proxy_location: Disabled\n")
    assert preflight.read_deployment(path).url == "http://[::1]:9000"


def test_a_second_way_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one way"):
        preflight.read_deployment(write(tmp_path, "listen: '127.0.0.1:9000'"))


def test_no_way_in_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "insecure: true")
    with path.open("a") as file:
        file.write("proxy_location: Disabled\n")
    with pytest.raises(ConfigError, match="one way"):
        preflight.read_deployment(path)
