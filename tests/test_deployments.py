"""What Serve is told of pools that scale; the rest is met in test_end_to_end.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from serve_app.autoscaling import DemandLedger, TokenPolicy
from serve_app.batching import BatchingLimits
from serve_app.config import AppConfig, GatewayConfig
from serve_app.deployments import (
    BuildArgs,
    EngineDeployment,
    _demand,
    _discovery,
    _engine_options,
    _gateway_actor,
    _metrics,
    _pool,
    application,
    build,
)
from serve_app.errors import ConfigError
from serve_app.keys import INSECURE_VARIABLE, KEYS_VARIABLE
from serve_app.request import Call, Demand, EngineInfo, EngineLoad
from serve_app.router import Pool, Share

FILE: dict[str, Any] = {
    "model": "m",
    "served_model_name": "m",
    "device": "cpu",
    "pools": {"only": {"max_model_len": 64}},
}


def app(gateway: dict[str, Any] | None = None, **pool: Any) -> AppConfig:
    pools = {"only": {"max_model_len": 64, **pool}}
    return AppConfig.model_validate(FILE | {"pools": pools, "gateway": gateway or {}})


def test_a_fixed_pool_has_its_number_of_replicas() -> None:
    config = app(replicas=3)
    options = _engine_options(config, config.pools["only"])
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options
    assert _gateway_actor(config) == {"num_cpus": 0.5}


def test_updates_start_the_next_before_they_stop_the_last_where_there_is_room() -> None:
    config = app(max_surge_percent=100)
    options = _engine_options(config, config.pools["only"])
    assert options["max_surge_percent"] == 100
    gateway = application(config)._bound_deployment
    assert gateway._deployment_config.max_surge_percent == 100


def test_serve_takes_the_policy_and_its_settings() -> None:
    config = app(autoscaling={"min_replicas": 0, "max_replicas": 4, "down_delay_s": 30})
    options = _engine_options(config, config.pools["only"])
    deployment = serve.deployment(EngineDeployment).options(name="engine-only", **options)
    scaling = deployment._deployment_config.autoscaling_config
    assert isinstance(scaling, AutoscalingConfig)
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 4)
    policy = scaling.policy.get_policy()
    assert policy is TokenPolicy
    settings = config.pools["only"].autoscaling
    assert settings is not None
    assert scaling.policy.policy_kwargs == settings.model_dump()
    assert scaling.policy.policy_kwargs["down_delay_s"] == 30
    assert callable(_apply_autoscaling_config(policy(**scaling.policy.policy_kwargs)))
    assert "env_vars" in _gateway_actor(config)["runtime_env"]


def test_a_gateways_pool_is_as_the_configuration_says() -> None:
    gateway = {
        "replicas": 2,
        "overcommit": 3,
        "length_edges": [100, 1000],
        "run_tokens": 5000,
        "max_queued": 7,
        "max_wait_s": 1.5,
        "batch_max_wait_s": 9,
    }
    pool = _pool(app(gateway), "only")
    assert (pool.name, pool.limit, pool.ready) == ("only", 64, False)
    assert pool._share == Share(gateways=2, overcommit=3)
    assert pool._batcher._limits == BatchingLimits((100, 1000), 7, 5000, 1.5, 9)


def test_a_pool_that_starts_from_nothing_is_waited_for() -> None:
    scaling = {"min_replicas": 0, "max_replicas": 1}
    pool = _pool(app({"first_token_timeout_s": 40}, autoscaling=scaling), "only")
    assert pool.ready
    assert pool._cold_start_s == 40


def test_what_is_not_configured_is_as_the_scheduler_has_it() -> None:
    assert _pool(app(), "only")._batcher._limits == BatchingLimits()
    assert GatewayConfig().overcommit == Share().overcommit


@pytest.mark.parametrize(("gateways", "label"), [(1, None), (2, "g-1")])
def test_gateways_are_told_apart_in_metrics_where_there_are_several(
    gateways: int, label: str | None
) -> None:
    text = _metrics(app({"replicas": gateways}), "g-1").text().decode()
    labels = {
        sample.labels.get("gateway")
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert labels == {label}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The resources of a cluster of one node, beside one that is gone; keys are not set."""
    resources = {"CPU": 8.0}
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}, gone])
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.delenv(INSECURE_VARIABLE, raising=False)
    return resources


def write(directory: Path, **changes: Any) -> str:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    return str(path)


@pytest.mark.usefixtures("cluster")
def test_a_public_address_without_keys_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = BuildArgs(config=write(tmp_path), listen="0.0.0.0:8000")
    with pytest.raises(ConfigError, match="no API keys are set"):
        build(args)
    assert build(args.model_copy(update={"insecure": True}))
    assert build(args.model_copy(update={"listen": "127.0.0.1:8000"}))
    assert build(args.model_copy(update={"listen": None}))
    monkeypatch.setenv(KEYS_VARIABLE, f"alice {'0' * 64}")
    assert build(args)


def test_a_configuration_that_the_cluster_cannot_hold_is_not_built(
    tmp_path: Path, cluster: dict[str, float]
) -> None:
    args = BuildArgs(config=write(tmp_path))
    assert build(args)
    cluster["CPU"] = 1.0  # the node that is gone had enough
    with pytest.raises(ConfigError, match="CPU"):
        build(args)


class FakeHandle:
    """A deployment's handle: notes what is broadcast and answers as one engine."""

    deployment_name = "engine-only"

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def broadcast(self, *told: Any) -> Any:
        self.told.append(told)

        async def results_async(**_: Any) -> list[EngineInfo]:
            return [ENGINE]

        return SimpleNamespace(results_async=results_async)


ENGINE = EngineInfo("e", "only", "http://e", "token", kv_tokens=900, load=EngineLoad(kv_usage=0.5))


@pytest.mark.parametrize("scales", [True, False])
async def test_engines_hear_the_demand_where_their_pool_scales_by_it(scales: bool) -> None:
    config = app(**({"autoscaling": {"max_replicas": 2}} if scales else {}))
    pool, handle = Pool("only", 64), FakeHandle()
    demand = _demand(config, pool, "g1")
    discover = _discovery(handle, demand)  # type: ignore[arg-type]
    assert await discover() == [ENGINE]
    pool.update([ENGINE])
    await pool.lease(Call("r", "/", b"", fit_tokens=40, total_tokens=40, output_tokens=8))
    await discover()
    busy = pool.demand("g1")
    assert busy.tokens >= 40
    demands = [(Demand("g1", 0, 0.0),), (busy,)] if scales else [(), ()]
    assert handle.told == [("describe", *demand) for demand in demands]


async def test_what_an_engine_hears_reaches_the_policy() -> None:
    engine = SimpleNamespace(
        _engine=SimpleNamespace(describe=lambda: ENGINE), _demands=DemandLedger()
    )
    stats = partial(EngineDeployment.record_autoscaling_stats, engine)
    assert stats()["tokens"] == 0
    assert await EngineDeployment.describe(engine) == ENGINE
    assert await EngineDeployment.describe(engine, Demand("g1", tokens=70, ttft_s=0.4)) == ENGINE
    assert stats() == {
        "tokens": 70,
        "ttft_s": 0.4,
        "kv_usage": 0.5,
        "preemptions": 0,
        "room": 900,
    }
