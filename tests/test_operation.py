"""The files for containers, Kubernetes and monitoring agree with the code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import AppConfig, load_config
from serve_app.keys import KEYS_VARIABLE
from serve_app.metrics import GatewayMetrics
from serve_app.placement import check_room, place
from serve_app.preflight import read_deployment
from serve_app.request import EngineInfo
from tests.test_packaging import pins

ROOT = Path(__file__).parent.parent
WORKDIR = "/app/"


@dataclass
class Stage:
    """One stage of the Dockerfile; ``lines`` are its instructions with their arguments."""

    parent: str
    lines: list[tuple[str, str]]

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.lines if name == instruction]


def stages() -> dict[str, Stage]:
    text = (ROOT / "Dockerfile").read_text()
    whole = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found: dict[str, Stage] = {}
    for line in filter(None, whole.splitlines()):
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            parent, _, name = arguments.split()
            found[name] = Stage(parent, [])
        elif found:
            found[name].lines.append((instruction, arguments))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those it is made from, with the stages that it copies from."""
    known, made, todo = stages(), [], [name]
    while todo:
        if (stage := known.get(todo.pop())) is None:
            continue
        made.append(stage)
        copied = re.findall(r"--from=(\S+)", " ".join(stage.all("COPY")))
        todo += [stage.parent, *copied]
    return made


def ignored(path: str) -> bool:
    """Whether the .dockerignore keeps a file or directory at the top out of the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    return not any(Path(path).match(each) or each.startswith(f"{path}/") for each in kept)


def test_every_copied_file_exists_and_reaches_the_build() -> None:
    for name, stage in stages().items():
        for arguments in stage.all("COPY"):
            words = shlex.split(arguments)
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in stages(), name
                continue
            for source in words[:-1]:
                assert (ROOT / source).exists(), source
                assert not ignored(source), source


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_an_image_holds_the_pins_of_its_extra_and_nothing_else(extra: str) -> None:
    commands = " ".join(run for stage in lineage(extra) for run in stage.all("RUN"))
    assert set(re.findall(r"-r (\S+)", commands)) == {"constraints.txt", f"constraints-{extra}.txt"}
    installs = re.findall(r"pip install [^|&;}]*", commands)
    assert len(installs) >= 2
    assert all("--no-deps" in install for install in installs)
    assert "setuptools" in pins("constraints.txt")  # what builds the package, without isolation


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_an_image_serves_as_an_ordinary_user_and_says_when_it_is_ready(extra: str) -> None:
    target, made = stages()[extra], lineage(extra)
    assert target.all("USER") == ["serve"]
    (command,) = (json.loads(arguments) for arguments in target.all("CMD"))
    assert command[:2] == ["local-attention", "serve"]
    deployment = read_deployment(ROOT / command[2])
    assert deployment.address.host == "0.0.0.0"
    assert not deployment.insecure
    assert deployment.config.device == extra
    assert [port for stage in made for port in stage.all("EXPOSE")] == [
        str(deployment.address.port)
    ]
    (check,) = (arguments for stage in made for arguments in stage.all("HEALTHCHECK"))
    assert f"http://127.0.0.1:{deployment.address.port}/ready" in check


def test_no_secret_is_baked_into_an_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(?i)(token|secret|password|api_key)\S*\s*=", text)
    assert ignored("configs/keys")
    assert ignored(".git")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text()))
    (found,) = (each["spec"] for each in documents if each["kind"] == "RayService")
    return dict(found)


def application_of(service: dict[str, Any]) -> AppConfig:
    """The configuration that a RayService names, by its path in the image."""
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    return load_config(ROOT / application["args"]["config"].removeprefix(WORKDIR))


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)


def node_of(group: dict[str, Any]) -> dict[str, float]:
    """What Ray finds in one pod of a group."""
    resources = container_of(group)["resources"]
    assert resources["requests"] == resources["limits"]
    return {
        "CPU": float(resources["limits"]["cpu"]),
        "GPU": float(resources["limits"].get("nvidia.com/gpu", 0)),
    }


def groups_of(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in service["rayClusterConfig"]["workerGroupSpecs"]}


def test_serve_takes_the_configuration_of_the_ray_service(service: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0"
    (application,) = schema.applications
    deploy = yaml.safe_load((ROOT / "deploy.yaml").read_text())["applications"][0]
    assert application.import_path == deploy["import_path"]
    # One proxy in each pod that has a replica, or a pod of gateways could not answer.
    assert schema.proxy_location == "EveryNode"


def test_the_cluster_has_the_pinned_ray_a_token_and_its_autoscaler(service: dict[str, Any]) -> None:
    cluster = service["rayClusterConfig"]
    assert str(pins("constraints.txt")["ray"].specifier) == f"=={cluster['rayVersion']}"
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["enableInTreeAutoscaling"] is True
    config = application_of(service)
    assert config.cluster_grows
    assert config.engine_bind == "node"


def test_each_pool_has_pods_that_hold_its_engines(service: dict[str, Any]) -> None:
    config, groups = application_of(service), groups_of(service)
    assert set(groups) == {"gateways", *config.pools}
    for name, pool in config.pools.items():
        group, needed = groups[name], place(pool, config.device).whole
        assert all(node_of(group)[key] >= count for key, count in needed.items()), name
        assert pool.autoscaling is not None
        assert group["minReplicas"] == group["replicas"] == pool.autoscaling.min_replicas
        assert group["maxReplicas"] == pool.autoscaling.max_replicas
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= max(each.drain_s for each in config.pools.values()) + 15
    gateways = groups["gateways"]
    assert gateways["replicas"] == gateways["minReplicas"] == config.gateway.replicas
    assert gateways["maxReplicas"] == 2 * config.gateway.replicas  # for successors in an update
    assert node_of(gateways)["GPU"] == 0
    assert 1 <= node_of(gateways)["CPU"] / config.gateway.num_cpus < 2  # one in each pod


def test_the_pods_at_the_start_hold_everything(service: dict[str, Any]) -> None:
    fixed = application_of(service).model_copy(update={"cluster_grows": False})
    nodes = [
        node_of(group) for group in groups_of(service).values() for _ in range(group["replicas"])
    ]
    check_room(fixed, nodes)


def test_pods_are_ready_when_the_application_is_and_never_open_to_everybody(
    service: dict[str, Any],
) -> None:
    for name, group in groups_of(service).items():
        container = container_of(group)
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8000}, name
        keys = [each for each in container["env"] if each["name"] == KEYS_VARIABLE]
        assert [each["valueFrom"]["secretKeyRef"].get("optional", False) for each in keys] == [
            False
        ], name
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"], name
    # The operator waits for the head before it deploys the application: /ready would never come.
    assert "readinessProbe" not in container_of(service["rayClusterConfig"]["headGroupSpec"])


def exported() -> dict[str, set[str]]:
    """The series of a gateway that has something to tell, and the labels of each."""
    made = GatewayMetrics()
    for histogram in (
        made.time_to_first_token,
        made.time_between_chunks,
        made.duration,
        made.queue_wait,
    ):
        histogram.labels("short").observe(1)
    made.requests.labels("short", "200").inc()
    made.sheds.labels("overloaded").inc()
    made.show_pool("short", 1, 1)
    made.show_engines([(EngineInfo("r", "short", "http://127.0.0.1:1", "token"), 1)])
    return {
        sample.name: set(sample.labels)
        for metric in made.registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def rows_of_the_table() -> dict[str, set[str]]:
    """Metrics in the table of docs/operation.md, with their labels."""
    text = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:histogram|counter|gauge) \|([^|]*)\|", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def test_the_table_names_what_is_exported_with_its_labels() -> None:
    shown = {
        re.sub(r"_(sum|count|bucket)$", "", name): labels - {"le"}
        for name, labels in exported().items()
    }
    assert rows_of_the_table() == shown


FUNCTIONS = re.compile(r"\b[a-z_]+(?=\s*\()")
KEYWORDS = {"and", "or", "unless", "by", "on", "ignoring"}


def watched() -> Iterator[tuple[str, str]]:
    """Every expression of the dashboards and of the alert rules, with where it stands."""
    for path in sorted((ROOT / "deploy" / "grafana").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = re.fullmatch(
                    r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
                ).groups()  # type: ignore[union-attr]
                yield f"{path.name}: {variable['name']}", f"sum by ({label}) ({metric})"
    for rule in rules():
        yield rule["alert"], rule["expr"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "deploy" / "grafana" / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def read(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels that an expression of PromQL names."""
    labels: set[str] = set()
    for matchers in re.findall(r"\{([^}]*)\}", expression):
        labels |= set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers))
    for listed in re.findall(r"\bby \(([^)]*)\)", expression):
        labels |= {label.strip() for label in listed.split(",")}
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", " ", expression)
    names = set(re.findall(r"\b[a-z]\w*", FUNCTIONS.sub(" ", plain)))
    return names - KEYWORDS, labels


