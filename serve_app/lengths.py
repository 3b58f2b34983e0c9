"""How long a request is, without a tokenizer on the path.

Tokens are estimated as bytes of text x a learned number of tokens per byte, one for each class of
script, plus a learned overhead for each message. What cannot be told from a body (the tokenizer,
the chat template) is learned from ``usage.prompt_tokens`` of the answers. Lists of token ids are
exact.

The caller routes with ``Estimate.fit_tokens``, which is padded so that fewer than 1 in 100
requests prove longer, and weighs load with ``Estimate.prompt_tokens``, which is not padded. An
estimate never refuses a request: one that fits no pool goes to the longest, whose engine counts.

Usage, in the shell::

    lengths = LengthEstimator(default_output_tokens=256)    # one for each served model
    estimate = lengths.estimate(body)
    pool = smallest(pool for pool in pools if estimate.fit_tokens <= pool.max_model_len)
    ...
    lengths.observe(estimate, usage["prompt_tokens"])       # once, when the answer carried usage
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Tokens for each unit of a feature before anything is learned: bytes for the scripts, and counts
# for the rest. Typical of vocabularies of 100,000 to 150,000 tokens.
_DEFAULT_RATES = {
    "latin": 0.23,  # words and spaces
    "code": 0.32,  # words between operators and brackets
    "dense": 0.55,  # digits, hexadecimal, base64, minified text: few spaces
    "cjk": 0.28,  # 3 bytes a character
    "other": 0.30,  # every other script, and emoji
    "messages": 5.0,  # what a chat template writes around each message
    "tools": 120.0,  # what a chat template writes around the list of tools
}
_SCRIPTS = ("latin", "code", "dense", "cjk", "other")

# vLLM's default for /v1/completions; /v1/chat/completions may fill the context instead.
_COMPLETION_OUTPUT_TOKENS = 16

_SLICE = 256  # characters looked at together
_SLICES = 160  # slices looked at in one request, spread evenly
_CODE_MARKS = b"{}()[]<>=;_#/\\|&*+$%@^~`"
_DIGITS = b"0123456789"
_SPACES = b" \n\t\r"
_ASCII = bytes(range(0x80))
_CJK_LEADS = bytes(range(0xE3, 0xEE)) + b"\xef"  # kana, ideographs, hangul, full-width forms

_SLOWEST_STEP = 0.04  # an answer's weight once a rate is well known
_WORST_STEP = 8.0  # one answer never changes a rate by more than this factor
_RECENT = 1024  # answers that the margin remembers
_MISS_RATE = 0.004  # of the remembered answers, how many may have proved longer
_SLACK = 256  # tokens added to a length where errors are compared, so that tiny prompts count less
_WARM_UP = 16  # the first answers set the rates; their errors say nothing of later ones
_FIRST_MARGIN = 0.35  # until answers tell
_LEAST_MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class Estimate:
    """The length of one request.

    ``prompt_tokens`` is the expected prompt, all prompts of the request together;
    ``output_tokens`` is the budget of one sequence; ``sequences`` is how many vLLM reserves.
    ``fit_tokens`` is what the longest sequence needs of ``max_model_len``, padded by the margin.
    ``features`` is what the estimate was made of, for ``observe``.
    """

    prompt_tokens: int
    output_tokens: int
    sequences: int
    fit_tokens: int
    exact: bool
    features: Mapping[str, float]

    @property
    def total_tokens(self) -> int:
        """Prompt and output of all sequences."""
        return self.prompt_tokens + self.output_tokens * self.sequences


class LengthEstimator:
    """Learns tokens per byte for one model. Not thread-safe; one for each event loop."""

    def __init__(self, *, default_output_tokens: int = 256) -> None:
        self._default_output = default_output_tokens
        self._rates = dict(_DEFAULT_RATES)
        self._weights = dict.fromkeys(_DEFAULT_RATES, 0.0)  # answers that shaped each rate
        self._errors: deque[float] = deque(maxlen=_RECENT)
        self._answers = 0
        self._margin = _FIRST_MARGIN

    @property
    def margin(self) -> float:
        """The share added to an estimate before it is compared with a limit."""
        return self._margin

    def rate(self, feature: str) -> float:
        """Tokens for each unit of a feature. One that was never seen borrows the others' scale."""
        known = min(1.0, self._weights[feature])
        if known == 1.0 or feature in ("messages", "tools"):
            return self._rates[feature]
        return known * self._rates[feature] + (1 - known) * _DEFAULT_RATES[feature] * self._scale()

    def estimate(self, body: Mapping[str, Any]) -> Estimate:
        """Estimate a parsed body.

        Takes what it understands and never raises: refusing a wrong body is not its work.
        """
        prompt = body.get("prompt")
        if "messages" not in body and isinstance(prompt, list) and prompt:
            if counts := _token_id_counts(prompt):
                return self._exact(counts, body)
            longest = max((len(text) for text in prompt if isinstance(text, str)), default=0)
            share = longest / max(1, sum(len(text) for text in prompt if isinstance(text, str)))
            return self._conclude(_features(body), body, share, prompts=len(prompt))
        return self._conclude(_features(body), body, share=1.0)

    def observe(self, estimate: Estimate, exact_prompt_tokens: int) -> None:
        """Learn from an answer. ``exact_prompt_tokens`` is its ``usage.prompt_tokens``."""
        if estimate.exact or exact_prompt_tokens <= 0 or estimate.prompt_tokens <= 0:
            return
        expected: float = estimate.prompt_tokens
        if self._answers < _WARM_UP:  # it may have been made before anything was learned
            expected = self._tokens(estimate.features)
        self._remember((exact_prompt_tokens - expected) / (expected + _SLACK))
        self._learn(estimate.features, exact_prompt_tokens)

    def _tokens(self, features: Mapping[str, float]) -> float:
        return sum(self.rate(name) * amount for name, amount in features.items() if amount)

    def _scale(self) -> float:
        """How this tokenizer compares with the defaults, over the scripts seen so far."""
        weight = sum(self._weights[script] for script in _SCRIPTS)
        if not weight:
            return 1.0
        return (
            sum(
                self._weights[script] * self._rates[script] / _DEFAULT_RATES[script]
                for script in _SCRIPTS
            )
            / weight
        )

    def _learn(self, features: Mapping[str, float], exact: int) -> None:
        """Move each rate so that the estimate comes nearer, in proportion to its part in it."""
        parts = {name: self.rate(name) * amount for name, amount in features.items() if amount}
        total = sum(parts.values())
        if not total:
            return
        error = min(_WORST_STEP, max(1 / _WORST_STEP, exact / total)) - 1
        squares = sum((part / total) ** 2 for part in parts.values())
        for name, part in parts.items():
            share = part / total
            step = max(_SLOWEST_STEP, 1 / (1 + self._weights[name]))
            rate = self.rate(name)
            self._rates[name] = rate * max(1 / _WORST_STEP, 1 + step * error * share / squares)
            self._weights[name] += share

    def _remember(self, error: float) -> None:
        """Keep an error and set the margin to the largest, all but a few of the recent ones.

        If errors come in no special order, the next is above the k-th largest of n in k of n + 1
        cases: no assumption on their distribution is needed.
        """
        self._answers += 1
        if self._answers == 1:  # how wrong the defaults were says nothing of what was learned
            return
        if self._answers == 2 * _WARM_UP:
            for _ in range(_WARM_UP - 1):
                self._errors.popleft()
        self._errors.append(error)
        count = len(self._errors)
        allowed = int(_MISS_RATE * (count + 1))
        learned = sorted(self._errors, reverse=True)[allowed]
        doubt = _FIRST_MARGIN / count  # a few answers do not prove much
        self._margin = max(_LEAST_MARGIN, learned) + doubt

    def _exact(self, counts: list[int], body: Mapping[str, Any]) -> Estimate:
        output = self._output_tokens(body)
        return Estimate(
            prompt_tokens=sum(counts),
            output_tokens=output,
            sequences=_sequences(body) * len(counts),
            fit_tokens=max(counts) + output,
            exact=True,
            features={},
        )

    def _conclude(
        self,
        features: Mapping[str, float],
        body: Mapping[str, Any],
        share: float,
        prompts: int = 1,
    ) -> Estimate:
        """``share`` is the longest prompt's part of all prompts of the request."""
        expected = self._tokens(features)
        longest = expected * share
        padded = longest + self._margin * (longest + _SLACK)
        output = self._output_tokens(body)
        return Estimate(
            prompt_tokens=max(1, round(expected)),
            output_tokens=output,
            sequences=_sequences(body) * prompts,
            fit_tokens=max(1, int(padded + 1)) + output,
            exact=False,
            features=features,
        )

    def _output_tokens(self, body: Mapping[str, Any]) -> int:
        for key in ("max_completion_tokens", "max_tokens"):
            value = body.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return _COMPLETION_OUTPUT_TOKENS if "prompt" in body else self._default_output


