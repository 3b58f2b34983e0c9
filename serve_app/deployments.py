"""The Ray Serve application: one gateway deployment in front of one deployment for each pool.

``serve run deploy.yaml`` calls :func:`build` with the arguments that the file names.
"""

# No "from __future__ import annotations" here: Ray reads the builder's annotation at run time to
# validate its arguments, and a string would make it pass a plain dict.

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from serve_app.absence import Explain, explain_absences
from serve_app.api import create_app, identified
from serve_app.autoscaling import DemandLedger
from serve_app.batching import BatchingLimits
from serve_app.config import AppConfig, Autoscaling, PoolConfig, load_config
from serve_app.keys import INSECURE_VARIABLE, check_exposure, read_keys
from serve_app.metrics import GatewayMetrics
from serve_app.placement import check_room, place, shortage
from serve_app.port import Address, Port
from serve_app.request import Demand, EngineInfo
from serve_app.router import Discover, Pool, Router, Share, Wake, keep_fresh
from serve_app.tracing import Tracer
from serve_app.upstream import Upstream

log = logging.getLogger(__name__)

_DISCOVER_TIMEOUT_S = 5.0
_LOOKS, _BETWEEN_LOOKS_S = 60, 0.05  # three seconds, until engines are known
# Serve's processes report to its autoscaler every ten seconds unless told otherwise.
_REPLICA_PUSH = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"
_HANDLE_PUSH = "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"
_PUSH_INTERVAL_S = "1"
_LOOK_BACK_S = 10.5  # Serve warns below its metrics interval of ten seconds


class EngineDeployment:
    """A Serve replica that owns one vLLM engine."""

    async def __init__(self, config: AppConfig, pool: str) -> None:  # type: ignore[misc]
        # vLLM is imported in the replica alone: the gateway and the builder never need it.
        from serve_app.engine import Engine

        self._drain_s = config.pools[pool].drain_s
        self._demands = DemandLedger()
        loopback = config.engine_bind == "loopback"
        self._engine = await Engine.start(
            config.engine_args_of(pool) | place(config.pools[pool], config.device).engine_args,
            pool=pool,
            replica=serve.get_replica_context().replica_id.unique_id,
            host="127.0.0.1" if loopback else get_node_ip_address(),
            silent_s=config.gateway.first_token_timeout_s,
        )

    async def describe(self, demand: Demand | None = None) -> EngineInfo:
        """How gateways reach this engine, and its load.

        ``demand`` is that of the gateway that asks, where the pool scales by it.
        """
        if demand is not None:
            self._demands.note(demand)
        return self._engine.describe()

    async def wake(self) -> None:
        """Nothing: a call that waits for it makes Serve start a first replica."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to ``autoscaling.TokenPolicy``."""
        info = self._engine.describe()
        return self._demands.stats(info.load, info.kv_tokens)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        # Serve awaits this at scale-down and update, after it stopped listing the replica. A
        # constructor that failed leaves nothing to stop.
        if hasattr(self, "_engine"):
            await self._engine.stop(self._drain_s)


