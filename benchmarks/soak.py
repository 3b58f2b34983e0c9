"""Mixed traffic for ten minutes while an engine replica is killed each minute.

    python -m benchmarks.soak --minutes 10

Serves the demo configuration with two replicas of the short pool, on this machine, and asks for
short and long, streamed and whole answers, with clients that leave and requests that are wrong.
Each minute the older replica of the short pool is killed. What had not begun to stream must be
answered by another replica. Prints one line for each figure, and exits with 1 when a request was
lost or hung, or when the gateway's memory grew by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is not installed
from tests.serving import Server

CLIENTS = 8
HUNG_S = 120  # no answer of this traffic takes as long, though a replica is being replaced
KILL_EVERY_S = 60
SETTLE_S = 30  # before the first reading of memory
COMPLETIONS = "/v1/completions"


class Traffic:
    """Clients in a closed loop, and what came of their requests."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(random.Random(n), until) for n in range(CLIENTS)))

    async def _client(self, choose: random.Random, until: float) -> None:
        kinds: list[Callable[[random.Random], Awaitable[str]]] = [
            self._whole,
            self._streamed,
            self._leaving,
            self._wrong,
        ]
        while time.monotonic() < until:
            (kind,) = choose.choices(kinds, weights=(40, 40, 12, 8))
            try:
                async with asyncio.timeout(HUNG_S):
                    outcome = await kind(choose)
            except TimeoutError:
                outcome = "hung"
            except httpx.HTTPError as error:
                outcome = f"lost: {error!r}"
            self.counts[outcome.split(":")[0]] += 1
            if outcome.startswith(("hung", "lost")):
                self.lost.append(outcome)

    def _body(self, choose: random.Random, **extra: object) -> dict[str, object]:
        length = choose.choice([20, 200, 600, 1500, 4000])  # a byte is a token
        tokens = choose.choice([8, 32, 96])
        prompt = "".join(choose.choices("abcdefgh ", k=length))
        return {"model": "demo", "prompt": prompt, "max_tokens": tokens, **extra}

    async def _whole(self, choose: random.Random) -> str:
        answer = await self._http.post(COMPLETIONS, json=self._body(choose, ignore_eos=True))
        return "answered" if answer.status_code == 200 else _refusal(answer)

    async def _streamed(self, choose: random.Random) -> str:
        request = self._body(choose, ignore_eos=True, stream=True)
        async with self._http.stream("POST", COMPLETIONS, json=request) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return _refusal(answer)
            last = ""
            async for line in answer.aiter_lines():
                last = line.removeprefix("data: ") or last
        if last == "[DONE]":
            return "answered as a stream"
        return "cut after its first token" if "error" in json.loads(last) else "lost: no [DONE]"

    async def _leaving(self, choose: random.Random) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(choose.uniform(0.01, 1.0)):
                body = self._body(choose, ignore_eos=True, stream=choose.random() < 0.5)
                await self._http.post(COMPLETIONS, json=body)
        return "left"

    async def _wrong(self, choose: random.Random) -> str:
        wrong: dict[str, object] = choose.choice(
            [{"n": 0}, {"prompt": ""}, {"max_tokens": 10**6}, {"model": "x"}]
        )
        answer = await self._http.post(COMPLETIONS, json=self._body(choose, **wrong))
        return "refused" if 400 <= answer.status_code < 500 else _refusal(answer)


def _refusal(answer: httpx.Response) -> str:
    """An answer that sheds tells when to come back; any other to a good request is a loss."""
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        return f"shed with Retry-After ({answer.status_code})"
    return f"lost: {answer.status_code} {answer.text[:200]}"


async def kill_each_minute(server: Server, kills: list[float]) -> None:
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        victims = await asyncio.to_thread(server.replicas, "engine-short")
        if len(victims) > 1:  # the other one serves; one that is still loading is not counted on
            victims[0].send_signal(signal.SIGKILL)
            kills.append(time.monotonic())


def memory(server: Server) -> int:
    """Resident bytes of the gateway."""
    (gateway,) = server.replicas("gateway")
    return int(gateway.memory_info().rss)


async def soak(server: Server, minutes: float) -> bool:
    kills: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=None, trust_env=False, limits=limits
    ) as http:
        await Traffic(http).run(SETTLE_S)
        start = await asyncio.to_thread(memory, server)
        killing = asyncio.create_task(kill_each_minute(server, kills))
        traffic = Traffic(http)
        began = time.monotonic()
        await traffic.run(60 * minutes)
        elapsed = time.monotonic() - began
        killing.cancel()
        await asyncio.sleep(5)
        left = [line for line in (await http.get("/metrics")).text.splitlines() if _in_use(line)]
    end = await asyncio.to_thread(memory, server)
    print(f"requests                  {sum(traffic.counts.values())} in {elapsed:.0f} s")
    for outcome, count in sorted(traffic.counts.items()):
        print(f"  {outcome:<40} {count}")
    print(f"replicas killed           {len(kills)}")
    print(f"gateway memory            {start / 2**20:.1f} MiB -> {end / 2**20:.1f} MiB")
    print(f"left behind               {left or 'nothing'}")
    for outcome in traffic.lost[:20]:
        print(outcome)
    return not traffic.lost and not left and end < 1.1 * start


def _in_use(line: str) -> bool:
    """Whether a line of the metrics says that something is still under way."""
    busy = ("engine_running_requests", "engine_outstanding_tokens", "gateway_queued_requests")
    return line.startswith(busy) and float(line.split()[-1]) != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    server = Server(scale={"engine-short": 2})
    try:
        server.wait_ready()
        print(f"{psutil.cpu_count()} processors, {psutil.virtual_memory().total / 2**30:.0f} GiB")
        passed = asyncio.run(soak(server, minutes))
    finally:
        server.stop()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