def _sequences(body: Mapping[str, Any]) -> int:
    """Sequences that vLLM reserves for each prompt."""
    counts = (body.get("n"), body.get("best_of"))
    return max(1, *(count for count in counts if isinstance(count, int)), 1)


def _token_id_counts(prompt: list[Any]) -> list[int]:
    """The exact lengths of prompts given as token ids; empty if they are not."""
    if isinstance(prompt[0], int):
        return [len(prompt)]
    if all(isinstance(ids, list) for ids in prompt):
        return [len(ids) for ids in prompt]
    return []


def _features(body: Mapping[str, Any]) -> dict[str, float]:
    """What an estimate is made of: bytes for each script, and counts of messages and tool lists."""
    messages = body.get("messages")
    tools = body.get("tools") or body.get("functions")
    texts = list(_strings(messages if messages is not None else body.get("prompt")))
    if documents := body.get("documents"):
        texts.extend(_strings(documents))
    if isinstance(suffix := body.get("suffix"), str):
        texts.append(suffix)
    features = _scripts("\n".join(texts))
    if tools:  # templates write them as JSON
        for name, amount in _scripts(json.dumps(tools, ensure_ascii=False)).items():
            features[name] += amount
        features["tools"] = 1.0
    if isinstance(messages, list):
        features["messages"] = len(messages) + 1.0  # and the turn that the model begins
    return features


