"""The tables of docs/operation.md name everything that there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric

from serve_app.config import GatewayConfig
from serve_app.errors import RequestError
from serve_app.metrics import GatewayMetrics

OPERATION = (Path(__file__).parent.parent / "docs" / "operation.md").read_text(encoding="utf-8")


def errors(of: type[RequestError] = RequestError) -> Iterator[type[RequestError]]:
    yield of
    for kind in of.__subclasses__():
        yield from errors(kind)


def shown_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def test_every_metric_is_in_the_table_with_its_type() -> None:
    for metric in GatewayMetrics().registry.collect():
        assert f"| `{shown_name(metric)}` | {metric.type} |" in OPERATION


def test_every_error_is_in_the_table_with_its_status() -> None:
    rows = [line for line in OPERATION.splitlines() if line.startswith("|")]
    for error in errors():
        assert any(str(error.status) in row and f"`{error.code}`" in row for row in rows), error


def test_every_key_of_the_gateway_is_in_the_table() -> None:
    for key in GatewayConfig.model_fields:
        assert f"`{key}`" in OPERATION
