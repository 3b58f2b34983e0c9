"""What a gateway counts, in Prometheus's terms. Each gateway owns one registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.registry import Collector

from serve_app.request import EngineInfo

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True, slots=True)
class _Labelled(Collector):
    """The metrics of a registry, every series with the label ``gateway``."""

    registry: CollectorRegistry
    gateway: str

    def collect(self) -> Iterable[Metric]:
        for metric in self.registry.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "gateway": self.gateway})
                for sample in metric.samples
            ]
            yield metric


class GatewayMetrics:
    """The metrics of one gateway. Times are seconds; labels carry names, never prompt text.

    Names that begin with ``gen_ai_server`` follow OpenTelemetry's conventions. The table of all
    of them is in ``docs/operation.md``. ``gateway`` tells this one from others at the same
    address, where each scrape meets one of them: without it their counters would seem to jump.
    """

    def __init__(self, gateway: str | None = None) -> None:
        self._gateway = gateway
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds", "From arrival to the first bytes."
        )
        self.time_between_chunks = self._histogram(
            "gen_ai_server_time_per_output_chunk_seconds", "Between two chunks of a stream."
        )
        self.duration = self._histogram(
            "gen_ai_server_request_duration_seconds", "From arrival to the end of the answer."
        )
        self.queue_wait = self._histogram(
            "gateway_queue_wait_seconds", "From arrival until an engine had room."
        )
        self.requests = self._counter("requests", "Requests answered.", "pool", "status")
        self.sheds = self._counter("sheds", "Requests refused, by error code.", "reason")
        self.misroutes = self._counter("misroutes", "Pools that found a request too long.")
        self.retries = self._counter("retries", "Engines that failed before the first token.")
        self.disconnects = self._counter("disconnects", "Clients that left before the end.")
        self.wasted_chunks = self._counter(
            "wasted_chunks", "Chunks of streams whose clients left before the end."
        )
        self.estimated_tokens = self._counter("estimated_prompt_tokens", "As estimated.")
        self.exact_tokens = self._counter("exact_prompt_tokens", "Of the same, as counted.")
        self._pool_gauges = self._gauges(
            ("queued_requests", "Requests that wait at this gateway."),
            ("queued_tokens", "Cost of the requests that wait at this gateway."),
            labels=("pool",),
            prefix="gateway",
        )
        self._engine_gauges = self._gauges(
            ("running_requests", "Requests in the engine's batch."),
            ("waiting_requests", "Requests the engine holds back."),
            ("kv_cache_usage_ratio", "Share of KV blocks in use."),
            ("preemptions", "Requests preempted since the engine started."),
            ("outstanding_tokens", "Cost of what this gateway has under way there."),
            labels=("pool", "replica"),
            prefix="engine",
        )

    def show_pool(self, name: str, queued: int, queued_tokens: int) -> None:
        for gauge, value in zip(self._pool_gauges, (queued, queued_tokens), strict=True):
            gauge.labels(name).set(value)

    def show_engines(self, engines: Iterable[tuple[EngineInfo, int]]) -> None:
        """Replace what is shown of engines; each comes with its outstanding cost in tokens."""
        for gauge in self._engine_gauges:
            gauge.clear()
        for engine, outstanding in engines:
            values = (
                engine.load.running,
                engine.load.waiting,
                engine.load.kv_usage,
                engine.load.preemptions,
                outstanding,
            )
            for gauge, value in zip(self._engine_gauges, values, strict=True):
                gauge.labels(engine.pool, engine.replica).set(value)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        shown = _Labelled(self.registry, self._gateway) if self._gateway else self.registry
        return generate_latest(shown)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["pool"], buckets=_SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"gateway_{name}", text, labels, registry=self.registry)

    def _gauges(
        self, *named: tuple[str, str], labels: tuple[str, ...], prefix: str
    ) -> tuple[Gauge, ...]:
        return tuple(
            Gauge(f"{prefix}_{name}", text, labels, registry=self.registry) for name, text in named
        )
