"""The configuration of one application: frozen, validated once, refused with a full sentence.

A file in ``configs/`` becomes an :class:`AppConfig`. What belongs to the cluster (addresses,
ports, proxies) stays in ``deploy.yaml``; what belongs to the models and pools is here.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.errors import ConfigError
from serve_app.guard.limits import Limits
from serve_app.pattern import LocalAttention

# Set by the pool itself, so that one number has one home.
_OWNED_BY_POOL = {
    "model": "the file's model",
    "served_model_name": "the file's served_model_name",
    "max_model_len": "the pool's max_model_len",
    "tensor_parallel_size": "the pool's tensor_parallel_size",
    "pipeline_parallel_size": "the pool's pipeline_parallel_size",
    "distributed_executor_backend": "the pool's placement",
}

# Neither Ray nor vLLM reports usage unless the user says so.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
# For an engine that no pool configures: GiB of KV cache on a CPU, where vLLM would otherwise start
# only if 92 % of the machine's memory were free. It means nothing on a GPU.
CPU_KV_CACHE = ("VLLM_CPU_KVCACHE_SPACE", "4")

# A token of plain text is about 4 bytes, of escaped Chinese about 10, of a run of spaces more.
_BYTES_PER_TOKEN = 32
_BODY_BYTES_BESIDE_PROMPT = 2**20  # tools, schemas, keys and quotes


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewayConfig(_Strict):
    """The HTTP front: how many gateways, and the caps they put on a request.

    Sizes are bytes, times are seconds.
    """

    replicas: int = Field(default=1, ge=1, description="Fixed: shares are divided by it.")
    num_cpus: float = Field(default=0.5, gt=0)
    max_body_bytes: int | None = Field(
        default=None, ge=1024, description="By default what the longest pool's prompts may take."
    )
    body_timeout_s: float = Field(default=60, gt=0, description="For a body to arrive whole.")
    default_output_tokens: int = Field(
        default=256, ge=1, description="The output budget of a request that names none."
    )
    overcommit: float = Field(
        default=2.0, gt=0, description="Load sent to an engine, as a multiple of its room."
    )
    max_queued: int = Field(default=256, ge=1, description="Requests of one length that wait.")
    length_edges: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=tuple(2**power for power in range(9, 21)),
        min_length=1,
        description="Upper ends of the length classes, in tokens of prompt and output budget.",
    )
    run_tokens: int = Field(
        default=16_384, ge=1, description="Cost of what one length releases before the next."
    )
    max_wait_s: float = Field(default=2.0, gt=0, description="Before a waiting length is served.")
    batch_max_wait_s: float = Field(default=30.0, gt=0, description="For x-priority: batch.")
    first_token_timeout_s: float = Field(default=300, gt=0)
    inter_token_timeout_s: float = Field(default=60, gt=0)
    refresh_interval_s: float = Field(default=1.0, gt=0)
    api_keys_file: str | None = Field(
        default=None, description="Hashes of the keys that may ask; see serve_app/keys.py."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="Where traces go, such as http://127.0.0.1:4318; off without."
    )
    limits: Limits = Limits()

    @field_validator("length_edges")
    @classmethod
    def _rising(cls, edges: tuple[int, ...]) -> tuple[int, ...]:
        for before, edge in pairwise(edges):
            if edge <= before:
                raise ValueError(
                    f"each length must be greater than the one before, but {edge} follows {before}."
                )
        return edges


class Autoscaling(_Strict):
    """How many replicas a pool has, by load. Without a target, an engine's KV cache is it."""

    min_replicas: int = Field(default=1, ge=0, description="0 stops the last engine when idle.")
    max_replicas: int = Field(ge=1)
    target_tokens_per_replica: int | None = Field(
        default=None, ge=1, description="Prefill and KV tokens, waiting or under way."
    )
    ttft_target_s: float | None = Field(
        default=None, gt=0, description="More replicas while the p95 to the first token is over it."
    )
    up_delay_s: float = Field(default=5, ge=0)
    down_delay_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, which is less than min_replicas "
                f"({self.min_replicas})."
            )
        return self


