"""Requests made from our own OpenAPI document, right and wrong ones, against the application."""

from __future__ import annotations

import itertools

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings

from serve_app.api import create_app
from serve_app.config import AppConfig
from serve_app.errors import EngineError, EngineSilent
from serve_app.metrics import GatewayMetrics
from serve_app.request import Call, EngineInfo
from serve_app.router import Pool, Router
from tests.test_api import FakeReply

BY_DESIGN = {502, 503, 504}  # an engine died, none is alive, the client's deadline passed
CONFIG = AppConfig.model_validate(
    {
        "model": "m",
        "served_model_name": "demo",
        "device": "cpu",
        "pools": {"short": {"max_model_len": 1024}},
    }
)


def gateway() -> FastAPI:
    """An application over two engines that answer, and fail now and then."""
    hours = itertools.count()
    pool = Pool("short", 1024, clock=lambda: 3600.0 * next(hours))  # every probe is due
    pool.update([EngineInfo(name, "short", f"http://{name}", "token") for name in ("e1", "e2")])
    asked = itertools.count(1)

    async def answers(_engine: EngineInfo) -> bool:
        return True

    async def open_call(_engine: EngineInfo, _call: Call) -> FakeReply:
        number = next(asked)
        if number % 5 == 0:
            raise EngineSilent("silent") if number % 2 else EngineError("dead")
        await pool.probe(answers)
        return FakeReply(b'{"choices": []}')

    return create_app(CONFIG, Router([pool], open_call), GatewayMetrics())


schema = schemathesis.openapi.from_asgi("/openapi.json", gateway())


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_finds_a_failure_of_our_own(case: schemathesis.Case) -> None:
    answer = case.call()
    assert answer.status_code < 500 or answer.status_code in BY_DESIGN, answer.text
    if answer.status_code >= 400 and case.path != "/ready":
        error = answer.json()["error"]
        assert error["message"]
        assert {"type", "param", "code"} <= error.keys()


def test_the_document_names_what_the_gateway_reads() -> None:
    for path, prompt in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
        operation = schema.raw_schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["required"]) == {"model", prompt}
        assert {"x-priority", "x-deadline-ms"} <= {p["name"] for p in operation["parameters"]}
