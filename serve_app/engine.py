"""One vLLM engine and its HTTP port: vLLM's own OpenAI application behind a small door.

Chat templates, tool calls, structured output, logprobs and error texts are vLLM's, because its
application answers the requests. This module adds what a replica needs around it: arguments
checked by name, a port that only gateways can use, a description of itself, and a drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import math
import secrets
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app import request as wire
from serve_app.capacity import cache_groups, held_blocks, kv_tokens
from serve_app.config import refuse_unknown_arguments
from serve_app.errors import LocalAttentionError
from serve_app.local_attention.plan import plan_in_force
from serve_app.pattern import FULL, LayerRule
from serve_app.port import Address, AsgiApp, Port, Receive, Scope, Send
from serve_app.request import EngineInfo, EngineLoad

ROUTES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"}
)
TOKEN_HEADER = wire.TOKEN_HEADER.encode()
BUDGET_HEADER = wire.BUDGET_HEADER.encode()
PROMPT_TOKENS_HEADER = wire.PROMPT_TOKENS_HEADER.encode()
REFUSED_HEADER = wire.REFUSED_HEADER.encode()


def check_engine_args(args: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an argument that vLLM does not have, naming the nearest one."""
    kinds = (AsyncEngineArgs, FrontendArgs)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    refuse_unknown_arguments(args, known)


class LoadLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM ships no types
    """Keeps the newest scheduler figures, so that describing an engine costs no round trip."""

    def __init__(self) -> None:
        self.load = EngineLoad()
        self.stepped_at = time.monotonic()

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        self.stepped_at = time.monotonic()
        preempted = self.load.preemptions
        if iteration_stats is not None:
            preempted += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None:
            self.load = EngineLoad(
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs,
                kv_usage=scheduler_stats.kv_cache_usage,
                preemptions=preempted,
            )

    def log_engine_initialized(self) -> None:
        """Nothing to announce: vLLM's own loggers do."""


@dataclasses.dataclass(slots=True)
class Visit:
    """What one HTTP request asked of the engine, shared between the door and the engine."""

    output_budget: int
    prompt_tokens: int = 0  # exact, once the prompt has been tokenized


_visit: ContextVar[Visit] = ContextVar("visit")


class CountingLLM(AsyncLLM):  # type: ignore[misc]
    """``AsyncLLM`` that holds every request to its output budget, in both directions.

    vLLM shortens an answer that does not fit behind its prompt without a word, which is wrong
    for a request that another pool could answer in full; and it lets an answer without a limit
    fill the context, which would make its length depend on the pool that it met.
    """

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        visit = _visit.get(None)
        if visit is not None and visit.output_budget:
            count = len(prompt.get("prompt_token_ids") or prompt.get("prompt_embeds") or ())
            visit.prompt_tokens += count
            limit, budget = self.model_config.max_model_len, visit.output_budget
            if count + budget > limit:
                raise VLLMValidationError(
                    f"This model's maximum context length is {limit} tokens. However, the request "
                    f"needs {count + budget}: {count} for the prompt and {budget} for the answer.",
                    parameter="input_tokens",
                    value=count,
                )
            sampling_params.max_tokens = budget
        stream: AsyncGenerator[Any, None] = super().generate(
            prompt, sampling_params, request_id, **options
        )
        return stream


class Door:
    """ASGI wrapper around vLLM's application.

    Only holders of the token enter, only allow-listed routes exist, and requests under way are
    counted, so that ``drained`` can be awaited. The status line is held back until the first
    byte of the answer, so that an error before the first token keeps a status of its own. Of an
    engine that is ``dead`` by then the gateway asks another one; a stream that began is cut, where
    vLLM would end it as if it were whole.
    """

    def __init__(self, app: AsgiApp, token: str, dead: Callable[[], bool]) -> None:
        self._app = app
        self._dead = dead
        self._token = token.encode()
        self._under_way = 0
        self._closed = False
        self.busy_since: float | None = None  # since when something has been under way
        self.drained = asyncio.Event()
        self.drained.set()

    def close(self) -> None:
        """Refuse new requests; those under way go on."""
        self._closed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope["path"], headers):
            await _refuse(send, *refusal)
            return
        budget = headers.get(BUDGET_HEADER, b"0")
        visit = Visit(int(budget) if budget.isdigit() else 0)
        _visit.set(visit)
        if self._under_way == 0:
            self.busy_since = time.monotonic()
            self.drained.clear()
        self._under_way += 1
        try:
            await self._app(scope, receive, _holding_start(send, visit, self._dead))
        except Exception:
            if not self._dead():
                raise  # else the answer was cut: the server closes the connection
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self.busy_since = None
                self.drained.set()

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> tuple[int, bytes] | None:
        if not hmac.compare_digest(headers.get(TOKEN_HEADER, b""), self._token):
            return 401, b"engines are reached through the gateway"
        if path not in ROUTES:
            return 404, b"no such route"
        if self._closed:
            return 503, b"draining"
        return None


