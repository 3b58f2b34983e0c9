"""What a gateway counts, in Prometheus's terms. Each gateway owns one registry."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve_app.request import EngineInfo

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class GatewayMetrics:
    """The metrics of one gateway. Times are seconds; labels carry names, never prompt text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests", "Requests answered.", ["pool", "status"], registry=self.registry
        )
        self.time_to_first_token = Histogram(
            "gateway_time_to_first_token_seconds",
            "From a parsed request to the first bytes of its answer.",
            ["pool"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "gateway_request_duration_seconds",
            "From a parsed request to the end of its answer.",
            ["pool"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.misroutes = Counter(
            "gateway_misroutes", "Pools that found a request too long.", registry=self.registry
        )
        self.disconnects = Counter(
            "gateway_disconnects", "Clients that left before the end.", registry=self.registry
        )
        self._engine_gauges = {
            name: Gauge(f"engine_{name}", text, ["pool", "replica"], registry=self.registry)
            for name, text in (
                ("running_requests", "Requests in the engine's batch."),
                ("waiting_requests", "Requests the engine holds back."),
                ("kv_cache_usage_ratio", "Share of KV blocks in use."),
                ("preemptions", "Requests preempted since the engine started."),
                ("outstanding_tokens", "Tokens that this gateway has under way."),
            )
        }

    def show_engines(self, engines: Iterable[tuple[EngineInfo, int]]) -> None:
        """Replace what is shown of engines; each comes with its outstanding tokens."""
        for gauge in self._engine_gauges.values():
            gauge.clear()
        for engine, outstanding in engines:
            values = (
                engine.load.running,
                engine.load.waiting,
                engine.load.kv_usage,
                engine.load.preemptions,
                outstanding,
            )
            for gauge, value in zip(self._engine_gauges.values(), values, strict=True):
                gauge.labels(engine.pool, engine.replica).set(value)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
