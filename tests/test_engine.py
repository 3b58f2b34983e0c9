"""The engine's door and argument check. The engine itself is met in test_end_to_end.py."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from serve_app.engine import Door, Engine, LoadLogger, _visit, check_engine_args
from serve_app.errors import ConfigError
from serve_app.request import EngineInfo

Message = dict[str, Any]


class Visitor:
    """One request at the level of ASGI, and what came back."""

    def __init__(self, path: str = "/v1/completions", token: str = "secret") -> None:
        headers = [(b"x-engine-token", token.encode()), (b"x-output-budget", b"9")]
        self.scope: Message = {"type": "http", "path": path, "headers": headers}
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


async def answer(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    _visit.get().prompt_tokens = 42  # vLLM tokenizes after it sent its status
    await send({"type": "http.response.body", "body": b"ok"})


def not_dead() -> bool:
    """What a door asks of an engine that works: whether it is dead."""
    return False


@pytest.mark.parametrize(
    ("visitor", "status"),
    [
        (Visitor(), 200),
        (Visitor(token="wrong"), 401),
        (Visitor(token=""), 401),
        (Visitor(path="/v1/embeddings"), 404),
        (Visitor(path="/metrics"), 404),
        (Visitor(path="/v1/completions/"), 404),
    ],
)
async def test_only_gateways_enter_and_only_listed_routes_exist(
    visitor: Visitor, status: int
) -> None:
    await Door(answer, "secret", not_dead)(visitor.scope, visitor.receive, visitor.send)
    assert visitor.status == status
    assert ((b"x-engine-refused", b"1") in visitor.sent[0]["headers"]) == (status != 200)


async def test_the_status_line_waits_for_the_exact_count() -> None:
    visitor = Visitor()
    await Door(answer, "secret", not_dead)(visitor.scope, visitor.receive, visitor.send)
    assert (b"x-prompt-tokens", b"42") in visitor.sent[0]["headers"]


async def test_what_a_dead_engine_says_is_for_another_to_answer() -> None:
    visitor, dead = Visitor(), False

    async def die(_scope: Any, _receive: Any, send: Any) -> None:
        nonlocal dead
        await send({"type": "http.response.start", "status": 500, "headers": []})
        dead = True
        await send({"type": "http.response.body", "body": b"EngineDeadError"})

    await Door(die, "secret", lambda: dead)(visitor.scope, visitor.receive, visitor.send)
    assert (b"x-engine-refused", b"1") in visitor.sent[0]["headers"]


async def test_a_stream_of_an_engine_that_dies_is_cut_and_not_ended() -> None:
    visitor, dead = Visitor(), False

    async def die(_scope: Any, _receive: Any, send: Any) -> None:
        nonlocal dead
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        dead = True
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    door = Door(die, "secret", lambda: dead)
    await door(visitor.scope, visitor.receive, visitor.send)
    assert [part.get("body") for part in visitor.sent[1:]] == [b"data: 1\n\n"]
    assert door.drained.is_set()


async def test_a_closed_door_refuses_and_drains_what_is_under_way() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        entered.set()
        await leave.wait()
        await answer(scope, receive, send)

    door = Door(slow, "secret", not_dead)
    first, late = Visitor(), Visitor()
    serving = asyncio.create_task(door(first.scope, first.receive, first.send))
    await entered.wait()
    door.close()
    await door(late.scope, late.receive, late.send)
    assert late.status == 503
    assert not door.drained.is_set()
    leave.set()
    await serving
    assert first.status == 200
    assert door.drained.is_set()


async def test_a_request_that_fails_is_still_counted_out() -> None:
    async def fail(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ValueError

    door, visitor = Door(fail, "secret", not_dead), Visitor()
    with pytest.raises(ValueError):  # noqa: PT011
        await door(visitor.scope, visitor.receive, visitor.send)
    assert door.drained.is_set()


class Alive:
    """Stands for a vLLM engine and a port that say nothing is wrong."""

    closed = False

    async def check_health(self) -> None:
        return None


async def test_an_engine_that_hangs_under_requests_is_not_healthy() -> None:
    entered = asyncio.Event()

    async def hang(_scope: Any, _receive: Any, _send: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    door, visitor, load = Door(hang, "secret", not_dead), Visitor(), LoadLogger()
    info = EngineInfo("r", "p", "http://r", "secret")
    alive: Any = Alive()
    engine = Engine(alive, load, door, alive, info, silent_s=60)
    load.stepped_at = time.monotonic() - 100
    await engine.check_health()  # idle for long, which is no fault
    serving = asyncio.create_task(door(visitor.scope, visitor.receive, visitor.send))
    await entered.wait()
    await engine.check_health()  # it has only just been asked
    door.busy_since = time.monotonic() - 90
    with pytest.raises(RuntimeError, match="no step was computed for 90 s"):
        await engine.check_health()
    load.record(None, None)
    await engine.check_health()
    serving.cancel()


def test_an_unknown_engine_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq\..*max_num_seqs"):
        check_engine_args({"max_num_seq": 3})


def test_server_arguments_of_vllm_are_known_too() -> None:
    check_engine_args({"tool_call_parser": "hermes", "enable_auto_tool_choice": True})


async def test_an_engine_is_not_started_with_an_unknown_argument() -> None:
    with pytest.raises(ConfigError):
        await Engine.start({"nonsense": 1}, pool="p", replica="r", host="127.0.0.1")