def test_dashboard_and_alerts_name_metrics_and_labels_that_exist() -> None:
    known = exported()
    for where, expression in watched():
        names, labels = read(expression)
        assert names, where
        assert names <= set(known), where
        assert labels <= set.union(*(known[name] for name in names)), where
        quantile = "histogram_quantile" in expression
        assert quantile == any(name.endswith("_bucket") for name in names), where
        assert not quantile or "le" in labels, where


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set.union(*(read(expression)[0] for where, expression in watched() if ".json" in where))
    for name in rows_of_the_table():
        assert any(each == name or each == f"{name}_bucket" for each in shown), name


def test_dashboards_take_any_data_source_and_alerts_say_what_is_wrong() -> None:
    for path in (ROOT / "deploy" / "grafana").glob("*.json"):
        dashboard = json.loads(path.read_text())
        sources = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
        assert sources == {"${datasource}"}
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        summary = rule["annotations"]["summary"]
        _, labels = read(rule["expr"])
        assert set(re.findall(r"\$labels\.(\w+)", summary)) <= labels, rule["alert"]


@pytest.mark.parametrize(
    "name", ["deploy.yaml", "deploy/docker-cpu.yaml", "deploy/docker-gpu.yaml"]
)
def test_serve_does_not_log_each_call_beside_the_gateway(name: str) -> None:
    deploy = yaml.safe_load((ROOT / name).read_text())
    assert deploy["logging_config"]["enable_access_log"] is False
