"""Optional OTLP traces: one span for each completion, which the engine's own spans continue.

The span begins when the body was understood and ends with the answer. It carries the request id
that the logs of gateway and engine show, and continues the trace that a client names in
``traceparent``. vLLM continues it in turn where ``engine_args`` name ``otlp_traces_endpoint``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"  # where the configuration names none

_CONTEXT = TraceContextTextMapPropagator()


class Tracer:
    """Makes the spans of one gateway. Spans leave in the background; none waits for them."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({SERVICE_NAME: "local-attention-gateway"})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("serve_app")

    @classmethod
    def configured(cls, endpoint: str | None) -> Self | None:
        """A tracer that sends to ``endpoint``, or to that of the environment, if there is one."""
        url = endpoint or os.environ.get(ENDPOINT_VARIABLE)
        if not url:
            return None
        exporter = OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces")
        return cls(BatchSpanProcessor(exporter))

    def start(self, request_id: str, path: str, headers: Mapping[str, str]) -> Span:
        """The span of one request, which continues the client's trace where it names one."""
        return self._tracer.start_span(
            f"POST {path}",
            context=_CONTEXT.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"request.id": request_id, "url.path": path},
        )

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def trace_headers(span: Span) -> tuple[tuple[str, str], ...]:
    """The headers that let the engine continue the span."""
    carrier: dict[str, str] = {}
    _CONTEXT.inject(carrier, context=set_span_in_context(span))
    return tuple(carrier.items())
