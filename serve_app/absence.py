"""Says why a pool has no engine, once one has been expected for long.

Ray waits in silence, and for ever, for resources that nobody adds or frees. What is missing is
found by the caller's ``explain``; here it is asked for in time, kept for ``/ready`` and logged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from serve_app.router import Pool

log = logging.getLogger(__name__)

PATIENCE_S = 25.0  # with a look every five seconds, within thirty of the beginning
LOOK_EVERY_S = 5.0
REPEAT_S = 60.0

# What keeps a pool's engine from starting, in a sentence; None where one starts.
Explain = Callable[[str], Awaitable[str | None]]


async def explain_absences(
    pools: Sequence[Pool],
    explain: Explain,
    *,
    patience_s: float = PATIENCE_S,
    every_s: float = LOOK_EVERY_S,
    repeat_s: float = REPEAT_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Keep each pool's ``absence``, until cancelled; log it at most every ``repeat_s`` seconds."""
    since: dict[str, float] = {}
    logged: dict[str, float] = {}
    while True:
        for pool in pools:
            now = clock()
            if not pool.lacks_engine:
                since.pop(pool.name, None)
                pool.absence = None
            elif now - since.setdefault(pool.name, now) >= patience_s:
                pool.absence = await explain(pool.name)
                if pool.absence and now - logged.get(pool.name, -math.inf) >= repeat_s:
                    logged[pool.name] = now
                    log.warning("no engine of pool %s: %s", pool.name, pool.absence)
        await asyncio.sleep(every_s)