def _holding_start(send: Send, visit: Visit, dead: Callable[[], bool]) -> Send:
    """``send`` that keeps the status line until the first body part, and then adds the count."""
    held: MutableMapping[str, Any] | None = None

    async def holding(message: MutableMapping[str, Any]) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            held = message
            return
        if held is not None:
            count = str(visit.prompt_tokens).encode()
            held["headers"] = [*held["headers"], (PROMPT_TOKENS_HEADER, count)]
            if dead():  # what follows is vLLM's error, which is not the client's
                held["headers"].append((REFUSED_HEADER, b"1"))
            await send(held)
            held = None
        elif dead():
            raise ConnectionResetError("the engine died while it was answering")
        await send(message)

    return holding


async def _refuse(send: Send, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (REFUSED_HEADER, b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


class Engine:
    """A vLLM engine behind its own HTTP port. Made by :meth:`start`."""

    def __init__(
        self,
        llm: AsyncLLM,
        load: LoadLogger,
        door: Door,
        port: Port,
        info: EngineInfo,
        silent_s: float,
    ) -> None:
        self._llm = llm
        self._load = load
        self._door = door
        self._port = port
        self._info = info
        self._silent_s = silent_s

    @classmethod
    async def start(
        cls,
        args: Mapping[str, Any],
        *,
        pool: str,
        replica: str,
        host: str,
        silent_s: float = math.inf,
    ) -> Engine:
        """Load the model and open a free port of ``host``.

        ``args`` are vLLM's engine arguments by name. Raises ``ConfigError`` for an unknown one.
        An engine that has requests and computes no step for ``silent_s`` seconds is taken for dead.
        """
        check_engine_args(args)
        namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        for name, value in args.items():
            setattr(namespace, name, value)
        config = AsyncEngineArgs.from_cli_args(namespace).create_engine_config(
            # vLLM's defaults for the size of a batch are four times larger for servers.
            UsageContext.OPENAI_API_SERVER
        )
        plan = plan_in_force(config)
        if plan is None and "local_attention" in (args.get("additional_config") or {}):
            raise LocalAttentionError(
                "local_attention is configured, but vLLM did not load the plugin that honours it; "
                "let VLLM_PLUGINS, if set, name local_attention."
            )
        load = LoadLogger()
        # vLLM wants a factory for each engine; there is one engine here.
        llm = CountingLLM.from_vllm_config(config, stat_loggers=[lambda *_: load])
        tasks = await llm.get_supported_tasks()
        app = build_app(namespace, tasks, llm.model_config)
        await init_app_state(llm, app.state, namespace, tasks)
        token = secrets.token_urlsafe(24)
        door = Door(app, token, dead=lambda: bool(llm.errored))
        port = Port(door, Address(host))
        app.state.server = port.server  # vLLM's own handlers close it when the engine is dead
        rules = plan.rules if plan else (FULL,)
        info = EngineInfo(
            replica=replica,
            pool=pool,
            url=port.url,
            token=token,
            rules=rules,
            prefill_tokens=config.scheduler_config.max_num_batched_tokens,
            kv_tokens=_kv_room(config, rules),
        )
        return cls(llm, load, door, port, info, silent_s)

    @property
    def app(self) -> AsgiApp:
        """The application behind the port, for a caller in the same process."""
        return self._door

    def describe(self) -> EngineInfo:
        return dataclasses.replace(self._info, load=self._load.load)

    async def check_health(self) -> None:
        """Raise when the engine or its port is dead, or the engine has hung."""
        await self._llm.check_health()
        if self._door.busy_since is not None:
            silent = time.monotonic() - max(self._door.busy_since, self._load.stepped_at)
            if silent > self._silent_s:
                raise RuntimeError(f"requests wait, but no step was computed for {silent:.0f} s")
        if self._port.closed:
            raise RuntimeError("the engine's HTTP port has closed")

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let those under way finish within ``grace_s``, then end."""
        self._door.close()
        with contextlib.suppress(TimeoutError):  # past the grace, what still runs is cut
            await asyncio.wait_for(self._door.drained.wait(), grace_s)
        await self._port.close()
        self._llm.shutdown()


def _kv_room(config: Any, rules: tuple[LayerRule, ...]) -> int:
    """Tokens of KV cache that sequences of the longest length can fill, averaged over layers."""
    length: int = config.model_config.max_model_len
    blocks: int = config.cache_config.num_gpu_blocks
    size: int = config.cache_config.block_size
    hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    held = sum(held_blocks(group.rule, length, size) for group in cache_groups(rules, hybrid))
    return int(blocks / held * kv_tokens(rules, length))