def _strings(value: Any) -> Iterator[str]:
    """Every text below a value, whatever the field is called. A role is the template's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "type", "id", "tool_call_id"):
                yield from _strings(item)


def _scripts(text: str) -> dict[str, float]:
    """UTF-8 bytes of each script. Bytes are counted exactly; their script is sampled."""
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    sampled = dict.fromkeys(_SCRIPTS, 0.0)
    stride = max(_SLICE, len(text) // _SLICES)
    for start in range(0, len(text), stride):
        _add_slice(sampled, text[start : start + _SLICE])
    seen = sum(sampled.values())
    return {name: size * amount / seen if seen else 0.0 for name, amount in sampled.items()}


def _add_slice(sampled: dict[str, float], piece: str) -> None:
    raw = piece.encode("utf-8", "surrogatepass")
    plain = len(raw)
    if not piece.isascii():
        wide = len(raw.translate(None, _ASCII))
        cjk = 3 * (wide - len(raw.translate(None, _ASCII + _CJK_LEADS)))
        sampled["cjk"] += cjk
        sampled["other"] += wide - cjk
        plain -= wide
    if plain:
        sampled[_plain_class(raw, plain)] += plain


def _plain_class(raw: bytes, plain: int) -> str:
    """The class of a slice's ASCII part, by how much of it is digits, spaces and operators."""
    digits = len(raw) - len(raw.translate(None, _DIGITS))
    spaces = len(raw) - len(raw.translate(None, _SPACES))
    if plain >= 64 and (digits > 0.3 * plain or spaces < 0.06 * plain):
        return "dense"
    marks = len(raw) - len(raw.translate(None, _CODE_MARKS))
    return "code" if marks > 0.04 * plain else "latin"
