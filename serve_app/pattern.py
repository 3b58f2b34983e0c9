"""Which keys each layer's queries may see: the words of local attention, and nothing else.

Pure Python on purpose. The configuration validates with it, the capacity arithmetic counts with
it, and the vLLM plugin builds masks and KV-cache specs from it, so the three cannot disagree.

=====================  ==================================================
kind                   keys visible to the query at position ``i``
=====================  ==================================================
``full_attention``     ``j <= i``
``sliding_attention``  ``i - window < j <= i``, and ``j < sinks``
``chunked_attention``  ``j <= i`` and ``j // chunk == i // chunk``
=====================  ==================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["full_attention", "sliding_attention", "chunked_attention"]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """One layer's rule. ``span`` is the window or the chunk in tokens (0 for full attention)."""

    kind: Kind = "full_attention"
    span: int = 0
    sinks: int = 0

    def sees(self, query: int, key: int) -> bool:
        """Whether the query at position ``query`` may see the key at position ``key``."""
        if key > query:
            return False
        if self.kind == "sliding_attention":
            return key > query - self.span or key < self.sinks
        if self.kind == "chunked_attention":
            return key // self.span == query // self.span
        return True

    def visible(self, length: int) -> int:
        """The most keys that one query of a sequence of ``length`` tokens can see."""
        if self.kind == "full_attention":
            return length
        return min(length, self.span + self.sinks)


FULL = LayerRule()


def in_words(rules: Sequence[LayerRule]) -> str:
    """``3 x sliding 512, 1 x full (full: layers 3)`` for four layers."""
    kinds = Counter(rules)
    parts = [f"{count} x {_describe(rule)}" for rule, count in kinds.items()]
    full = [str(i) for i, rule in enumerate(rules) if rule == FULL]
    where = f" (full: layers {', '.join(full)})" if full and len(kinds) > 1 else ""
    return f"{', '.join(parts)}{where}"


def _describe(rule: LayerRule) -> str:
    if rule.kind == "chunked_attention":
        return f"chunked {rule.span}"
    if rule.kind == "sliding_attention":
        return f"sliding {rule.span}" + (f" + {rule.sinks} sinks" if rule.sinks else "")
    return "full"


class LocalAttention(BaseModel):
    """A local attention pattern as a user writes it, for a model of any depth.

    Exactly one of ``sliding_window`` and ``attention_chunk_size`` is given, unless
    ``layer_types`` names both kinds. Without ``layer_types``, every layer is local except those
    that ``full_attention_every`` or ``full_attention_layers`` leaves full.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sliding_window: int | None = Field(default=None, gt=0)
    attention_chunk_size: int | None = Field(default=None, gt=0)
    attention_sinks: int = Field(default=0, ge=0)
    full_attention_every: int | None = Field(default=None, gt=0)
    full_attention_layers: tuple[int, ...] | None = None
    layer_types: tuple[Kind, ...] | None = None

    @model_validator(mode="after")
    def _one_pattern(self) -> Self:
        window, chunk = self.sliding_window, self.attention_chunk_size
        if window is None and chunk is None:
            raise ValueError(
                "local_attention names neither sliding_window nor attention_chunk_size; "
                "give one of them, in tokens."
            )
        if window and chunk and self.layer_types is None:
            raise ValueError(
                f"local_attention gives both sliding_window ({window}) and "
                f"attention_chunk_size ({chunk}); add layer_types to say which layer uses which."
            )
        if self.attention_sinks and window is None:
            raise ValueError(
                f"attention_sinks ({self.attention_sinks}) go with sliding_window only; "
                "remove them or replace attention_chunk_size by sliding_window."
            )
        chosen = [
            name
            for name in ("full_attention_every", "full_attention_layers", "layer_types")
            if getattr(self, name) is not None
        ]
        if len(chosen) > 1:
            raise ValueError(f"local_attention gives {' and '.join(chosen)}; keep one of them.")
        for kind, key in (
            ("sliding_attention", "sliding_window"),
            ("chunked_attention", "attention_chunk_size"),
        ):
            if kind in (self.layer_types or ()) and getattr(self, key) is None:
                raise ValueError(f"layer_types names {kind}, but {key} is not given.")
        if self.attention_sinks and "chunked_attention" in (self.layer_types or ()):
            raise ValueError(
                f"attention_sinks ({self.attention_sinks}) do not go with chunked layers; "
                "remove the sinks or the chunked layers."
            )
        return self

    def rules(self, layers: int) -> tuple[LayerRule, ...]:
        """One rule for each of ``layers`` decoder layers.

        Raises ``ValueError`` when a named layer does not exist or ``layer_types`` has another
        length.
        """
        return tuple(self._rule(kind) for kind in self._kinds(layers))

    def _kinds(self, layers: int) -> Sequence[Kind]:
        if self.layer_types is not None:
            if len(self.layer_types) != layers:
                raise ValueError(
                    f"layer_types has {len(self.layer_types)} entries, but the model has "
                    f"{layers} layers; give one entry for each layer."
                )
            return self.layer_types
        local: Kind = "sliding_attention" if self.sliding_window else "chunked_attention"
        full = set(self.full_attention_layers or ())
        if stray := sorted(index for index in full if not 0 <= index < layers):
            raise ValueError(
                f"full_attention_layers names layer {stray[0]}, but the model's layers are "
                f"0 to {layers - 1}."
            )
        if every := self.full_attention_every:
            full = set(range(every - 1, layers, every))
        return [("full_attention" if index in full else local) for index in range(layers)]

    def _rule(self, kind: Kind) -> LayerRule:
        if kind == "sliding_attention":
            assert self.sliding_window is not None
            return LayerRule(kind, self.sliding_window, self.attention_sinks)
        if kind == "chunked_attention":
            assert self.attention_chunk_size is not None
            return LayerRule(kind, self.attention_chunk_size)
        return FULL
