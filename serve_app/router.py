"""Which pool, which replica, and what to do when that goes wrong.

A request goes to the smallest pool that holds it by estimate, and there to the replica with the
fewest outstanding tokens. The engine counts exactly: when it finds the request too long, the next
larger pool is asked, before any token was produced. A replica that dies before the first token
is replaced by another one, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.errors import EngineError, PromptTooLong, Unavailable
from serve_app.request import Call, EngineInfo

log = logging.getLogger(__name__)

ATTEMPTS = 3  # engines asked before a request is given up
RETRY_AFTER_S = 5.0  # what a client is told while no engine is alive


class Reply(Protocol):
    """What the router needs of an engine's answer; see ``upstream.Reply``."""

    status: int
    content_type: str
    prompt_tokens: int
    refused: bool
    too_long: str | None

    def chunks(self) -> AsyncIterator[bytes]: ...

    def close(self) -> None: ...


Open = Callable[[EngineInfo, Call], Awaitable[Reply]]
Discover = Callable[[], Awaitable[Sequence[EngineInfo]]]


class Pool:
    """The live replicas of one pool and the tokens outstanding on each."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit  # prompt plus output budget, in tokens
        self._engines: dict[str, EngineInfo] = {}
        self._outstanding: dict[str, int] = {}

    @property
    def engines(self) -> tuple[EngineInfo, ...]:
        return tuple(self._engines.values())

    def outstanding(self, replica: str) -> int:
        """Tokens of the requests that this gateway has under way on ``replica``."""
        return self._outstanding.get(replica, 0)

    def update(self, engines: Iterable[EngineInfo]) -> None:
        """Replace what is known of the live replicas."""
        self._engines = {engine.replica: engine for engine in engines}

    def forget(self, replica: str) -> None:
        """Stop choosing a replica that failed; it returns with the next update, if alive."""
        self._engines.pop(replica, None)

    def choose(self, tried: Iterable[str] = ()) -> EngineInfo | None:
        """The replica with the fewest outstanding tokens, among those not tried yet."""
        left = [engine for engine in self.engines if engine.replica not in set(tried)]
        return min(left, key=lambda engine: self.outstanding(engine.replica), default=None)

    def take(self, replica: str, tokens: int) -> Callable[[], None]:
        """Count ``tokens`` against ``replica``; call the result, once or more, to release them."""
        self._outstanding[replica] = self.outstanding(replica) + tokens
        held = True

        def release() -> None:
            nonlocal held
            if not held:
                return
            held = False
            self._outstanding[replica] -= tokens
            if self._outstanding[replica] == 0:
                del self._outstanding[replica]

        return release


@dataclass(slots=True)
class Answer:
    """An engine's answer on its way to the client. Close it, whatever becomes of the client."""

    pool: str
    engine: EngineInfo
    reply: Reply
    release: Callable[[], None]
    misroutes: int = 0

    def close(self) -> None:
        self.reply.close()
        self.release()


class Router:
    """Routes calls over ``pools``; ``open_call`` sends one call to one engine."""

    def __init__(self, pools: Sequence[Pool], open_call: Open) -> None:
        self.pools = sorted(pools, key=lambda pool: pool.limit)
        self._open = open_call

    @property
    def ready(self) -> bool:
        """Whether every pool has a live replica."""
        return all(pool.engines for pool in self.pools)

    @property
    def limit(self) -> int:
        """The most tokens, prompt and output budget together, that any pool holds."""
        return self.pools[-1].limit

    async def route(self, call: Call) -> Answer:
        """Open ``call`` on an engine and return once its first bytes are here.

        Raises ``PromptTooLong`` when no pool holds it, ``Unavailable`` when no engine is alive
        and ``EngineError`` when each engine asked has failed.
        """
        fitting = [pool for pool in self.pools if call.fit_tokens <= pool.limit]
        for misroutes, pool in enumerate(fitting or self.pools[-1:]):
            answer = await self._ask(pool, call)
            answer.misroutes = misroutes
            if answer.reply.too_long is None:
                return answer
            answer.close()
            sentence = answer.reply.too_long
        raise PromptTooLong(
            f"No pool holds this request: the longest takes {self.limit} tokens, prompt and "
            f"output budget ({call.output_tokens}) together. {sentence}",
            param="messages" if call.path.startswith("/v1/chat") else "prompt",
        )

    async def _ask(self, pool: Pool, call: Call) -> Answer:
        """The answer of one of the pool's engines, whatever it says."""
        tried: list[str] = []
        while (engine := pool.choose(tried)) and len(tried) < ATTEMPTS:
            tried.append(engine.replica)
            release = pool.take(engine.replica, call.total_tokens)
            try:
                reply = await self._open(engine, call)
            except EngineError as error:
                log.warning("request %s: %s", call.id, error)
                release()
                pool.forget(engine.replica)
                continue
            except BaseException:
                release()
                raise
            if not reply.refused:
                return Answer(pool.name, engine, reply, release)
            reply.close()
            release()
            pool.forget(engine.replica)
        if tried:
            raise EngineError(f"{len(tried)} engines of pool {pool.name} failed to answer.")
        raise Unavailable(
            f"No engine of pool {pool.name} is alive; try again shortly.",
            retry_after=RETRY_AFTER_S,
        )


async def keep_fresh(pool: Pool, discover: Discover, interval_s: float) -> None:
    """Ask for the pool's live replicas every ``interval_s`` seconds, until cancelled."""
    while True:
        pool.update(await discover())
        await asyncio.sleep(interval_s)
