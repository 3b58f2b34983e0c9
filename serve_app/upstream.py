"""Plain HTTP from a gateway to an engine's own port.

Raw HTTP rather than a call through Ray: bytes pass through unparsed, a client that leaves closes
the connection, and vLLM frees the KV cache when it sees that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import aiohttp

from serve_app.errors import EngineError, EngineSilent
from serve_app.request import (
    BUDGET_HEADER,
    PROMPT_TOKENS_HEADER,
    REFUSED_HEADER,
    TOKEN_HEADER,
    Call,
    EngineInfo,
)

_CONNECT_TIMEOUT_S = 5.0
_TOO_LONG = frozenset({"input_tokens", "input_text"})  # vLLM's names for "exceeds the context"
_NO_ROOM = "The prompt fills the context of the engine and leaves nothing for an answer."


class Reply:
    """An engine's answer whose first bytes have arrived.

    ``prompt_tokens`` is the engine's exact count, 0 where it never tokenized. ``refused`` means
    that the engine is draining and another one must be asked. ``too_long`` is vLLM's sentence
    when the request does not fit the engine's context.

    vLLM sends its status before its first token, so an error that comes between the two is an
    event in a stream that began with 200. It is turned back into an answer with its own status.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, first: bytes, inter_token_timeout_s: float
    ) -> None:
        self._response = response
        self._inter_token_timeout_s = inter_token_timeout_s
        self.status = response.status
        self.content_type = response.headers.get("content-type", "application/json")
        self.prompt_tokens = int(response.headers.get(PROMPT_TOKENS_HEADER, 0))
        self.refused = REFUSED_HEADER in response.headers
        self._whole = False  # whether the first bytes are all there is to pass on
        if (error := _error_event(first)) and self.status == 200:
            response.close()
            self.status, first = error
            self.content_type = "application/json"
            self._whole = True
        self.first = first
        self.too_long = _too_long(self.status, first)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer in order, the first ones included.

        Raises ``EngineError`` when the engine dies half way, ``EngineSilent`` when nothing comes
        for as long as an engine may take between two tokens.
        """
        yield self.first
        content = self._response.content
        try:
            # Not "until the response is closed": it closes when its end has arrived, though a slow
            # client may have left much of it in the buffer.
            while not self._whole and not content.at_eof():
                async with asyncio.timeout(self._inter_token_timeout_s):
                    chunk = await content.readany()
                yield chunk
        except TimeoutError as error:
            raise EngineSilent("The engine fell silent while it was answering.") from error
        except aiohttp.ClientError as error:
            raise EngineError("The engine died while it was answering.") from error

    def close(self) -> None:
        """Drop the connection; an engine that is still answering stops."""
        self._response.close()


def _error_event(first: bytes) -> tuple[int, bytes] | None:
    """The status and body of an error event at the start of a stream."""
    if not first.startswith(b'data: {"error"'):
        return None
    body = first.split(b"\n", 1)[0].removeprefix(b"data: ")
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):  # not vLLM's, or cut in two: it goes on as it is
        return None
    return (code if isinstance(code, int) and 400 <= code < 600 else 500), body


def _too_long(status: int, body: bytes) -> str | None:
    if status != 400:
        return None
    try:
        error = json.loads(body)["error"]
        # A client's own wrong max_tokens gets no further than the gateway.
        if error["param"] == "max_tokens":
            return _NO_ROOM
        return str(error["message"]) if error["param"] in _TOO_LONG else None
    except (ValueError, KeyError, TypeError):
        return None


class Upstream:
    """The connections of one gateway to every engine."""

    def __init__(self, model: str, first_token_timeout_s: float, inter_token_timeout_s: float):
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )
        self._first_token_timeout_s = first_token_timeout_s
        self._inter_token_timeout_s = inter_token_timeout_s
        probe = {"model": model, "prompt": [1], "max_tokens": 1}
        self._probe = Call(
            id="probe",
            path="/v1/completions",
            body=json.dumps(probe).encode(),
            fit_tokens=2,
            total_tokens=2,
            output_tokens=1,
        )

    async def close(self) -> None:
        await self._session.close()

    async def open(self, engine: EngineInfo, call: Call) -> Reply:
        """Send ``call`` to ``engine`` and wait for the first bytes of its answer.

        A streamed answer returns at its first token, any other when it is whole. Raises
        ``EngineError`` when the engine cannot be reached or dies, ``EngineSilent`` when it takes
        longer than a first token may, and each further token of an answer that is not streamed.
        """
        response = None
        limit = self._first_token_timeout_s
        if not call.stream:
            limit += call.output_tokens * self._inter_token_timeout_s
        try:
            async with asyncio.timeout(limit) as patience:
                response = await self._post(engine, call)
                if response.content_type == "text/event-stream":
                    first = await response.content.readany()
                else:
                    first = await response.read()
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, TimeoutError) and patience.expired():
                raise EngineSilent("It sent no first token in time.") from error
            if isinstance(error, aiohttp.ClientError | TimeoutError):
                raise EngineError(f"It did not answer: {error!r}.") from error
            raise
        return Reply(response, first, self._inter_token_timeout_s)

    async def probe(self, engine: EngineInfo) -> bool:
        """Whether the engine makes one token in time."""
        try:
            reply = await self.open(engine, self._probe)
        except EngineError:
            return False
        reply.close()
        return reply.status == 200

    async def _post(self, engine: EngineInfo, call: Call) -> aiohttp.ClientResponse:
        headers = {
            "content-type": "application/json",
            "x-request-id": call.id,
            TOKEN_HEADER: engine.token,
            BUDGET_HEADER: str(call.output_tokens),
            **dict(call.trace),
        }
        return await self._session.post(engine.url + call.path, data=call.body, headers=headers)
