"""What local attention must compute, by the longest way: an explicit mask in plain PyTorch.

The Hugging Face model runs on the CPU in float32 with eager attention and no KV cache, and each
layer's mask is replaced by the boolean matrix of its ``LayerRule``. No code is shared with the
plugin, which is tested against this; ``test_reference.py`` tests this against Hugging Face's own
sliding and chunked masks, and against ``LayerRule.sees``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from serve_app.pattern import LayerRule


@dataclass(frozen=True)
class Answer:
    """What one request must return; logprobs are natural logarithms."""

    prompt_logprobs: list[float]  # of prompt[1:], each given all before it
    tokens: list[int]  # greedy
    logprobs: list[float]  # of ``tokens``
    margins: list[float]  # by how much each of ``tokens`` beat the second best


def mask(rule: LayerRule, length: int) -> torch.Tensor:
    """``[length, length]`` booleans: may the query (row) see the key (column)?"""
    query = torch.arange(length)[:, None]
    key = torch.arange(length)[None, :]
    seen = key <= query
    if rule.kind == "sliding_attention":
        seen &= (query - key < rule.span) | (key < rule.sinks)
    elif rule.kind == "chunked_attention":
        seen &= query // rule.span == key // rule.span
    return seen


class Reference:
    """One checkpoint, loaded once; every call takes the rules to apply."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        ).eval()
        self._masks: list[torch.Tensor] | None = None
        attentions = [
            module
            for module in self.model.modules()
            if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
        ]
        assert len(attentions) == self.model.config.num_hidden_layers
        for module in attentions:
            module.register_forward_pre_hook(self._set_mask, with_kwargs=True)

    def logprobs(self, tokens: Sequence[int], rules: Sequence[LayerRule] | None) -> torch.Tensor:
        """``[len(tokens), vocab]``: row ``i`` is the distribution of token ``i + 1``.

        Without ``rules`` the model's own masks apply. Feed it a prompt and an engine's answer
        together to judge the answer token by token.
        """
        if rules is not None and len(rules) != self.model.config.num_hidden_layers:
            raise ValueError(f"{len(rules)} rules for {self.model.config.num_hidden_layers} layers")
        self._masks = None
        if rules is not None:
            distinct = {rule: self._additive(rule, len(tokens)) for rule in set(rules)}
            self._masks = [distinct[rule] for rule in rules]
        with torch.no_grad():
            logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return torch.log_softmax(logits, dim=-1)

    def answer(
        self, prompt: Sequence[int], rules: Sequence[LayerRule] | None, new_tokens: int = 16
    ) -> Answer:
        """Every prompt token's logprob and ``new_tokens`` greedy tokens, end-of-text ignored."""
        table = self.logprobs(prompt, rules)
        prompt_logprobs = table[:-1].gather(1, torch.tensor(list(prompt[1:]))[:, None])[:, 0]
        tokens, logprobs, margins = list(prompt), [], []
        for _ in range(new_tokens):
            best = table[-1].topk(2)
            tokens.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            margins.append(float(best.values[0] - best.values[1]))
            table = self.logprobs(tokens, rules)
        return Answer(prompt_logprobs.tolist(), tokens[len(prompt) :], logprobs, margins)

    def _additive(self, rule: LayerRule, length: int) -> torch.Tensor:
        hidden = torch.zeros(length, length, dtype=self.model.dtype)
        return hidden.masked_fill(~mask(rule, length), float("-inf"))[None, None]

    def _set_mask(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._masks is None:
            return args, kwargs
        assert "attention_mask" in kwargs
        return args, {**kwargs, "attention_mask": self._masks[int(module.layer_idx)]}
