"""The demo model's shape, and the patterns of attention that it is trained with. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.pattern import FULL, LayerRule, LocalAttention

EPSILON = 1e-5
PATTERNS: dict[str, dict[str, int]] = {
    "sliding": {"sliding_window": 256},
    "sliding-3-1": {"sliding_window": 256, "full_attention_every": 4},
    "chunked-3-1": {"attention_chunk_size": 256, "full_attention_every": 4},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape, in the demo model's vocabulary."""

    layers: int = 4
    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    # Of the 16 frequencies a head has, half turn by less than a radian in 8k tokens: they can
    # compare names at any distance, and the others tell near positions apart.
    theta: float = 1e8
    # Offsets in tokens, one for each head, at which the lower layers begin by looking.
    offsets: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4), (1, 5, 10, 15), (1, 2, 4, 8))


def rules_of(shape: Shape, attention: str) -> tuple[LayerRule, ...]:
    """The layers' rules under one of ``PATTERNS``, or under ``full``."""
    if attention == "full":
        return (FULL,) * shape.layers
    return LocalAttention.model_validate(PATTERNS[attention]).rules(shape.layers)
