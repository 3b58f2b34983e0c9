"""Which bundles an engine reserves, and what is said when a cluster cannot hold them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ray.serve._private.config import ReplicaConfig

from serve_app.config import AppConfig, PoolConfig
from serve_app.errors import ConfigError
from serve_app.placement import check_room, place, shortage


def pool(**values: Any) -> PoolConfig:
    return PoolConfig.model_validate({"max_model_len": 64, **values})


def app(device: str = "gpu", **pools: dict[str, Any]) -> AppConfig:
    sized = {
        name: {"max_model_len": 64 * (i + 1), **values}
        for i, (name, values) in enumerate(pools.items())
    }
    config = {"model": "m", "served_model_name": "m", "device": device, "pools": sized}
    return AppConfig.model_validate(config)


# What vLLM's worker on a GPU does once the weights are loaded.
THREADS = """
import torch
from vllm.utils.torch_utils import set_torch_threads_for_runtime
loading = torch.get_num_threads()
set_torch_threads_for_runtime()
print(loading, "then", torch.get_num_threads())
"""


def env_of(device: Literal["cpu", "gpu"], env: dict[str, str], **values: Any) -> dict[str, str]:
    options = place(pool(**values), device).deployment_options(env)
    seen: dict[str, str] = options["ray_actor_options"]["runtime_env"]["env_vars"]
    return seen


def test_one_worker_needs_no_group() -> None:
    options = place(pool(num_cpus=2), "gpu").deployment_options({"A": "b"})
    threads = {"OMP_NUM_THREADS": "2", "VLLM_OMP_NUM_THREADS_SET_BY_VLLM": "1"}
    assert options == {
        "ray_actor_options": {
            "num_cpus": 2,
            "num_gpus": 1,
            "runtime_env": {"env_vars": {**threads, "A": "b"}},
        }
    }
    assert place(pool(), "gpu").engine_args == {}


def test_vllm_serves_with_one_thread_unless_the_pool_says_otherwise() -> None:
    envs = [
        {"OMP_NUM_THREADS": "2"},  # what Ray sets by itself for num_cpus: 2
        env_of("gpu", {}, num_cpus=2),
        env_of("gpu", {"OMP_NUM_THREADS": "2"}, num_cpus=2),  # the operator's own wish
    ]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(threads_under, envs)) == ["2 then 2", "2 then 1", "2 then 2"]


def threads_under(env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def test_threads_without_gpus_are_rays_number() -> None:
    assert env_of("cpu", {"A": "b"}, num_cpus=2) == {"A": "b"}
    assert env_of("gpu", {}, num_cpus=0.5)["OMP_NUM_THREADS"] == "1"


def test_a_worker_of_several_loads_with_its_own_cpus() -> None:
    assert env_of("gpu", {}, tensor_parallel_size=2, num_cpus=3)["OMP_NUM_THREADS"] == "3"


def test_each_gpu_worker_has_a_bundle_and_the_replica_holds_no_gpu() -> None:
    placement = place(pool(tensor_parallel_size=4), "gpu")
    assert placement.bundles == ({"CPU": 2, "GPU": 1}, *[{"CPU": 1, "GPU": 1}] * 3)
    assert placement.strategy == "STRICT_PACK"
    assert placement.engine_args == {"distributed_executor_backend": "ray"}
    assert "num_gpus" not in placement.deployment_options({})["ray_actor_options"]


def test_pipeline_stages_may_lie_on_several_nodes_unless_told_otherwise() -> None:
    stages = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    assert place(pool(**stages), "gpu").strategy == "PACK"
    assert place(pool(**stages, placement_strategy="STRICT_PACK"), "gpu").strategy == "STRICT_PACK"
    assert place(pool(tensor_parallel_size=2, placement_strategy="PACK"), "gpu").strategy == "PACK"


def test_workers_without_gpus_stay_beside_their_replica() -> None:
    placement = place(pool(tensor_parallel_size=2), "cpu")
    assert placement.bundles == ({"CPU": 2}, {"CPU": 1})
    assert placement.strategy == "STRICT_PACK"
    assert placement.engine_args == {"distributed_executor_backend": "mp"}
    with pytest.raises(ConfigError, match="share one machine"):
        place(pool(tensor_parallel_size=2, placement_strategy="PACK"), "cpu")


def test_pipeline_stages_without_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 2, but without GPUs"):
        place(pool(pipeline_parallel_size=2), "cpu")


@given(
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 4),
    cpus=st.sampled_from([0.5, 1, 3]),
    device=st.sampled_from(["cpu", "gpu"]),
)
def test_serve_accepts_every_placement(
    tensor: int, pipeline: int, cpus: float, device: Any
) -> None:
    """Serve refuses bundles of which the first does not hold the replica."""
    assume(device == "gpu" or pipeline == 1)
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "num_cpus": cpus}
    placement = place(pool(**sizes), device)
    assert len(placement.bundles) == tensor * pipeline
    ReplicaConfig.create(object, **placement.deployment_options({}))


def test_what_fits_is_accepted_to_the_last_gpu() -> None:
    config = app(short={"replicas": 2}, long={"tensor_parallel_size": 2})
    check_room(config, [{"CPU": 3, "GPU": 2}, {"CPU": 3, "GPU": 2}])
    with pytest.raises(ConfigError, match=r"need 4 GPU, but the cluster has 3\."):
        check_room(config, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}])


def test_engines_that_share_a_gpu_need_one() -> None:
    check_room(app(a={"num_gpus": 0.5}, b={"num_gpus": 0.5}), [{"CPU": 4, "GPU": 1}])


def test_gateways_need_cpus_too() -> None:
    with pytest.raises(ConfigError, match=r"need 1\.50 CPU, but the cluster has 1\."):
        check_room(app(device="cpu", only={}), [{"CPU": 1}])


def test_a_tensor_parallel_engine_needs_one_node_that_holds_it() -> None:
    halves = [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}]
    with pytest.raises(ConfigError, match=r"pool big needs 8 GPU on one node.*more than 4"):
        check_room(app(big={"tensor_parallel_size": 8, "num_cpus": 0.5}), halves)
    with pytest.raises(ConfigError, match="no node has more than 0"):
        check_room(app(big={"tensor_parallel_size": 2}), [])
    staged = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "num_cpus": 0.5}
    check_room(app(big=staged), halves)


def test_resources_must_meet_on_the_same_node() -> None:
    apart = [{"CPU": 1, "GPU": 8}, {"CPU": 64}]
    with pytest.raises(ConfigError, match="No node has the 3 CPU and 2 GPU together"):
        check_room(app(pair={"tensor_parallel_size": 2}), apart)


def test_a_cluster_that_grows_is_not_judged_by_what_it_has_now() -> None:
    config = app(only={"tensor_parallel_size": 8})
    check_room(config.model_copy(update={"cluster_grows": True}), [{"CPU": 1}])


@pytest.mark.parametrize(
    ("sizes", "free", "sentence"),
    [
        (
            {"tensor_parallel_size": 2},
            {"CPU": 1.5},
            "An engine of pool big needs 3 CPU and 2 GPU on one node; free are 1.50 of 8 CPU, 0 of "
            "4 GPU: 1.50 CPU and 2 GPU missing.",
        ),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            {"CPU": 8, "GPU": 1},
            "An engine of pool big needs 5 CPU and 4 GPU; free are 8 of 8 CPU, 1 of 4 GPU: 3 GPU "
            "missing.",
        ),
        (
            {},
            {"CPU": 4, "GPU": 1},
            "An engine of pool big needs 1 CPU and 1 GPU on one node; free are 4 of 8 CPU, 1 of 4 "
            "GPU: enough, but not where it is needed together.",
        ),
    ],
)
def test_what_an_engine_waits_for_is_named(
    sizes: dict[str, int], free: dict[str, float], sentence: str
) -> None:
    nodes = [{"CPU": 4, "GPU": 2}] * 2
    assert shortage("big", place(pool(**sizes), "gpu"), nodes, free) == sentence
