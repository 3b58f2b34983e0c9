"""The same engines behind Serve's default router, as a plain Serve application has them.

Every replica holds one engine and is its own ingress, so Serve's proxy picks one by its power of
two choices and passes the bytes on. That is one hop less than our gateway has: what Serve does
best. Replicas take any number of requests at once, so that vLLM batches them and nothing waits in
the proxy.
"""

# No "from __future__ import annotations" here, as in serve_app/deployments.py.

from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve

from serve_app.config import AppConfig
from serve_app.placement import place
from serve_app.request import TOKEN_HEADER

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


@serve.ingress()
class EngineIngress:
    """A Serve replica that owns one engine and answers HTTP with vLLM's own application."""

    async def __init__(self, config: AppConfig, pool: str) -> None:  # type: ignore[misc]
        from serve_app.engine import Engine

        self._engine = await Engine.start(
            config.engine_args_of(pool) | place(config.pools[pool], config.device).engine_args,
            pool=pool,
            replica=serve.get_replica_context().replica_id.unique_id,
            host="127.0.0.1",
        )

    def __serve_build_asgi_app__(self) -> AsgiApp:
        app, token = self._engine.app, self._engine.describe().token
        header = (TOKEN_HEADER.encode(), token.encode())

        async def with_token(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                scope = {**scope, "headers": [*scope["headers"], header]}
            await app(scope, receive, send)

        return with_token

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.stop(0)


def application(config: AppConfig) -> serve.Application:
    """The engines of the configuration's one pool, mixed lengths on each."""
    ((name, pool),) = config.pools.items()
    return (
        serve.deployment(EngineIngress)
        .options(
            name="engine",
            num_replicas=pool.replicas,
            max_ongoing_requests=100_000,
            graceful_shutdown_timeout_s=10,
            **place(pool, config.device).deployment_options(pool.env),
        )
        .bind(config, name)
    )
