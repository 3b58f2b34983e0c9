"""Spans as a collector receives them."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serve_app.tracing import Tracer


async def test_spans_reach_the_collector_with_the_id_of_the_request() -> None:
    received: list[ExportTraceServiceRequest] = []

    async def collect(request: web.Request) -> web.Response:
        assert "gzip" not in request.headers.get("content-encoding", "")
        received.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    async with TestServer(app, host="127.0.0.1") as collector:
        tracer = Tracer.configured(f"http://127.0.0.1:{collector.port}/")
        assert tracer is not None
        tracer.start("abc", "/v1/completions", {}).end()
        await asyncio.to_thread(tracer.close)
    (resource,) = received[0].resource_spans
    service = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert service["service.name"] == "local-attention-gateway"
    (span,) = resource.scope_spans[0].spans
    assert {item.key: item.value.string_value for item in span.attributes} == {
        "request.id": "abc",
        "url.path": "/v1/completions",
    }
