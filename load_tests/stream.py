"""What a streamed request is, and what its stream showed. Pure: the clock is an argument."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Outcome = Literal["ok", "failed", "rejected", "unfinished"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send: ``body`` is the finished JSON, lengths are in tokens."""

    length_class: str
    path: str
    body: bytes
    prompt_tokens: int
    output_tokens: int
    answer: str | None = None


@dataclass(slots=True)
class Record:
    """What became of one `Ask`. Times without a unit are seconds since the run began.

    ``ttft_ms`` and ``e2e_ms`` count from ``scheduled``, so that a client or a queue that is late
    shows as latency and never hides it. ``itl_ms`` is the mean time of an output token after the
    first; ``gaps_ms`` are the times between arrivals of content, each of which may be several
    tokens.
    """

    length_class: str
    scheduled: float
    prompt_tokens_asked: int
    outcome: Outcome = "unfinished"
    sent: float | None = None
    ended: float | None = None
    status: int = 0
    error: str | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    itl_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    refused: list[int] = field(default_factory=list)  # each 429 or 503, obeyed ones too
    retry_after_s: float | None = None
    found: bool | None = None
    pool: str | None = None
    request_id: str | None = None


class StreamMeter:
    """Reads the lines of one SSE body and notes when its content came.

    Only content counts as a first token: the role delta, usage and comments do not. Tool calls
    and reasoning are content.
    """

    def __init__(self) -> None:
        self.content_at: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.done_at: float | None = None
        self.error: str | None = None
        self.text = ""

    @property
    def fault(self) -> str | None:
        """Why the finished stream is a failure, though its status was 200; None if it is not."""
        if self.error is not None:
            return self.error
        if self.done_at is None:
            return "the stream ended without [DONE]"
        if not self.content_at:
            return "the stream held no content"
        return None

    def line(self, line: bytes, now: float) -> None:
        """Take one line of the body, received at ``now`` (seconds of any one clock)."""
        if not line.startswith(b"data:"):
            return  # blank lines, comments and event names
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done_at = now
            return
        try:
            self._event(json.loads(data), now)
        except (ValueError, TypeError, AttributeError):  # not JSON, or not the shape of an event
            self.error = self.error or f"an event is malformed: {data[:80]!r}"

    def _event(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            self.error = self.error or f"error event: {error_message(event)}"
            return
        if usage := event.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.output_tokens = usage.get("completion_tokens")
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            text = delta.get("content") or delta.get("text") or delta.get("reasoning_content")
            if text or delta.get("tool_calls"):
                self.text += text or ""
                self.content_at.append(now)

    def fill(self, record: Record, origin: float) -> None:
        """Write the stream's times and counts into ``record``; ``origin`` is the run's start."""
        scheduled = origin + record.scheduled
        record.prompt_tokens, record.output_tokens = self.prompt_tokens, self.output_tokens
        if self.done_at is not None:
            record.e2e_ms = 1e3 * (self.done_at - scheduled)
        if not self.content_at:
            return
        first, last = self.content_at[0], self.content_at[-1]
        record.ttft_ms = 1e3 * (first - scheduled)
        arrivals = pairwise(dict.fromkeys(self.content_at))  # events that came together are one
        record.gaps_ms = [round(1e3 * (after - before), 3) for before, after in arrivals]
        if isinstance(self.output_tokens, int) and self.output_tokens > 1:
            record.itl_ms = 1e3 * (last - first) / (self.output_tokens - 1)


def error_message(body: Any) -> str:
    """The message of an error body in OpenAI's shape, or what there is of one."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]
