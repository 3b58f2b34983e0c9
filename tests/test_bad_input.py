"""Bad input at the wire, against the real server: each is refused quickly, and it still serves."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving import Server

SHORT_POOL = 1024
LONG_POOL = 8192
QUICK_S = 5.0  # on a busy machine; most take milliseconds
USER = {"role": "user", "content": "hi"}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture(autouse=True)
def _still_serves(http: httpx.Client) -> Iterator[None]:
    """After each test: nothing is left on the engines, and a good request is answered."""
    yield
    deadline = time.monotonic() + 20
    while any(figure(http, name) for name in ("engine_running_requests", "gateway_queued_tokens")):
        assert time.monotonic() < deadline, http.get("/metrics").text
        time.sleep(0.2)
    good = {"model": "demo", "prompt": "ok", "max_tokens": 1}
    assert http.post(COMPLETIONS, json=good).status_code == 200
    assert figure(http, "engine_outstanding_tokens") == 0


def figure(http: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    text = http.get("/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def chat(**extra: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": [USER], "max_tokens": 4, **extra}).encode()


def completion(**extra: Any) -> bytes:
    return json.dumps({"model": "demo", "prompt": "hi", "max_tokens": 4, **extra}).encode()


def schema(**fields: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": fields}}
    return chat(response_format=form)


def nested(levels: int) -> bytes:
    return b'{"model":"demo","messages":' + b"[" * levels + b"]" * levels + b"}"


# --- bodies ---------------------------------------------------------------------------------

BODIES = [
    ("deep JSON", CHAT, nested(50_000)),
    ("deep JSON that never ends", CHAT, b"[" * 500_000),
    ("NaN", CHAT, chat().replace(b"4}", b'4, "temperature": NaN}')),
    ("infinity", CHAT, chat().replace(b"4}", b'4, "temperature": 1e999}')),
    ("a number of 5,000 digits", CHAT, chat().replace(b"4}", b'4, "seed": ' + b"9" * 5000 + b"}")),
    ("a lone surrogate", CHAT, chat(messages=[{"role": "user", "content": "\ud800"}])),
    ("a surrogate as a name", CHAT, chat(user="\udfff")),
    ("a key twice", CHAT, b'{"model":"demo","model":"x","messages":[]}'),
    ("latin-1", CHAT, '{"model":"demo","user":"é"}'.encode("cp1252")),
    ("a null byte in the JSON", CHAT, chat() + b"\x00"),
    ("gzip that is not announced", CHAT, b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
    ("a form", CHAT, b"model=demo&messages=hi"),
    ("10,000 messages", CHAT, chat(messages=[USER] * 10_000)),
    ("a role that is a number", CHAT, chat(messages=[{"role": 7, "content": "hi"}])),
    ("a role of 65 letters", CHAT, chat(messages=[{"role": "r" * 65, "content": "hi"}])),
    ("an image by address", CHAT, chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}])),
    ("a video that calls itself text", CHAT, chat(messages=[{"role": "user", "content": [
        {"type": "text", "text": "x", "video_url": {"url": "file:///etc/passwd"}}]}])),
    ("a template", CHAT, chat(chat_template="{% for i in range(10**9) %}{% endfor %}")),
    ("template arguments", CHAT, chat(chat_template_kwargs={"a": 1})),
    ("a regex bomb", CHAT, chat(structured_outputs={"regex": "(a{1000}){1000}"})),
    ("an unbalanced regex", CHAT, chat(structured_outputs={"regex": "(("})),
    ("a schema bomb", CHAT, schema(type="array", minItems=10**9, items={"type": "string"})),
    ("a schema that calls another host", CHAT, schema(**{"$ref": "http://127.0.0.1:1/s"})),
    ("a schema of 300,000 characters", CHAT, schema(enum=["x" * 100] * 3000)),
    ("a schema of 10 MB", CHAT, schema(enum=["x" * 100] * 100_000)),
    ("n = 10,000", CHAT, chat(n=10_000)),
    ("n = true", CHAT, chat(n=True)),
    ("best_of = 10,000", COMPLETIONS, completion(best_of=10_000)),
    ("beam search", COMPLETIONS, completion(use_beam_search=True, n=8)),
    ("logprobs of everything", COMPLETIONS, completion(logprobs=1_000_000)),
    ("top_logprobs = -1", CHAT, chat(logprobs=True, top_logprobs=-1)),
    ("prompt_logprobs = -1", COMPLETIONS, completion(prompt_logprobs=-1)),
    ("10,000 stops", COMPLETIONS, completion(stop=[str(n) for n in range(10_000)])),
    ("an empty stop", COMPLETIONS, completion(stop="")),
    ("a logit bias of 100,000", COMPLETIONS, completion(
        logit_bias={str(n): 1 for n in range(100_000)})),
    ("a logit bias out of the vocabulary", COMPLETIONS, completion(logit_bias={"999999999": 1})),
    ("max_tokens = 2^63", COMPLETIONS, completion(max_tokens=2**63)),
    ("min_tokens without max_tokens", COMPLETIONS, b'{"model":"demo","prompt":"a","min_tokens":9}'),
    ("min_tokens over max_tokens", COMPLETIONS, completion(min_tokens=5)),
    ("temperature = -1", COMPLETIONS, completion(temperature=-1)),
    ("top_p = 7", COMPLETIONS, completion(top_p=7)),
    ("an empty prompt", COMPLETIONS, completion(prompt="")),
    ("no prompt", COMPLETIONS, b'{"model":"demo"}'),
    ("1,000 prompts", COMPLETIONS, completion(prompt=["a"] * 1000)),
    ("token ids out of the vocabulary", COMPLETIONS, completion(prompt=[2**31 - 1])),
    ("negative token ids", COMPLETIONS, completion(prompt=[-1])),
    ("token ids that are strings", COMPLETIONS, completion(prompt=[1, "2"])),
    ("embeddings as a prompt", COMPLETIONS, completion(prompt_embeds="AAAA")),
    ("a transfer of KV cache", COMPLETIONS, completion(kv_transfer_params={"remote_host": "x"})),
    ("an unknown model", COMPLETIONS, completion(model="../../etc/passwd")),
    ("a model that is a list", COMPLETIONS, completion(model=["demo"])),
    ("stream = 1", COMPLETIONS, completion(stream=1)),
    ("stream options without a stream", COMPLETIONS, completion(
        stream_options={"include_usage": True})),
    ("one token past the longest pool", COMPLETIONS, completion(prompt=[65] * (LONG_POOL - 3))),
    ("an output budget past the longest pool", COMPLETIONS, completion(max_tokens=LONG_POOL)),
    ("a prompt of 1 MB", COMPLETIONS, completion(prompt="a" * 10**6)),
]  # fmt: skip


def test_the_suite_is_large_enough() -> None:
    assert len(BODIES) + len(RAW) + len(HEADERS) >= 60


@pytest.mark.parametrize(("route", "body"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_bad_body_is_refused_quickly_in_openais_shape(
    http: httpx.Client, route: str, body: bytes
) -> None:
    began = time.monotonic()
    answer = http.post(route, content=body, headers={"content-type": "application/json"})
    assert time.monotonic() - began < QUICK_S
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert {"type", "param", "code"} <= error.keys()


def test_a_body_past_the_limit_is_refused_before_it_is_sent(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, content=completion(prompt="a" * 3_000_000))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("tokens", "pool"),
    [(SHORT_POOL - 4, "short"), (SHORT_POOL - 3, "long"), (LONG_POOL - 4, "long")],
)
def test_exact_pool_edges_are_served(http: httpx.Client, tokens: int, pool: str) -> None:
    answer = http.post(COMPLETIONS, content=completion(prompt=[65] * tokens))
    assert (answer.status_code, answer.headers["x-pool"]) == (200, pool)


@pytest.mark.parametrize(
    "special", ["<s>", "</s>", "<|im_start|>system", "<|endoftext|>", "[INST]"]
)
def test_special_tokens_spelt_in_a_text_are_only_text(http: httpx.Client, special: str) -> None:
    plain, spelt = (
        http.post(CHAT, content=chat(messages=[{"role": "user", "content": text}])).json()
        for text in ("x" * len(special), special)
    )
    assert spelt["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


# --- headers --------------------------------------------------------------------------------

HEADERS: list[tuple[str, list[tuple[str, str]], int]] = [
    ("200 headers", [(f"x-h{n}", "v") for n in range(200)], 431),
    ("a header of 50 kB", [("x-h", "v" * 50_000)], 431),
    ("an unknown priority", [("x-priority", "root")], 400),
    ("a deadline of words", [("x-deadline-ms", "soon")], 400),
    ("a deadline of no time", [("x-deadline-ms", "0")], 504),
]


@pytest.mark.parametrize(
    ("headers", "status"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS]
)
def test_bad_headers_are_refused(
    http: httpx.Client, headers: list[tuple[str, str]], status: int
) -> None:
    answer = http.post(COMPLETIONS, content=completion(), headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_request_id_that_is_no_word_is_replaced(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, content=completion(), headers={"x-request-id": "a b" * 100})
    assert answer.status_code == 200


# --- the wire -------------------------------------------------------------------------------

HOST = b"Host: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST
RAW: list[tuple[str, bytes, bytes]] = [  # what is sent, and how the answer begins
    ("no HTTP", b"hello\r\n\r\n", b"HTTP/1.1 400"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64, b"HTTP/1.1 400"),
    ("an unknown method", b"BREW /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n", b"HTTP/1.1 4"),
    ("HTTP/9.9", b"GET /health HTTP/9.9\r\n" + HOST + b"\r\n", b"HTTP/1.1 400"),
    ("a header without a colon", b"GET /health HTTP/1.1\r\nbroken\r\n\r\n", b"HTTP/1.1 400"),
    ("a length that is no number", POST + b"Content-Length: many\r\n\r\n", b"HTTP/1.1 400"),
    ("a negative length", POST + b"Content-Length: -5\r\n\r\n", b"HTTP/1.1 400"),
    (
        "two lengths",
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 400",
    ),
    (
        "a length and chunks",
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    ("a length past the limit", POST + b"Content-Length: 999999999\r\n\r\n", b"HTTP/1.1 413"),
    (
        "chunks that are no chunks",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    (
        "an empty object",
        POST + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 400",
    ),
    (
        "a path out of the root",
        b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HTTP/1.1 404",
    ),
    ("an engine's route", b"POST /tokenize HTTP/1.1\r\n" + HOST + b"\r\n", b"HTTP/1.1 404"),
    ("vLLM's own route", b"POST /sleep HTTP/1.1\r\n" + HOST + b"\r\n", b"HTTP/1.1 404"),
    (
        "a path of 60 kB",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HTTP/1.1 4",
    ),
]


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname
    assert address.port
    return socket.create_connection((address.hostname, address.port), timeout=QUICK_S)


@pytest.mark.parametrize(("sent", "begins"), [r[1:] for r in RAW], ids=[r[0] for r in RAW])
def test_malformed_http_is_refused(server: Server, sent: bytes, begins: bytes) -> None:
    with connect(server) as wire:
        wire.sendall(sent)
        assert wire.recv(65536).startswith(begins)


def test_a_body_that_ends_before_its_length_is_never_asked_of_an_engine(
    server: Server, http: httpx.Client
) -> None:
    before = figure(http, "gateway_requests_total"), figure(http, "gateway_disconnects_total")
    with connect(server) as wire:
        body = completion()
        wire.sendall(POST + b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body)
        wire.shutdown(socket.SHUT_WR)
        assert wire.recv(65536) == b""  # there is nobody to be told: the connection just ends
    requests, disconnects = before
    assert figure(http, "gateway_requests_total") == requests
    assert figure(http, "gateway_disconnects_total") == disconnects + 1


def test_a_second_request_hidden_in_a_body_is_not_answered_as_the_first(server: Server) -> None:
    inner = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    body = completion() + inner
    with connect(server) as wire:
        wire.sendall(POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        answer = b""
        while part := wire.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"gateway_requests_total" not in answer


def test_clients_that_send_slowly_hold_nothing_up(server: Server, http: httpx.Client) -> None:
    slow = [connect(server) for _ in range(50)]
    try:
        for number, wire in enumerate(slow):  # half of them in the headers, half in the body
            wire.sendall(POST + (b"Content-Length: 500\r\n\r\n{" if number % 2 else b"X-A: b"))
        began = time.monotonic()
        assert http.post(COMPLETIONS, content=completion()).status_code == 200
        assert time.monotonic() - began < QUICK_S
    finally:
        for wire in slow:
            wire.close()


async def test_clients_that_all_leave_leave_nothing(server: Server) -> None:
    async def leave(http: httpx.AsyncClient, number: int) -> None:
        body = completion(
            prompt=[65] * (100 if number % 2 else 1500),
            max_tokens=900,
            ignore_eos=True,
            stream=True,
        )
        headers = {"x-request-disconnect-disabled": "?1"} if number % 3 == 0 else {}
        try:
            async with asyncio.timeout(0.02 * (1 + number % 20)):
                await http.post(COMPLETIONS, content=body, headers=headers)
        except TimeoutError:
            return
        raise AssertionError("it was answered sooner than 900 tokens can be made")

    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        await asyncio.gather(*(leave(http, number) for number in range(60)))


async def test_a_storm_of_retries_is_answered(server: Server) -> None:
    """Each client asks again as soon as it is refused or times out, as broken ones do."""
    statuses: list[int] = []

    async def storm(http: httpx.AsyncClient, number: int) -> None:
        for _ in range(20):
            body = completion(n=0) if number % 2 else completion(max_tokens=1)
            statuses.append((await http.post(COMPLETIONS, content=body)).status_code)

    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=60, trust_env=False, limits=limits
    ) as http:
        await asyncio.gather(*(storm(http, number) for number in range(20)))
    assert sorted(set(statuses)) == [200, 400]
    assert len(statuses) == 400
