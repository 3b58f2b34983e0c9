"""An engine that answers at once, so that what is measured is the gateway's own cost."""

# No "from __future__ import annotations" here, as in serve_app/deployments.py.

from ray import serve

from serve_app.config import AppConfig
from serve_app.request import EngineInfo


class FakeEngineDeployment:
    """Stands in for ``EngineDeployment``: the load tests' null server behind an engine's port.

    It answers with the asked number of tokens, one an event; the pool's ``engine_args`` are its
    manners, such as ``ttft_ms`` and ``itl_ms``.
    """

    async def __init__(self, config: AppConfig, pool: str) -> None:  # type: ignore[misc]
        from load_tests.null_server import Manners, NullServer
        from serve_app.port import Address, Port

        manners = Manners(**config.pools[pool].engine_args)
        self._port = Port(NullServer(manners), Address("127.0.0.1"))  # type: ignore[arg-type]
        self._info = EngineInfo(
            replica=serve.get_replica_context().replica_id.unique_id,
            pool=pool,
            url=self._port.url,
            token="none",
            prefill_tokens=2**24,
            kv_tokens=2**24,
        )

    async def describe(self) -> EngineInfo:
        return self._info

    async def __del__(self) -> None:
        if hasattr(self, "_port"):
            await self._port.close()
