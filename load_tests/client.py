"""One streamed request over Locust's fast HTTP client, measured from its scheduled time."""

from __future__ import annotations

import json
import math
from time import perf_counter

import gevent
from geventhttpclient.useragent import CompatResponse
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, LocustUserAgent

from load_tests.stream import Ask, Record, StreamMeter, error_message

REJECTIONS = (429, 503)
MOST_RETRIES = 10
TIMER_TICK_S = 0.001
DEFAULT_RETRY_S = 1.0  # for a rejection without a Retry-After


def sleep_until(due: float) -> None:
    """Sleep until ``due`` (``perf_counter`` seconds), never less. The event loop's timers tick in
    milliseconds, so the last one is spent looking at the clock while other greenlets run."""
    while (left := due - perf_counter()) > 0:
        gevent.sleep(left - TIMER_TICK_S if left > TIMER_TICK_S else 0)


def user_agent(streams: int = 10_000, timeout_s: float = 600.0) -> LocustUserAgent:
    """A pooled HTTP client for `send`, for use without Locust's runner."""
    agent = LocustUserAgent(
        concurrency=streams, network_timeout=timeout_s, connection_timeout=60, max_retries=0
    )
    return accept_every_status(agent)


def accept_every_status(agent: LocustUserAgent) -> LocustUserAgent:
    """Have ``agent`` return error answers instead of raising, for `send` to judge by itself."""
    agent.valid_response_codes = frozenset(range(100, 600))
    return agent


def send(
    agent: LocustUserAgent,
    host: str,
    ask: Ask,
    scheduled: float,
    *,
    origin: float,
    headers: dict[str, str],
    obey_retry_after: bool = False,
) -> Record:
    """Send ``ask`` and read its stream to the end.

    ``scheduled`` and ``origin`` (the run's start) are ``perf_counter`` seconds. Never raises for
    what the server does; a greenlet killed here leaves a record that says ``unfinished``.
    """
    record = Record(ask.length_class, scheduled - origin, ask.prompt_tokens)
    record.sent = perf_counter() - origin
    try:
        while True:
            _attempt(agent, host, ask, record, origin, headers)
            if record.outcome != "rejected" or not obey_retry_after:
                break
            if len(record.refused) > MOST_RETRIES:
                break
            gevent.sleep(record.retry_after_s or DEFAULT_RETRY_S)
    except gevent.GreenletExit:
        record.outcome = "unfinished"
    record.ended = perf_counter() - origin
    return record


def _attempt(
    agent: LocustUserAgent,
    host: str,
    ask: Ask,
    record: Record,
    origin: float,
    headers: dict[str, str],
) -> None:
    meter = StreamMeter()
    try:
        response = agent.urlopen(host + ask.path, "POST", payload=ask.body, headers=headers)
        record.status = response.status_code
        record.pool = response.headers.get("x-pool")
        record.request_id = response.headers.get("x-request-id")
        if record.status == 200:
            _read_stream(response, meter)
            record.error = meter.fault
        else:
            record.error = _refusal(response)
    except FAILURE_EXCEPTIONS as error:
        record.error = f"{type(error).__name__}: {error}"[:200]
    record.outcome = "failed" if record.error else "ok"
    if record.status in REJECTIONS:
        record.outcome = "rejected"
        record.refused.append(record.status)
        record.retry_after_s = _retry_after(response.headers.get("retry-after"))
    meter.fill(record, origin)
    if ask.answer is not None and record.outcome == "ok":
        record.found = ask.answer in meter.text


def _read_stream(response: CompatResponse, meter: StreamMeter) -> None:
    # The raw response: the public ``iter_content`` waits for a full block, which would hide when
    # each event came, and takes a cut connection for a normal end.
    raw, now = response._response, perf_counter()
    while True:
        waits = b"\n" not in raw._body_buffer  # lines that came together have one time
        line = raw.readline(b"\n")
        if not line:
            return
        now = perf_counter() if waits else now
        meter.line(line, now)


def _refusal(response: CompatResponse) -> str:
    body = response.content
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = body[:200].decode("utf-8", "replace")
    return f"HTTP {response.status_code}: {message}"


def _retry_after(value: str | None) -> float | None:
    """The seconds form of Retry-After; its date form is rare enough to be ignored."""
    try:
        seconds = float(value) if value else math.nan
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
