"""Where the workers of one engine run: bundles of a Ray placement group, and vLLM's executor.

An engine of one worker is one process tree on one device and needs no group. An engine of more
(``tensor_parallel_size`` x ``pipeline_parallel_size``) reserves one bundle for each worker, all or
none, so that two engines never hold half of what they need and wait for each other. Serve puts the
replica itself into the first bundle, which is why that one has the CPUs of one more process.

- With GPUs, vLLM's ``ray`` executor starts one worker in each bundle. It takes the group of the
  actor that it runs in; the replica itself holds no GPU, because its first worker does.
- On the CPU that executor does not exist. ``mp`` forks the workers beside the replica, so the whole
  group must be on the replica's node.

Pure: the cluster comes as an argument, one mapping of resources for each node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.config import AppConfig, PoolConfig
from serve_app.errors import ConfigError

Strategy = Literal["STRICT_PACK", "PACK"]
Resources = Mapping[str, float]

_THREADS = "OMP_NUM_THREADS"
_SET_BY_VLLM = "VLLM_OMP_NUM_THREADS_SET_BY_VLLM"  # torch_utils.OMP_NUM_THREADS_SET_BY_VLLM


@dataclass(frozen=True, slots=True)
class Placement:
    """What one engine reserves. ``bundles`` is a single one, and no group, for a single worker."""

    bundles: tuple[Resources, ...]
    strategy: Strategy
    executor: Literal["ray", "mp"] | None  # None leaves a single worker to vLLM

    @property
    def whole(self) -> Resources:
        """The resources of all bundles together."""
        return _sum(self.bundles)

    def deployment_options(self, env: Mapping[str, str]) -> dict[str, Any]:
        """The options of the engine's Serve deployment that decide where it runs."""
        first = self.bundles[0]
        vllm_decides = "GPU" in first and _THREADS not in env
        threads = _loading_threads(self.bundles[-1]["CPU"]) if vllm_decides else {}
        actor: dict[str, Any] = {
            "num_cpus": first["CPU"],
            "runtime_env": {"env_vars": {**threads, **env}},
        }
        if len(self.bundles) == 1:
            gpus = {"num_gpus": first["GPU"]} if "GPU" in first else {}
            return {"ray_actor_options": actor | gpus}
        return {
            "ray_actor_options": actor,
            "placement_group_bundles": [dict(bundle) for bundle in self.bundles],
            "placement_group_strategy": self.strategy,
        }

    @property
    def engine_args(self) -> dict[str, Any]:
        """The arguments of vLLM that follow from the placement."""
        return {"distributed_executor_backend": self.executor} if self.executor else {}


def place(pool: PoolConfig, device: Literal["cpu", "gpu"]) -> Placement:
    """How one engine of ``pool`` is placed. Raises ``ConfigError`` for what cannot be.

    Tensor-parallel workers exchange activations in every layer, so they are kept on one node;
    pipeline stages exchange little and may lie on several.
    """
    gpu = {"GPU": pool.num_gpus} if device == "gpu" else {}
    if pool.workers == 1:
        return Placement(({"CPU": pool.num_cpus, **gpu},), "STRICT_PACK", None)
    first = {"CPU": 2 * pool.num_cpus, **gpu}
    bundles = (first, *[{"CPU": pool.num_cpus, **gpu}] * (pool.workers - 1))
    if device == "cpu":
        if pool.pipeline_parallel_size > 1:  # vLLM 0.32: KeyError in the scheduler, and it is dead
            raise ConfigError(
                f"pipeline_parallel_size is {pool.pipeline_parallel_size}, but without GPUs vLLM's "
                "pipeline stages die at the first request; set tensor_parallel_size instead."
            )
        if pool.placement_strategy == "PACK":
            raise ConfigError(
                "placement_strategy is PACK, but the workers of an engine without GPUs share one "
                "machine; remove placement_strategy."
            )
        return Placement(bundles, "STRICT_PACK", "mp")
    default: Strategy = "STRICT_PACK" if pool.pipeline_parallel_size == 1 else "PACK"
    return Placement(bundles, pool.placement_strategy or default, "ray")


def _loading_threads(cpus: float) -> dict[str, str]:
    """Torch's threads in an engine's workers on GPUs: ``cpus`` while weights load, then one.

    Ray would set the variable to the CPUs that it reserved, and vLLM, which serves with one thread
    because more of them spin beside the steps, keeps a number that bears no mark of its own.
    """
    return {_THREADS: str(max(1, int(cpus))), _SET_BY_VLLM: "1"}


def check_room(config: AppConfig, nodes: Sequence[Resources]) -> None:
    """Raise ``ConfigError`` when the cluster can never hold the configuration.

    Ray would wait for ever for what is missing. Names each resource that is, what is needed of it
    and what there is. What other applications hold is not counted.
    """
    if config.cluster_grows:
        return
    engines = {name: place(pool, config.device) for name, pool in config.pools.items()}
    lines = [
        line
        for name, placement in engines.items()
        if placement.strategy == "STRICT_PACK"
        for line in _misfit(name, placement, nodes)
    ]
    needed: list[Resources] = [{"CPU": config.gateway.num_cpus * config.gateway.replicas}]
    for name, placement in engines.items():
        needed += [placement.whole] * config.pools[name].least_replicas
    there = _sum(nodes)
    lines += [
        f"All pools and gateways need {_number(count)} {resource}, but the cluster has "
        f"{_number(there.get(resource, 0))}."
        for resource, count in _sum(needed).items()
        if count > there.get(resource, 0)
    ]
    if lines:
        raise ConfigError(" ".join(lines))


def _misfit(name: str, placement: Placement, nodes: Sequence[Resources]) -> list[str]:
    """Why no single node can hold one engine of a pool, or nothing."""
    whole = placement.whole
    if any(all(node.get(key, 0) >= count for key, count in whole.items()) for node in nodes):
        return []
    lines = []
    for resource, count in whole.items():
        most = max((node.get(resource, 0) for node in nodes), default=0)
        if count > most:
            lines.append(
                f"An engine of pool {name} needs {_number(count)} {resource} on one node, but no "
                f"node has more than {_number(most)}."
            )
    return lines or [
        f"No node has the {_words(whole)} together that an engine of pool {name} needs."
    ]


def shortage(name: str, placement: Placement, nodes: Sequence[Resources], free: Resources) -> str:
    """What one engine of a pool needs, and what the cluster has free of it: a sentence or two.

    ``free`` is the whole cluster's, as Ray counts it: resources of which nothing is left are not
    in it.
    """
    there, whole = _sum(nodes), placement.whole
    where = " on one node" if placement.strategy == "STRICT_PACK" else ""
    left = ", ".join(
        f"{_number(free.get(resource, 0))} of {_number(there.get(resource, 0))} {resource}"
        for resource in whole
    )
    missing = {
        resource: count - free.get(resource, 0)
        for resource, count in whole.items()
        if count > free.get(resource, 0)
    }
    lack = (
        f"{_words(missing)} missing" if missing else "enough, but not where it is needed together"
    )
    return f"An engine of pool {name} needs {_words(whole)}{where}; free are {left}: {lack}."


def _sum(parts: Sequence[Resources]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {resource: count for resource, count in total.items() if count}


def _words(resources: Resources) -> str:
    return " and ".join(f"{_number(count)} {resource}" for resource, count in resources.items())


def _number(count: float) -> str:
    return str(int(count)) if math.isclose(count, round(count)) else f"{count:.2f}"