@serve.ingress()
class GatewayDeployment:
    """A Serve replica that answers HTTP and routes to engines.

    Clients reach it through Serve's proxy or, at less cost, through a port of its own.
    """

    async def __init__(  # type: ignore[misc]
        self, config: AppConfig, listen: Address | None, **engines: DeploymentHandle
    ) -> None:
        gateway = config.gateway
        self._config = config
        self._upstream = Upstream(
            config.served_model_name, gateway.first_token_timeout_s, gateway.inter_token_timeout_s
        )
        pools = [_pool(config, name) for name in config.pools]
        me = serve.get_replica_context().replica_id.unique_id
        self._router = Router(pools, self._upstream.open)
        self._tasks = [
            asyncio.create_task(
                keep_fresh(
                    pool,
                    _discovery(engines[pool.name], _demand(config, pool, me)),
                    self._upstream.probe,
                    gateway.refresh_interval_s,
                    _waking(engines[pool.name]),
                )
            )
            for pool in pools
        ]
        explain = _explanation(config, serve.get_replica_context().app_name)
        self._tasks.append(asyncio.create_task(explain_absences(pools, explain)))
        self._tracer = Tracer.configured(gateway.otlp_endpoint)
        keys = read_keys(config)
        self._app = create_app(config, self._router, _metrics(config, me), keys, self._tracer)
        if listen is not None:  # all gateways of a node listen on the same port
            await self._look_around()
            self._port = Port(identified(self._app), listen, shared=True)

    async def _look_around(self) -> None:
        """Find engines before clients come, if there are some: one that takes over must not refuse.

        Where engines still start, clients are told so.
        """
        for _ in range(_LOOKS):
            if self._router.ready:
                return
            await asyncio.sleep(_BETWEEN_LOOKS_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        if hasattr(self, "_port") and self._port.closed:
            raise RuntimeError("the gateway's HTTP port has closed")
        for task in self._tasks:
            if task.done():
                task.result()

    async def __del__(self) -> None:
        if hasattr(self, "_port"):
            await self._port.drain(_drain_s(self._config))
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if hasattr(self, "_upstream"):
            await self._upstream.close()
        if tracer := getattr(self, "_tracer", None):
            await asyncio.to_thread(tracer.close)


def _pool(config: AppConfig, name: str) -> Pool:
    gateway, pool = config.gateway, config.pools[name]
    return Pool(
        name,
        pool.max_model_len,
        cold_start_s=gateway.first_token_timeout_s if pool.scales_from_zero else None,
        share=Share(gateways=gateway.replicas, overcommit=gateway.overcommit),
        limits=BatchingLimits(
            edges=gateway.length_edges,
            run_tokens=gateway.run_tokens,
            max_queued=gateway.max_queued,
            max_wait_s=gateway.max_wait_s,
            batch_max_wait_s=gateway.batch_max_wait_s,
        ),
    )


def _metrics(config: AppConfig, gateway: str) -> GatewayMetrics:
    return GatewayMetrics(gateway if config.gateway.replicas > 1 else None)


def _demand(config: AppConfig, pool: Pool, gateway: str) -> Callable[[], tuple[Demand, ...]]:
    """What engines are told when they are asked: the demand, where the pool scales by it."""
    if config.pools[pool.name].autoscaling is None:
        return tuple
    return lambda: (pool.demand(gateway),)


def _discovery(handle: DeploymentHandle, demand: Callable[[], tuple[Demand, ...]]) -> Discover:
    """Asks every live replica of a deployment to describe itself, and tells it the demand."""

    async def discover() -> list[EngineInfo] | None:
        try:
            answers = await handle.broadcast("describe", *demand()).results_async(
                timeout_s=_DISCOVER_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            # One replica that hangs says nothing of the others; calls to them show who lives.
            log.warning("not every engine of %s describes itself", handle.deployment_name)
            return None
        except (RayError, RayServeException) as error:
            log.info("no engine of %s answers: %s", handle.deployment_name, error)
            return []
        return [answer for answer in answers if isinstance(answer, EngineInfo)]

    return discover


def _waking(handle: DeploymentHandle) -> Wake:
    """Waits until a deployment has a replica, which makes Serve start one."""

    async def wake() -> None:
        log.info("requests wait for a first engine of %s", handle.deployment_name)
        try:
            await handle.wake.remote()
        except (RayError, RayServeException) as error:
            log.warning("no engine of %s came: %s", handle.deployment_name, error)

    return wake


def _explanation(config: AppConfig, application: str) -> Explain:
    """Looks whether Ray has placed an engine of a pool, and if not, for what there is too little.

    None where one is placed and starts, and where nobody can tell.
    """

    def look(pool: str) -> str | None:
        serving = _get_global_client().get_serve_details()["applications"][application]
        replicas = serving["deployments"][f"engine-{pool}"]["replicas"]
        if any(replica.get("node_id") for replica in replicas):
            return None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placement = place(config.pools[pool], config.device)
        return shortage(pool, placement, nodes, ray.available_resources())

    async def explain(pool: str) -> str | None:
        try:
            return await asyncio.to_thread(look, pool)
        except (RayError, RayServeException, KeyError) as error:  # Serve restarts, or takes it down
            log.info("nobody can tell where engines of %s are: %r", pool, error)
            return None

    return explain


class BuildArgs(BaseModel):
    """What ``deploy.yaml`` passes: the path of a file in ``configs/``, and where gateways listen.

    Without ``listen`` they are reached through Serve's proxy alone. ``insecure`` lets them listen
    where others reach them without API keys.
    """

    model_config = ConfigDict(extra="forbid")

    config: str
    listen: str | None = None
    insecure: bool = False


def build(args: BuildArgs) -> serve.Application:
    """The application described by the configuration file that ``args`` names.

    Raises ``ConfigError`` when the cluster has no room for it, which Ray would wait for in silence,
    and when strangers could reach it without a key.
    """
    config = load_config(args.config)
    listen = Address.parse(args.listen) if args.listen else None
    if listen and not (args.insecure or os.environ.get(INSECURE_VARIABLE)):
        check_exposure(listen.host, config)
    check_room(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    return application(config, listen)


def application(
    config: AppConfig, listen: Address | None = None, engine: type = EngineDeployment
) -> serve.Application:
    """One deployment of ``engine`` for each pool, bound to gateways that ``listen`` themselves."""
    engines = {
        name: serve.deployment(engine)
        .options(name=f"engine-{name}", **_engine_options(config, pool))
        .bind(config, name)
        for name, pool in config.pools.items()
    }
    gateway = serve.deployment(GatewayDeployment).options(
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=100_000,  # the gateway sheds by tokens, not by Serve's count
        max_surge_percent=100,  # the next one listens before the last one drains
        graceful_shutdown_timeout_s=_drain_s(config) + 15,
        ray_actor_options=_gateway_actor(config),
    )
    return gateway.bind(config, listen, **engines)


def _drain_s(config: AppConfig) -> float:
    """How long a gateway lets answers under way go on: as long as the most patient engine."""
    return max(pool.drain_s for pool in config.pools.values())


def _gateway_actor(config: AppConfig) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": config.gateway.num_cpus}
    if any(pool.autoscaling for pool in config.pools.values()):
        actor["runtime_env"] = {"env_vars": {_HANDLE_PUSH: _PUSH_INTERVAL_S}}
    return actor


def _engine_options(config: AppConfig, pool: PoolConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_surge_percent": pool.max_surge_percent,
        "graceful_shutdown_timeout_s": pool.drain_s + 15,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
    }
    if pool.autoscaling is None:
        options["num_replicas"] = pool.replicas
        env = pool.env
    else:
        options["autoscaling_config"] = _autoscaling_config(pool.autoscaling)
        env = {_REPLICA_PUSH: _PUSH_INTERVAL_S, **pool.env}
    return options | place(pool, config.device).deployment_options(env)


def _autoscaling_config(autoscaling: Autoscaling) -> dict[str, Any]:
    """Serve's settings for a policy that keeps bounds, delays and steps itself."""
    return {
        "min_replicas": autoscaling.min_replicas,
        "max_replicas": autoscaling.max_replicas,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        # What a past cold start left in Serve's own count must not start another engine.
        "look_back_period_s": _LOOK_BACK_S,
        "policy": {
            "policy_function": "serve_app.autoscaling:TokenPolicy",
            "policy_kwargs": autoscaling.model_dump(),
        },
    }
