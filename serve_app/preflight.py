"""What can be known to be wrong before Ray and the engines start, each as one sentence.

Starting takes a minute and fails deep inside another process; these checks take a fraction of a
second. They hold for the machine that runs them, so the caller leaves out :func:`check_machine`
when Ray is told to join a cluster elsewhere; there the builder compares pools and resources.
"""

from __future__ import annotations

import ast
import importlib.util
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from serve_app.config import AppConfig, load_config, refuse_unknown_arguments
from serve_app.errors import ConfigError
from serve_app.placement import check_room
from serve_app.port import Address

GIB = 2**30
# Resident memory of an engine's three processes (replica, engine core, worker) beside weights and
# KV cache: 1.7 GiB were measured with the demo model.
ENGINE_OVERHEAD_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class Deployment:
    """What ``deploy.yaml`` says that has to be known before Serve reads it."""

    address: Address  # where clients reach it: a gateway's own port, or Serve's proxy
    config_path: Path
    config: AppConfig
    insecure: bool  # whether strangers may reach it without a key

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        every = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = self.address.host
        return Address(every.get(host, host), self.address.port).url


def read_deployment(path: Path) -> Deployment:
    """Read ``deploy.yaml`` and the configuration that it names.

    The configuration's path is relative to the working directory, as it is for ``serve run``.
    Raises ``ConfigError``.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"The deployment file {path} does not exist.") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The deployment file {path} cannot be read: {error}.") from error
    try:
        (application,) = raw["applications"]
        config_path = Path(application["args"]["config"])
        listen = application["args"].get("listen")
        http = raw.get("http_options") or {}
        # Serve's own default is every address.
        proxy = Address(str(http.get("host", "0.0.0.0")), int(http.get("port", 8000)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} must hold one application whose args name a config, such as "
            "configs/demo-cpu.yaml."
        ) from error
    if (listen is not None) != (raw.get("proxy_location") == "Disabled"):
        raise ConfigError(
            f"{path}: clients come in by one way; either set args.listen and proxy_location: "
            "Disabled, or neither."
        )
    address = proxy if listen is None else Address.parse(str(listen))
    insecure = application["args"].get("insecure") is True
    return Deployment(address, config_path, load_config(config_path), insecure)


def check(deployment: Deployment) -> None:
    """Raise ``ConfigError`` for what is wrong with the configuration, wherever it will run."""
    known = engine_argument_names()
    for pool in deployment.config.pools:
        refuse_unknown_arguments(deployment.config.engine_args_of(pool), known)
    check_port(deployment.address)


def check_machine(deployment: Deployment) -> None:
    """Raise ``ConfigError`` when this machine lacks the model, CPUs, GPUs or the memory."""
    check_model(deployment.config.model)
    check_room(deployment.config, [this_node()])
    if deployment.config.device == "cpu":
        check_memory(deployment, available_memory())


def engine_argument_names() -> set[str]:
    """The names of vLLM's engine and server arguments.

    Read from vLLM's source, because importing vLLM takes ten seconds. Empty classes or a missing
    vLLM raise ``ConfigError``.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("vLLM is not installed; run make install.")
    root = Path(spec.submodule_search_locations[0])
    names: set[str] = set()
    for file in ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py"):
        for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(
                ("EngineArgs", "FrontendArgs")
            ):
                names |= {
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                }
    return names


def check_port(address: Address) -> None:
    """Refuse a port that another program listens on."""
    with socket.socket(address.family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ConfigError(
                f"Port {address.port} of {address.host} cannot be used ({error.strerror}); stop "
                "what listens there or set another port in the deployment file."
            ) from error


def check_model(model: str) -> None:
    """Refuse a model directory that is not there; a name like ``org/model`` is vLLM's to find."""
    path = Path(model)
    if not path.is_absolute():
        return
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"The model directory {path} has no config.json; make the demo model with "
            f"local-attention demo-model {path}, or name another model."
        )


def check_memory(deployment: Deployment, available: int) -> None:
    """Refuse engines that together need more than ``available`` bytes."""
    needed = needed_memory(deployment.config)
    if needed > available:
        raise ConfigError(
            f"The engines of {deployment.config_path} need about {needed / GIB:.1f} GiB of memory, "
            f"but {available / GIB:.1f} GiB is available; lower replicas or VLLM_CPU_KVCACHE_SPACE."
        )


def needed_memory(config: AppConfig) -> int:
    """Bytes that all engines hold on a machine without a GPU: weights, KV cache and processes.

    A pool that sets no KV-cache size is counted without one: vLLM then takes what is free.
    """
    weights = _weight_bytes(Path(config.model))
    return sum(
        pool.least_replicas
        * (ENGINE_OVERHEAD_BYTES + weights + pool.workers * _kv_bytes(config, name))
        for name, pool in config.pools.items()
    )


def available_memory() -> int:
    """Bytes that can be allocated here without swapping, the control group's limit included."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such control group, or the limit is "max"
        return free
    return min(free, limit - used)


def this_node() -> dict[str, float]:
    """The resources that Ray would find on this machine."""
    from ray._private.utils import get_num_cpus  # knows the limits of a container

    return {"CPU": get_num_cpus(override_docker_cpu_warning=True), "GPU": visible_gpus()}


def visible_gpus() -> int:
    """The number of NVIDIA GPUs that the driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _kv_bytes(config: AppConfig, name: str) -> int:
    explicit = config.engine_args_of(name).get("kv_cache_memory_bytes")
    if isinstance(explicit, int):
        return explicit
    return int(config.pools[name].env.get("VLLM_CPU_KVCACHE_SPACE", 0)) * GIB


def _weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
