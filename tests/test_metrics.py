"""What a scrape of a gateway reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve_app.metrics import GatewayMetrics


def scrape(metrics: GatewayMetrics) -> dict[str, list[dict[str, str]]]:
    """The labels of every series, by its name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def used(gateway: str | None) -> GatewayMetrics:
    metrics = GatewayMetrics(gateway)
    metrics.requests.labels("short", "200").inc()
    metrics.time_to_first_token.labels("short").observe(0.2)
    metrics.retries.inc()
    return metrics


def test_several_gateways_at_one_address_can_be_told_apart() -> None:
    a, b = used("a"), used("b")
    for _ in range(2):  # what is shown does not change what is kept
        assert all(labels["gateway"] == "a" for series in scrape(a).values() for labels in series)
    assert scrape(a)["gateway_requests_total"] == [
        {"gateway": "a", "pool": "short", "status": "200"}
    ]
    assert scrape(a).keys() == scrape(b).keys() == scrape(used(None)).keys()


def test_a_gateway_alone_needs_no_such_label() -> None:
    assert scrape(used(None))["gateway_retries_total"] == [{}]
