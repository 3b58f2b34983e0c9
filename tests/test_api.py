"""The gateway's HTTP over a router whose engines are fakes."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve_app.api import create_app, identified
from serve_app.config import AppConfig, GatewayConfig
from serve_app.errors import EngineError
from serve_app.keys import KeyRing, hash_key
from serve_app.metrics import GatewayMetrics
from serve_app.pattern import LocalAttention
from serve_app.request import Call, EngineInfo, EngineLoad
from serve_app.router import Pool, Router, Share
from serve_app.tracing import ENDPOINT_VARIABLE, Tracer

CONFIG = AppConfig.model_validate(
    {
        "model": "m",
        "served_model_name": "demo",
        "device": "cpu",
        "gateway": {"max_body_bytes": 4096, "body_timeout_s": 0.05},
        "pools": {"short": {"max_model_len": 1024}},
    }
)
ASK: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 4}


class FakeReply:
    """Yields its parts; then dies, waits for ever, or ends."""

    status = 200
    content_type = "text/event-stream"
    prompt_tokens = 7
    refused = False

    def __init__(
        self,
        *parts: bytes,
        dies: bool = False,
        hangs: bool = False,
        too_long: str | None = None,
        pause_s: float = 0,
    ) -> None:
        self.parts = parts
        self.dies = dies
        self.hangs = hangs
        self.too_long = too_long
        self.pause_s = pause_s
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        self.opened.set()
        for part in self.parts:
            yield part
            await asyncio.sleep(self.pause_s)
        if self.dies:
            raise EngineError("The engine died while it was answering.")
        if self.hangs:
            await asyncio.Event().wait()

    def close(self) -> None:
        self.closed.set()


OpenReply = Callable[[EngineInfo], Awaitable[FakeReply]]


class Gateway:
    """An application with one pool of one engine, which answers with ``reply``.

    Or with other ``pools``, whose engines answer as ``open_reply`` says.
    """

    def __init__(
        self,
        reply: FakeReply | None,
        keys: KeyRing | None = None,
        config: AppConfig = CONFIG,
        tracer: Tracer | None = None,
        pools: Sequence[Pool] = (),
        open_reply: OpenReply | None = None,
    ) -> None:
        self.pool = Pool("short", 1024)
        self.calls: list[Call] = []
        if reply is not None:
            self.pool.update([EngineInfo("e1", "short", "http://e1", "token")])

        async def open_call(engine: EngineInfo, call: Call) -> FakeReply:
            self.calls.append(call)
            if open_reply is not None:
                return await open_reply(engine)
            assert reply is not None
            return reply

        self.metrics = GatewayMetrics()
        router = Router(pools or [self.pool], open_call)
        self.app = create_app(config, router, self.metrics, keys, tracer)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://gateway"
        )

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def test_bytes_pass_through_unchanged_with_the_pool_named() -> None:
    gateway = Gateway(FakeReply(b"data: 1\n\n", b"data: [DONE]\n\n"))
    answer = await gateway.http.post("/v1/completions", json=ASK, headers={"x-request-id": "abc"})
    assert answer.content == b"data: 1\n\ndata: [DONE]\n\n"
    assert answer.headers["x-pool"] == "short"
    assert answer.headers["content-type"] == "text/event-stream"
    assert gateway.calls[0].id == "abc"
    assert json.loads(gateway.calls[0].body) == ASK
    assert gateway.calls[0].output_tokens == 4


async def test_an_answer_under_a_local_plan_says_so() -> None:
    gateway = Gateway(FakeReply(b"data: [DONE]\n\n"))
    answer = await gateway.http.post("/v1/completions", json=ASK)
    assert "x-attention-plan" not in answer.headers
    rules = LocalAttention(sliding_window=512, full_attention_every=4).rules(8)
    gateway.pool.update([EngineInfo("e2", "short", "http://e2", "token", rules)])
    answer = await gateway.http.post("/v1/completions", json=ASK)
    plan = "6 x sliding 512, 2 x full (full: layers 3, 7)"
    assert answer.headers["x-attention-plan"] == plan


async def test_an_engine_that_dies_half_way_ends_the_stream_with_an_error_event() -> None:
    gateway = Gateway(FakeReply(b"data: 1\n\n", dies=True))
    answer = await gateway.http.post("/v1/completions", json=ASK)
    *_, event = answer.text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert "[DONE]" not in answer.text


async def test_no_engine_is_503_with_a_time_to_retry() -> None:
    answer = await Gateway(None).http.post("/v1/completions", json=ASK)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "no_engine"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 4000])
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    answer = await Gateway(FakeReply()).http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_over_the_limit_is_refused_before_it_is_read_whole() -> None:
    sent = 0

    async def flood() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1024
            yield b" " * 1024

    answer = await Gateway(FakeReply()).http.post("/v1/completions", content=flood())
    assert answer.status_code == 413
    assert sent < 10 * CONFIG.gateway.max_body_bytes


async def test_a_declared_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    client = Client(b"", more=True)
    client.scope["headers"] = [(b"content-length", b"4097")]
    await Gateway(FakeReply()).app(client.scope, client.receive, client.send)  # type: ignore[arg-type]
    assert client.status == 413
    assert client.unread == 1


async def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    client = Client(b"{", more=True)
    gateway = Gateway(FakeReply())
    await gateway.app(client.scope, client.receive, client.send)  # type: ignore[arg-type]
    assert client.status == 408
    assert gateway.count("gateway_sheds_total", reason="body_timeout") == 1


async def test_a_client_that_leaves_before_its_body_was_read_is_no_error() -> None:
    client = Client(b"{", more=True)
    client.leave()
    gateway = Gateway(FakeReply())
    await gateway.app(client.scope, client.receive, client.send)  # type: ignore[arg-type]
    assert gateway.count("gateway_disconnects_total") == 1


@pytest.mark.parametrize(
    "headers", [[("x-a", "b")] * 101, [("x-a", "b" * 33_000)]], ids=["many", "long"]
)
async def test_headers_have_limits(headers: list[tuple[str, str]]) -> None:
    answer = await Gateway(FakeReply()).http.post("/v1/completions", json=ASK, headers=headers)
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"


async def test_a_large_body_is_understood_too() -> None:
    roomy = CONFIG.model_copy(update={"gateway": GatewayConfig(max_body_bytes=2**21)})
    gateway = Gateway(FakeReply(b"{}"), config=roomy)
    body = {**ASK, "prompt": "word " * 2**18}  # over 1 MiB, which is parsed in a thread
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 200
    refused = await gateway.http.post("/v1/completions", json={**body, "n": 0})
    assert refused.json()["error"]["param"] == "n"


async def test_a_failure_of_our_own_is_one_sentence_in_openais_shape() -> None:
    gateway = Gateway(FakeReply())
    gateway.pool.lease = None  # type: ignore[assignment,method-assign]
    transport = httpx.ASGITransport(gateway.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.post("/v1/completions", json=ASK)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert gateway.count("gateway_requests_total", pool="none", status="500") == 1
    assert gateway.count("gateway_disconnects_total") == 0


async def test_a_wrong_method_and_an_unknown_path_keep_their_status() -> None:
    http = Gateway(FakeReply()).http
    assert (await http.get("/v1/completions")).status_code == 405
    missing = await http.get("/v1/embeddings")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


async def test_ready_needs_an_engine_and_health_does_not() -> None:
    full, empty = Gateway(FakeReply()), Gateway(None)
    assert (await full.http.get("/ready")).json() == {"ready": True, "pools": {"short": 1}}
    assert (await empty.http.get("/ready")).status_code == 503
    assert (await empty.http.get("/health")).status_code == 200


async def test_ready_says_why_a_pool_has_no_engine() -> None:
    gateway = Gateway(None)
    gateway.pool.absence = "An engine of pool short needs 2 GPU."
    answer = await gateway.http.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["missing"] == {"short": "An engine of pool short needs 2 GPU."}


async def test_models_names_the_longest_context() -> None:
    (model,) = (await Gateway(None).http.get("/v1/models")).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("demo", 1024)


async def test_metrics_count_answers_and_show_engines() -> None:
    gateway = Gateway(FakeReply(b"{}"))
    await gateway.http.post("/v1/completions", json=ASK)
    assert gateway.count("gateway_requests_total", pool="short", status="200") == 1
    text = (await gateway.http.get("/metrics")).text
    assert 'engine_outstanding_tokens{pool="short",replica="e1"} 0.0' in text


class Client:
    """A client at the level of ASGI, because only there can it leave at a chosen moment."""

    def __init__(self, body: bytes, *, more: bool = False) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": more})
        self.status = 0
        self.got_bytes = asyncio.Event()
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [],
        }

    async def receive(self) -> dict[str, Any]:
        return await self._messages.get()

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        if message["type"] == "http.response.body" and message["body"]:
            self.got_bytes.set()

    @property
    def unread(self) -> int:
        return self._messages.qsize()

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("parts", [(b"data: 1\n\n",), ()])
async def test_a_client_that_leaves_closes_the_engines_answer(parts: tuple[bytes, ...]) -> None:
    reply = FakeReply(*parts, hangs=True)
    gateway = Gateway(reply)
    client = Client(json.dumps(ASK).encode())
    serving = asyncio.create_task(gateway.app(client.scope, client.receive, client.send))  # type: ignore[arg-type]
    if parts:
        await client.got_bytes.wait()
    client.leave()
    await serving
    if gateway.calls:  # it may leave before an engine was asked
        assert reply.closed.is_set()
    assert gateway.pool.loads()["e1"].requests == 0
    assert gateway.count("gateway_disconnects_total") == 1
    assert gateway.count("gateway_wasted_chunks_total") == len(parts)


@pytest.mark.parametrize("parts", [(b"data: 1\n\n",), ()])
async def test_a_call_that_serve_cancels_counts_as_a_client_that_left(
    parts: tuple[bytes, ...],
) -> None:
    reply = FakeReply(*parts, hangs=True)
    gateway = Gateway(reply)
    client = Client(json.dumps(ASK).encode())
    serving = asyncio.create_task(gateway.app(client.scope, client.receive, client.send))  # type: ignore[arg-type]
    await (client.got_bytes.wait() if parts else reply.opened.wait())
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert reply.closed.is_set()
    assert gateway.pool.loads()["e1"].requests == 0
    assert gateway.count("gateway_disconnects_total") == 1


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer right", 200),
        ("bearer right", 200),
        ("Bearer wrong", 401),
        ("right", 401),
        ("", 401),
    ],
)
async def test_keys_guard_completions_and_models(authorization: str, status: int) -> None:
    gateway = Gateway(FakeReply(b"{}"), KeyRing.parse(f"alice {hash_key('right')}"))
    headers = {"authorization": authorization}
    for answer in (
        await gateway.http.post("/v1/completions", json=ASK, headers=headers),
        await gateway.http.get("/v1/models", headers=headers),
    ):
        assert answer.status_code == status
    assert (await gateway.http.get("/health")).status_code == 200


async def test_a_key_that_used_up_its_rate_is_told_when_to_return() -> None:
    ring = KeyRing.parse(f"alice {hash_key('k')} 0.1")  # six tokens of reserve
    gateway = Gateway(FakeReply(b"{}"), ring)
    headers = {"authorization": "Bearer k"}
    assert (await gateway.http.post("/v1/completions", json=ASK, headers=headers)).is_success
    refused = await gateway.http.post("/v1/completions", json=ASK, headers=headers)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_refused_request_costs_its_key_nothing() -> None:
    keys = KeyRing.parse(f"alice {hash_key('k')} 1", gateways=1)
    gateway = Gateway(None, keys)  # no engine: 503
    headers = {"authorization": "Bearer k"}
    for _ in range(5):  # each asks for all that an idle minute saves
        ask = ASK | {"max_tokens": 60}
        answer = await gateway.http.post("/v1/completions", json=ask, headers=headers)
        assert answer.status_code == 503, answer.text


async def test_every_answer_names_its_request_where_the_gateway_listens_itself() -> None:
    gateway = Gateway(FakeReply(b"data: [DONE]\n\n"))
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(identified(gateway.app)), base_url="http://gateway"
    )
    named = await http.post("/v1/completions", json=ASK, headers={"x-request-id": "abc"})
    assert named.headers.get_list("x-request-id") == ["abc"]
    assert gateway.calls[-1].id == "abc"
    odd = await http.post("/v1/completions", json=ASK, headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] == gateway.calls[-1].id != "a b"
    assert (await http.get("/nowhere")).headers["x-request-id"]


@pytest.mark.parametrize(
    "headers", [{"x-priority": "urgent"}, {"x-deadline-ms": "soon"}, {"x-deadline-ms": "-1"}]
)
async def test_a_header_that_says_nothing_known_is_refused_by_name(headers: dict[str, str]) -> None:
    answer = await Gateway(FakeReply()).http.post("/v1/completions", json=ASK, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in headers


async def test_priority_deadline_and_prefix_reach_the_router() -> None:
    gateway = Gateway(FakeReply(b"{}"))
    headers = {"x-priority": "batch", "x-deadline-ms": "5000", "x-session-id": "s"}
    await gateway.http.post("/v1/completions", json=ASK, headers=headers)
    (call,) = gateway.calls
    assert (call.priority, call.prefix_key) == ("batch", "s")
    assert call.deadline == pytest.approx(call.arrived + 5)


async def test_the_cache_key_in_the_body_wins_over_the_session() -> None:
    gateway = Gateway(FakeReply(b"{}"))
    ask = ASK | {"prompt_cache_key": "k"}
    await gateway.http.post("/v1/completions", json=ask, headers={"x-session-id": "s"})
    assert gateway.calls[0].prefix_key == "k"


async def test_a_span_continues_the_clients_trace_and_is_continued_by_the_engine() -> None:
    spans = InMemorySpanExporter()
    gateway = Gateway(FakeReply(b"{}"), tracer=Tracer(SimpleSpanProcessor(spans)))
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "abc"}
    await gateway.http.post("/v1/completions", json=ASK, headers=headers)
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert span.context.trace_id == int(trace, 16)
    assert dict(span.attributes or {}) == {
        "request.id": "abc",
        "url.path": "/v1/completions",
        "pool": "short",
        "http.response.status_code": 200,
    }
    sent = dict(gateway.calls[0].trace)["traceparent"]
    assert sent == f"00-{trace}-{span.context.span_id:016x}-01"


def test_traces_are_off_unless_an_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT_VARIABLE, raising=False)
    assert Tracer.configured(None) is None


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "serve_app.api"]


async def test_a_request_is_one_line_in_the_log_with_its_keys_name_and_without_its_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="serve_app")
    gateway = Gateway(FakeReply(b"{}"), KeyRing.parse(f"alice {hash_key('k')}"))
    headers = {"authorization": "Bearer k", "x-request-id": "abc"}
    ask = ASK | {"prompt": "swordfish"}
    await gateway.http.post("/v1/completions", json=ask, headers=headers)
    (line,) = lines(caplog)
    assert line.startswith("request id=abc key=alice path=/v1/completions pool=short status=200 ")
    assert "swordfish" not in caplog.text


REFUSALS: list[tuple[str, bytes, dict[str, str], str]] = [
    ("POST", b'{"prompt": "swordfish"', {}, "status=400 code=invalid_request"),
    ("POST", b"", {"authorization": "Bearer swordfish"}, "status=401 code=invalid_api_key"),
    ("POST", b"swordfish" * 1000, {}, "status=413 code=body_too_large"),
    ("POST", b"", {"x-a": "b" * 33_000}, "status=431 code=headers_too_large"),
    ("POST", json.dumps(ASK | {"max_tokens": 99}).encode(), {}, "status=429 code=overloaded"),
    ("PUT", b"swordfish", {}, "status=405 code=not_found"),
]


@pytest.mark.parametrize(
    ("method", "body", "headers", "says"), REFUSALS, ids=[refusal[3] for refusal in REFUSALS]
)
async def test_a_request_that_is_refused_at_the_door_is_one_line_in_the_log_too(
    caplog: pytest.LogCaptureFixture, method: str, body: bytes, headers: dict[str, str], says: str
) -> None:
    caplog.set_level("INFO", logger="serve_app")
    ring = KeyRing.parse(f"alice {hash_key('k')} 1")
    ring.charge(ring.check("Bearer k"), 1000, time.monotonic())  # it has used up its rate
    gateway = Gateway(FakeReply(b"{}"), ring)
    sent = {"authorization": "Bearer k", "x-request-id": "abc"} | headers
    await gateway.http.request(method, "/v1/completions", content=body, headers=sent)
    (line,) = lines(caplog)
    known = "-" if re.search("401|405|431", says) else "alice"
    assert line == f"request id=abc key={known} method={method} path=/v1/completions {says}"
    assert "swordfish" not in caplog.text


async def test_a_body_that_never_comes_is_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="serve_app")
    slow, gone = Client(b"{", more=True), Client(b"{", more=True)
    gone.leave()
    for client in (slow, gone):
        await Gateway(FakeReply()).app(client.scope, client.receive, client.send)  # type: ignore[arg-type]
    ends = [line.split("path=/v1/completions ")[1] for line in lines(caplog)]
    assert ends == ["status=408 code=body_timeout", "status=499 code=client_closed"]


async def test_a_path_cannot_write_lines_of_its_own_into_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="serve_app")
    await Gateway(FakeReply()).http.get("/a%0Arequest id=x" + "y" * 5000)
    (line,) = lines(caplog)
    assert "\n" not in line
    assert len(line) < 300


async def test_an_answer_counts_where_its_time_went() -> None:
    pool = Pool("short", 1024, share=Share(overcommit=1))
    pool.update([EngineInfo("e1", "short", "", "", prefill_tokens=1, kv_tokens=1)])

    async def open_reply(_engine: EngineInfo) -> FakeReply:
        await asyncio.sleep(0.06)
        return FakeReply(b"1", b"2", pause_s=0.06)

    gateway = Gateway(None, pools=[pool], open_reply=open_reply)
    busy = await pool.lease(Call("busy", "", b"", fit_tokens=9, total_tokens=9, output_tokens=1))
    asyncio.get_running_loop().call_later(0.3, pool.finish, busy)  # long after it began to wait
    await gateway.http.post("/v1/completions", json=ASK)
    waited, first, between, whole = (
        gateway.count(f"{name}_seconds_sum", pool="short") or 0.0
        for name in (
            "gateway_queue_wait",
            "gen_ai_server_time_to_first_token",
            "gen_ai_server_time_per_output_chunk",
            "gen_ai_server_request_duration",
        )
    )
    assert 0.05 < waited < first - 0.05
    assert 0.05 < between < whole - first
    assert whole > 0.2


async def test_an_answer_counts_its_prompt_as_estimated_and_as_it_was() -> None:
    gateway = Gateway(FakeReply(b"{}"))
    await gateway.http.post("/v1/completions", json=ASK)
    estimated = gateway.calls[0].total_tokens - ASK["max_tokens"]
    assert gateway.count("gateway_estimated_prompt_tokens_total") == estimated > 0
    assert gateway.count("gateway_exact_prompt_tokens_total") == FakeReply.prompt_tokens


async def test_lengths_are_learned_from_answers() -> None:
    reply = FakeReply(b"{}")
    reply.prompt_tokens = 900
    gateway = Gateway(reply)
    for _ in range(20):
        await gateway.http.post("/v1/completions", json=ASK | {"prompt": "word " * 400})
    estimates = [call.total_tokens - ASK["max_tokens"] for call in gateway.calls]
    assert estimates[0] < 700
    assert estimates[-1] == pytest.approx(900, rel=0.05)


async def test_a_key_gets_back_what_its_prompt_proved_shorter_by() -> None:
    keys = KeyRing.parse(f"alice {hash_key('k')} 1.5")  # 90 tokens of reserve
    gateway = Gateway(FakeReply(b"{}"), keys)
    ask = ASK | {"prompt": [65] * 46}  # 50 with its output, but the engine counts 7
    for _ in range(2):
        answer = await gateway.http.post(
            "/v1/completions", json=ask, headers={"authorization": "Bearer k"}
        )
        assert answer.status_code == 200, answer.text


def short_and_long() -> tuple[Pool, Pool]:
    short, long = Pool("short", 512), Pool("long", 1024)
    short.update([EngineInfo(name, "short", "", "") for name in ("s1", "s2")])
    long.update([EngineInfo("l1", "long", "", "")])
    return short, long


async def test_retries_and_misroutes_are_counted_however_the_request_ends() -> None:
    """Of three requests one is answered, one is too long for all, and one meets dying engines."""
    ends: list[FakeReply | None] = []  # what the engines that are asked do; None: it dies

    async def open_reply(_engine: EngineInfo) -> FakeReply:
        if (reply := ends.pop(0)) is None:
            raise EngineError("dead")
        return reply

    def too_long() -> FakeReply:
        return FakeReply(too_long="600 tokens")

    async def ask(*replies: FakeReply | None) -> tuple[int, float | None, float | None]:
        ends[:] = replies
        gateway = Gateway(None, pools=short_and_long(), open_reply=open_reply)
        answer = await gateway.http.post("/v1/completions", json=ASK)
        if answer.is_error:
            reason = answer.json()["error"]["code"]
            assert gateway.count("gateway_sheds_total", reason=reason) == 1
        return (
            answer.status_code,
            gateway.count("gateway_retries_total"),
            gateway.count("gateway_misroutes_total"),
        )

    assert await ask(None, too_long(), FakeReply(b"{}")) == (200, 1, 1)
    assert await ask(too_long(), too_long()) == (400, 0, 2)
    assert await ask(None, None, None) == (502, 3, 0)
    assert await ask(None, too_long(), None) == (503, 2, 1)


async def test_metrics_show_what_waits_and_what_engines_report() -> None:
    pool = Pool("short", 1024, share=Share(overcommit=1))
    load = EngineLoad(running=3, waiting=2, kv_usage=0.25, preemptions=4)
    pool.update([EngineInfo("e1", "short", "", "", prefill_tokens=1, kv_tokens=1, load=load)])
    gateway = Gateway(FakeReply(hangs=True), pools=[pool])
    call = Call("r", "", b"", fit_tokens=10, total_tokens=10, output_tokens=4)
    lease = await pool.lease(call)
    waiting = asyncio.create_task(pool.lease(call))
    await asyncio.sleep(0)
    await gateway.http.get("/metrics")
    assert gateway.count("gateway_queued_requests", pool="short") == 1
    assert gateway.count("gateway_queued_tokens", pool="short") == 6 + 10
    shown = {
        name: gateway.count(f"engine_{name}", pool="short", replica="e1")
        for name in (
            "running_requests",
            "waiting_requests",
            "kv_cache_usage_ratio",
            "preemptions",
            "outstanding_tokens",
        )
    }
    assert list(shown.values()) == [3, 2, 0.25, 4, 6 + 10], shown
    pool.finish(lease)
    pool.finish(await waiting)
