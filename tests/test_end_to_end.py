"""The whole system as a user meets it: ``serve run deploy.yaml``, then the real OpenAI client."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

from tests.serving import ROOT, Server

# The demo model reads one byte as one token, so these lengths are exact.
SHORT_POOL = 1024
LONG_POOL = 8192


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def many(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def metric(server: Server, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def until(what: str, condition: object, server: Server, limit_s: float = 10) -> None:
    """Wait for a figure of ``/metrics``, which gateways refresh once a second."""
    deadline = time.monotonic() + limit_s
    while metric(server, what) != condition:
        assert time.monotonic() < deadline, f"{what} is {metric(server, what)}, not {condition}"
        time.sleep(0.1)


def test_chat_streams_tokens_and_ends(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=ask("Hello"),
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_an_answer_without_a_limit_gets_the_configured_budget(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ask("Hi"), extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 64  # default_output_tokens of configs/demo-cpu.yaml


def test_an_answer_longer_than_the_default_budget_is_given_in_full(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="hi", max_tokens=100, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 100


def test_plain_completion_counts_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="abc", max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(
            model="demo", prompt="abc", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .text
        for _ in range(2)
    }
    assert len(texts) == 1


def test_logprobs_come_with_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ask("Hi"), max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in logprobs.content)


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    def complete(**options: object) -> openai.types.Completion:
        return client.completions.create(
            model="demo",
            prompt="stop",
            max_tokens=40,
            temperature=1,
            seed=7,
            extra_body={"ignore_eos": True},
            **options,  # type: ignore[arg-type]
        )

    whole = complete().choices[0].text
    mark = next(char for char in whole[1:] if char.isascii() and char != whole[0])
    stopped = complete(stop=[mark]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(mark)]


@pytest.mark.parametrize(
    ("prompt_tokens", "pool"),
    [(10, "short"), (SHORT_POOL - 8, "short"), (SHORT_POOL - 7, "long"), (LONG_POOL - 8, "long")],
)
def test_the_smallest_pool_that_holds_a_request_answers(
    client: openai.OpenAI, prompt_tokens: int, pool: str
) -> None:
    answer = client.completions.with_raw_response.create(
        model="demo", prompt=[65] * prompt_tokens, max_tokens=8
    )
    assert answer.headers["x-pool"] == pool
    assert ("x-attention-plan" in answer.headers) == (pool == "long")
    assert answer.headers["x-request-id"]
    usage = answer.parse().usage
    assert usage is not None
    assert usage.prompt_tokens == prompt_tokens


def test_one_token_too_many_is_refused_with_count_and_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt=[65] * (LONG_POOL - 7), max_tokens=8)
    assert refused.value.code == "context_length_exceeded"
    assert f"{LONG_POOL}" in refused.value.message
    assert f"{LONG_POOL - 7} for the prompt" in refused.value.message


def test_a_prompt_longer_than_every_pool_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=ask("word " * 4000), max_tokens=8)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"text"',
        b'{"model": "demo"}',
        b'{"model": "demo", "messages": []}',
        b'{"model": "demo", "messages": "hi"}',
        b'{"model": "none", "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": -1}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": "x"}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "temperature": []}',
    ],
)
def test_a_bad_body_gets_openais_error_and_the_server_still_serves(
    server: Server, client: openai.OpenAI, body: bytes
) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert error["message"]
    assert {"type", "param", "code"} <= error.keys()
    assert client.completions.create(model="demo", prompt="ok", max_tokens=1).choices


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_engine(
    server: Server, many: openai.AsyncOpenAI, stream: bool
) -> None:
    left = metric(server, "gateway_disconnects_total")

    async def ask_for_much() -> None:
        answer = await many.completions.create(
            model="demo",
            prompt=[65] * 100,
            max_tokens=7000,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        async with answer:
            await anext(answer.__aiter__())

    asking = asyncio.create_task(ask_for_much())
    if stream:
        await asking
    else:
        await asyncio.to_thread(until, "engine_running_requests", 1, server)
        asking.cancel()
    await many.close()
    await asyncio.to_thread(until, "gateway_disconnects_total", left + 1, server)
    await asyncio.to_thread(until, "engine_running_requests", 0, server)
    await asyncio.to_thread(until, "engine_outstanding_tokens", 0, server)


async def test_thirty_two_clients_at_once_lose_nothing(many: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> int:
        answer = await many.completions.create(
            model="demo",
            prompt=[65 + number] * (16 if number % 2 else 1200),
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    assert await asyncio.gather(*(one(number) for number in range(32))) == [8] * 32


def test_models_health_and_unknown_routes(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json()["ready"]
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


def test_the_long_pool_serves_with_its_local_attention(server: Server) -> None:
    assert "Local attention in force" in server.log


def test_the_readmes_questions_get_the_readmes_answers(server: Server) -> None:
    """A short one from the pool with full attention, a long one from the one with a plan."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    long = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert long is not None
    program = long[1].replace("http://127.0.0.1:8000", server.url)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == long[2], run.stderr
    body = re.search(r"curl \S*/v1/chat/completions .*? -d '(.*?)'", text, re.DOTALL)
    assert body is not None
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=json.loads(body[1]), timeout=60)
    said = answer.json()["choices"][0]["message"]["content"]
    assert f"Both answer `{said}`" in text
    assert answer.headers["x-pool"] == "short"
    assert "x-attention-plan" not in answer.headers
