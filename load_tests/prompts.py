"""Prompts of exact token lengths, made before the run, each with a needle that can be checked.

A prompt is ``Note <salt>. <filler> The access code of <name> is <digits>. <filler> What is the
access code of <name>?``. The salt comes first and is new for each request, so that a prefix cache
answers nothing unless the run asks for it; it is digits of a fixed width, which the tokenizers in
use today count alike whatever the digits.
"""

from __future__ import annotations

import json
import math
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from load_tests.stream import Ask

Count = Callable[[str], int]  # prompt tokens the server makes of a user message, template included

SALT = "000000000000"
MOST_CUTS = 24  # looks at a prompt's count before its nearest length will do
NAMES = ("Ada", "Boris", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jana")
ADJECTIVES = ("old", "quiet", "green", "narrow", "bright", "heavy", "early", "distant")
NOUNS = ("river", "garden", "letter", "engine", "market", "bridge", "window", "harbour")
VERBS = ("waits", "turns", "stands", "rests", "begins", "changes", "leans", "returns")
PLACES = ("mill", "coast", "station", "school", "forest", "square", "valley", "tower")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request body in two halves around its salt."""

    length_class: str
    path: str
    head: bytes
    tail: bytes
    tokens: int
    output_tokens: int
    answer: str

    def ask(self, salt: int) -> Ask:
        body = b"%b%012d%b" % (self.head, salt, self.tail)
        return Ask(self.length_class, self.path, body, self.tokens, self.output_tokens, self.answer)


class PromptTooShort(ValueError):
    """The asked length does not hold the salt, the needle and the question."""


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts for one server: ``count`` gives exact lengths, ``seed`` repeats them."""

    model: str
    count: Count
    seed: int = 0
    chat: bool = True
    ignore_eos: bool = True  # vLLM's extension: exact output lengths

    def make(self, name: str, tokens: int, output_tokens: int, *, depth: float = 0.5) -> Prompt:
        """One prompt of ``tokens`` with its needle at ``depth`` (0 first, 1 last).

        Raises:
            PromptTooShort: ``tokens`` cannot hold the fixed parts.
        """
        rng = random.Random(f"{self.seed}/{name}/{tokens}/{depth}")
        who, digits = rng.choice(NAMES), f"{rng.randrange(10_000):04d}"
        text = self._fit(tokens, depth, rng, who, digits)
        body = json.dumps(self._body(text, output_tokens))
        head, _, tail = body.partition(SALT)
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        length = self.count(text)
        return Prompt(name, path, head.encode(), tail.encode(), length, output_tokens, digits)

    def shortest(self) -> int:
        """The fewest tokens that hold salt, needle and question, whatever the name."""
        return max(self.count(assemble("", "", who, "0000")) for who in NAMES)

    def _fit(self, tokens: int, depth: float, rng: random.Random, who: str, digits: str) -> str:
        """Cut the filler where the whole counts ``tokens``: at once for one token a byte, else by
        the secant between a cut too short and one too long; the nearest seen, if none is exact."""
        fixed = self.count(assemble("", "", who, digits))
        if tokens < fixed:
            raise PromptTooShort(
                f"a prompt of {tokens} tokens is too short: salt, needle, question and chat "
                f"template take {fixed}"
            )
        sample = text_of(rng, 1000)
        characters_a_token = len(sample) / (self.count(assemble(sample, "", who, digits)) - fixed)
        cut = round((tokens - fixed) * characters_a_token)
        filler = text_of(rng, 2 * cut + 1000)
        at = filler.rfind(". ", 0, round(cut * depth) + 1) + 2 if depth > 0 else 0
        low, low_count, high, high_count = 0, fixed, len(filler), math.inf
        best, best_miss = "", math.inf
        for _ in range(MOST_CUTS):
            text = assemble(filler[: min(at, cut)], filler[at:cut], who, digits)
            count = self.count(text)
            if abs(count - tokens) < best_miss:
                best, best_miss = text, abs(count - tokens)
            if best_miss == 0 or high - low <= 1:
                break
            if count < tokens:
                low, low_count = cut, count
            else:
                high, high_count = cut, count
            slope = (high - low) / (high_count - low_count) or characters_a_token
            cut = min(max(low + 1, round(low + (tokens - low_count) * slope)), high - 1)
        return best

    def _body(self, text: str, output_tokens: int) -> dict[str, object]:
        return {
            "model": self.model,
            **prompt_field(text, chat=self.chat),
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }


def prompt_field(text: str, *, chat: bool) -> dict[str, object]:
    """The field that carries the prompt in either endpoint's body."""
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


def assemble(before: str, after: str, who: str, digits: str) -> str:
    """Salt, filler with the needle between its halves, question."""
    needle = f"The access code of {who} is {digits}. "
    question = f"\nWhat is the access code of {who}?"
    return f"Note {SALT}. {before}{needle}{after}{question}"


def text_of(rng: random.Random, characters: int) -> str:
    """Filler sentences without a digit, at least ``characters`` long."""
    return "".join(islice(_sentences(rng), characters // 30 + 1))


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        words = (rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PLACES))
        yield "The {} {} {} by the {}. ".format(*words)


def count_bytes(text: str) -> int:
    """Tokens of a byte-level model without a chat template."""
    return len(text.encode())


def server_count(host: str, model: str, headers: dict[str, str], *, chat: bool) -> Count:
    """A `Count` that asks the server: its ``/tokenize`` route or, where it has none, the usage of a
    one-token answer. A byte-level model shows in two look-ups and is counted here from then on."""
    path = "/v1/chat/completions" if chat else "/v1/completions"

    def by_route(text: str) -> int:
        body = {"model": model, **prompt_field(text, chat=chat)}
        return int(fetch(host + "/tokenize", headers, body)["count"])

    def by_usage(text: str) -> int:
        body = {"model": model, "max_tokens": 1, **prompt_field(text, chat=chat)}
        return int(fetch(host + path, headers, body)["usage"]["prompt_tokens"])

    short, long = "The harbour waits. ", "A narrow bridge, 4096 steps, turns by the old mill. "
    count: Count = by_route
    try:
        template = by_route(short) - count_bytes(short)
    except urllib.error.HTTPError as error:
        if error.code not in (404, 405, 501):
            raise
        count = by_usage
        template = by_usage(short) - count_bytes(short)
    if count(long) - count_bytes(long) != template:
        return count
    return lambda text: template + count_bytes(text)


def first_model(host: str, headers: dict[str, str]) -> str:
    """The first name that the server's ``/v1/models`` lists."""
    return str(fetch(host + "/v1/models", headers)["data"][0]["id"])


def fetch(url: str, headers: dict[str, str], body: object = None, timeout_s: float = 60) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)
