"""Every error this package raises on purpose, as one tree.

::

    ServeAppError
    ├── ConfigError             a configuration that cannot be served; raised at start
    │   └── LocalAttentionError   an attention plan that does not fit the model or the engine
    └── RequestError            answered to the client in OpenAI's error shape
        ├── InvalidRequest        400  the request itself is wrong
        │   └── PromptTooLong       400  longer than every pool
        ├── Unauthorized          401
        ├── NotFound              404  unknown route or model
        ├── BodyTimeout           408  the body did not arrive in time
        ├── BodyTooLarge          413
        ├── Overloaded            429  a queue is full; carries ``retry_after``
        ├── HeadersTooLarge       431
        ├── EngineError           502  an engine died
        │   └── EngineSilent        502  an engine is alive but sends nothing
        ├── Unavailable           503  no engine is alive; carries ``retry_after``
        └── DeadlineExceeded      504  the client's own deadline passed

Each takes one message, so that it survives pickling between Ray processes; status and code are
class attributes for the same reason.
"""

from __future__ import annotations

from typing import ClassVar


class ServeAppError(Exception):
    """Root of the tree."""


class ConfigError(ServeAppError, ValueError):
    """The configuration cannot be served. The message names the key, the value and the limit."""


class LocalAttentionError(ConfigError):
    """The attention plan does not fit the model or the engine. The message says what to do."""


class RequestError(ServeAppError):
    """An error that a client sees. ``status`` is HTTP's; ``kind`` and ``code`` are OpenAI's."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry_after: float | None = None  # seconds until a retry is likely to be taken
    param: str | None = None  # the request field at fault, where there is one

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as OpenAI's clients expect it."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(RequestError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class NotFound(RequestError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class BodyTooLarge(RequestError):
    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class BodyTimeout(RequestError):
    status = 408
    kind = "invalid_request_error"
    code = "body_timeout"


class HeadersTooLarge(RequestError):
    status = 431
    kind = "invalid_request_error"
    code = "headers_too_large"


class Overloaded(RequestError):
    status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class EngineError(RequestError):
    status = 502
    code = "engine_failed"


class EngineSilent(EngineError):
    code = "engine_silent"


class Unavailable(RequestError):
    status = 503
    code = "no_engine"


class DeadlineExceeded(RequestError):
    status = 504
    kind = "timeout_error"
    code = "deadline_exceeded"
