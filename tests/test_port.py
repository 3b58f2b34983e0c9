"""A port: where it listens, beside whom, and how it ends."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from serve_app.errors import ConfigError
from serve_app.port import Address, Port, Receive, Scope, Send


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:80", "http://[::1]:80"),
        ("gateway.example:0", "http://gateway.example:0"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert Address.parse(text).url == url


@pytest.mark.parametrize("text", ["", "8000", ":8000", "::1:80", "h:", "h:x", "h:65536", "h:-1"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        Address.parse(text)


class Waiter:
    """Answers once it is told to."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.asked.set()
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def number(port: Port) -> int:
    return int(port.url.rpartition(":")[2])


async def test_draining_takes_nobody_new_and_lets_the_others_finish() -> None:
    app = Waiter()
    port = Port(app, Address("127.0.0.1"))
    async with httpx.AsyncClient(base_url=port.url) as http:
        asked = asyncio.create_task(http.get("/"))
        await app.asked.wait()
        draining = asyncio.create_task(port.drain(30))
        while True:
            try:
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", int(port.url.rpartition(":")[2])
                )
            except ConnectionError:
                break
            writer.close()
        assert not draining.done()
        app.go.set()
        assert (await asked).text == "done"
        await asyncio.wait_for(draining, 10)
    assert port.closed


async def test_draining_ends_what_outlasts_its_grace() -> None:
    app = Waiter()
    port = Port(app, Address("127.0.0.1"))
    async with httpx.AsyncClient(base_url=port.url) as http:
        asked = asyncio.create_task(http.get("/"))
        await app.asked.wait()
        await asyncio.wait_for(port.drain(0.01), 10)
        app.go.set()
        assert (await asked).status_code == 500


async def test_two_share_an_address_only_where_both_say_so() -> None:
    first = Port(Waiter(), Address("127.0.0.1"), shared=True)
    address = Address("127.0.0.1", number(first))
    second = Port(Waiter(), address, shared=True)
    with pytest.raises(OSError, match="in use"):
        Port(Waiter(), address)
    await first.close()
    await second.close()
