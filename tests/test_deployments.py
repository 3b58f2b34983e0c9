"""What Serve is told of pools that scale; the rest is met in test_end_to_end.py."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from serve_app.autoscaling import TokenPolicy
from serve_app.config import AppConfig
from serve_app.deployments import EngineDeployment, _engine_options, _gateway_actor, application


def app(**pool: Any) -> AppConfig:
    config = {
        "model": "m",
        "served_model_name": "m",
        "device": "cpu",
        "pools": {"only": {"max_model_len": 64, **pool}},
    }
    return AppConfig.model_validate(config)


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
    assert callable(_apply_autoscaling_config(policy(**scaling.policy.policy_kwargs)))
    assert "env_vars" in _gateway_actor(config)["runtime_env"]
