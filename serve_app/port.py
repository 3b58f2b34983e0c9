"""A listening HTTP port inside a Serve replica, served by uvicorn on the running event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Self

import uvicorn

from serve_app.errors import ConfigError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0 is any free one."""

    host: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``127.0.0.1:8000`` or ``[::1]:8000``. Raises ``ConfigError``."""
        host, _, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or (":" in bare) != (host != bare) or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"listen is {text!r} but must be host:port, such as 127.0.0.1:8000.")
        return cls(bare, int(port))

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Port:
    """Listens from the moment it is made. ``shared`` lets other processes listen beside it: the
    kernel then spreads connections over all of them."""

    def __init__(self, app: AsgiApp, address: Address, *, shared: bool = False) -> None:
        self._socket = socket.create_server(
            (address.host, address.port), family=address.family, reuse_port=shared
        )
        # Accepted sockets inherit it. Without it, plain asyncio delays each token by 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
        )
        self.server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self.server.serve(sockets=[self._socket]))
        self.url = Address(address.host, self._socket.getsockname()[1]).url

    @property
    def closed(self) -> bool:
        return self._serving.done()

    async def drain(self, grace_s: float) -> None:
        """Stop listening, and cut what is still under way after ``grace_s`` seconds."""
        self.server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
        self.server.should_exit = True
        await self._serving

    async def close(self) -> None:
        """Stop at once. Connections still open end with the process."""
        self.server.should_exit = True
        self.server.force_exit = True
        await self._serving
