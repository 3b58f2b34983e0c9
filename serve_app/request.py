"""The frozen types that cross a process boundary or travel through the router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve_app.pattern import FULL, LayerRule

# Headers between a gateway and an engine's port; none of them reaches a client.
TOKEN_HEADER = "x-engine-token"  # proves that the caller is a gateway
BUDGET_HEADER = "x-output-budget"  # tokens that the answer may take
PROMPT_TOKENS_HEADER = "x-prompt-tokens"  # the engine's exact count
REFUSED_HEADER = "x-engine-refused"  # the door answered, not vLLM: try another engine


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine last reported of itself."""

    running: int = 0  # requests in the current batch
    waiting: int = 0  # requests that vLLM holds back
    kv_usage: float = 0.0  # share of KV blocks in use, 0 to 1
    preemptions: int = 0  # since start


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One live engine replica, as it describes itself to the gateways. Lengths are tokens."""

    replica: str
    pool: str
    url: str  # scheme, host and port, without a path
    token: str  # what the replica's port asks for; made by the replica, never stored
    rules: tuple[LayerRule, ...] = (FULL,)  # the attention plan, a rule for each layer
    prefill_tokens: int = 8192  # computed in one step at most
    kv_tokens: int = 2**20  # KV cache in the plan's tokens, averaged over layers
    load: EngineLoad = EngineLoad()


@dataclass(frozen=True, slots=True)
class Demand:
    """What one gateway asks of one pool at this moment."""

    gateway: str
    tokens: int  # cost of all that waits here and of all that is under way
    ttft_s: float = 0.0  # p95 of late; 0 where nothing was answered


@dataclass(frozen=True, slots=True)
class Call:
    """One validated client request, as the router sees it. All lengths are tokens.

    ``fit_tokens`` is what the request is expected to need of an engine's context, padded for the
    uncertainty of the estimate; ``total_tokens`` is the unpadded load that it puts on an engine.
    ``output_tokens`` is the budget that the engine adds to its exact count. ``body`` goes to the
    engine unchanged. ``arrived`` and ``deadline`` are times of the gateway's monotonic clock.
    """

    id: str
    path: str
    body: bytes
    fit_tokens: int
    total_tokens: int
    output_tokens: int
    stream: bool = False
    arrived: float = 0.0
    priority: Literal["interactive", "batch"] = "interactive"
    deadline: float | None = None
    trace: tuple[tuple[str, str], ...] = ()  # headers that continue the request's trace
    prefix_key: str | None = None  # requests with the same key share the start of their prompts