class PoolConfig(_Strict):
    """Engines of one kind. A request goes to the pool with the smallest fitting max_model_len."""

    max_model_len: int = Field(ge=16, description="Prompt plus output budget, in tokens.")
    replicas: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = Field(default=None, description="Instead of replicas.")
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, ge=0, description="CPUs reserved for each worker.")
    num_gpus: float = Field(
        default=1, gt=0, le=1, description="Share of a GPU for each worker, where there are GPUs."
    )
    placement_strategy: Literal["STRICT_PACK", "PACK"] | None = Field(
        default=None,
        description="Workers of one engine on one node, or on several; see serve_app/placement.py.",
    )
    max_surge_percent: int = Field(
        default=0, ge=0, le=100, description="Engines beyond `replicas` while an update goes on."
    )
    drain_s: float = Field(default=60, ge=0, description="Grace for running requests at shutdown.")
    local_attention: LocalAttention | None = None
    engine_args: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)

    @field_validator("engine_args")
    @classmethod
    def _leave_owned_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, home in _OWNED_BY_POOL.items():
            if key in value:
                raise ValueError(f"engine_args may not set {key}; set {home} instead.")
        return value

    @model_validator(mode="after")
    def _whole_gpus_when_split(self) -> Self:
        if self.workers > 1 and self.num_gpus != 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus}, but an engine of {self.workers} workers needs a "
                "whole GPU for each; remove num_gpus."
            )
        return self

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> Self:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("set replicas or autoscaling, not both.")
        return self

    @property
    def least_replicas(self) -> int:
        """Engines that there must be room for."""
        return self.replicas if self.autoscaling is None else max(1, self.autoscaling.min_replicas)

    @property
    def scales_from_zero(self) -> bool:
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0

    @property
    def workers(self) -> int:
        """Processes that hold one engine's model together, each on its own device."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class AppConfig(_Strict):
    """One model served by one or more pools, in the order of the file."""

    model: str = Field(description="A directory, or a name that vLLM can load.")
    served_model_name: str
    device: Literal["cpu", "gpu"]
    engine_bind: Literal["loopback", "node"] = Field(
        default="loopback",
        description="Where engines listen for gateways: this machine, or the node's own address.",
    )
    cluster_grows: bool = Field(
        default=False,
        description="Ray's autoscaler adds nodes, so what is missing at the start may yet come.",
    )
    gateway: GatewayConfig = GatewayConfig()
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments shared by every pool's engines."
    )
    pools: dict[str, PoolConfig] = Field(min_length=1)

    @field_validator("engine_args")
    @classmethod
    def _leave_owned_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        return PoolConfig._leave_owned_keys(value)

    @model_validator(mode="after")
    def _distinct_limits(self) -> Self:
        limits: dict[int, str] = {}
        for name, pool in self.pools.items():
            if other := limits.get(pool.max_model_len):
                raise ValueError(
                    f"pools {other} and {name} have the same max_model_len "
                    f"({pool.max_model_len}); merge them and raise replicas instead."
                )
            limits[pool.max_model_len] = name
        return self

    @property
    def max_body_bytes(self) -> int:
        """The largest body that is read: as configured, or enough for the longest pool."""
        if self.gateway.max_body_bytes is not None:
            return self.gateway.max_body_bytes
        longest = max(pool.max_model_len for pool in self.pools.values())
        return _BODY_BYTES_BESIDE_PROMPT + _BYTES_PER_TOKEN * longest

    def engine_args_of(self, pool_name: str) -> dict[str, Any]:
        """vLLM's engine arguments for one pool: the file's, then the pool's, then what it owns."""
        pool = self.pools[pool_name]
        args = {**self.engine_args, **pool.engine_args}
        if pool.local_attention is not None:
            extra = dict(args.get("additional_config") or {})
            extra["local_attention"] = pool.local_attention.model_dump(
                exclude_none=True, mode="json"
            )
            args["additional_config"] = extra
        return {
            **args,
            "model": self.model,
            "served_model_name": [self.served_model_name],
            "max_model_len": pool.max_model_len,
            "tensor_parallel_size": pool.tensor_parallel_size,
            "pipeline_parallel_size": pool.pipeline_parallel_size,
        }


def load_config(path: str | Path) -> AppConfig:
    """Read and validate one configuration file.

    A ``model`` that begins with ``.``, and ``gateway.api_keys_file``, are paths relative to the
    file. Raises ``ConfigError`` with one line for each thing that is wrong.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"The configuration file {path} does not exist.") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"The configuration file {path} must be a mapping of keys to values.")
    model = raw.get("model")
    if isinstance(model, str) and model.startswith("."):
        raw = {**raw, "model": str((path.parent / model).resolve())}
    gateway = raw.get("gateway")
    if isinstance(gateway, dict) and isinstance(keys := gateway.get("api_keys_file"), str):
        raw = {**raw, "gateway": {**gateway, "api_keys_file": str((path.parent / keys).resolve())}}
    try:
        return AppConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def refuse_unknown_arguments(args: Iterable[str], known: Collection[str]) -> None:
    """Raise ``ConfigError`` for an argument that vLLM does not have, naming the nearest one.

    ``known`` are vLLM's names: read from its classes where vLLM is loaded, else from its source.
    """
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"vLLM has no engine argument {name}.{hint}")


def explain(error: ValidationError) -> str:
    """A pydantic error as full sentences, each naming key, value and limit."""
    sentences = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            sentences.append(f"The key {key} is not known.")
        elif item["type"] == "missing":
            sentences.append(f"The key {key} is required.")
        elif item["type"] == "value_error":
            sentences.append(f"{key}: {item['ctx']['error']}")
        else:
            reason = item["msg"][0].lower() + item["msg"][1:]
            sentences.append(f"The key {key} is {item['input']!r}, but {reason}.")
    return " ".join(sentences)
