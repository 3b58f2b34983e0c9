"""API keys: who may ask, under which name, and how many tokens a second.

Keys are kept as SHA-256 hashes, one on each line, and never as text::

    # name   hash of the key, 64 digits   tokens per second, if limited
    alice    5f3a...                      5000
    batch    c1d9...

``printf %s "$KEY" | sha256sum`` prints such a hash. A key must be random (``openssl rand -hex
32``): a fast hash is right for those and wrong for passwords.

Usage, in the edge, one ring for each gateway::

    ring = KeyRing.parse(text, gateways=config.gateway.replicas)     # of a file or a variable
    key = ring.check(request.headers.get("authorization"))           # Unauthorized
    ring.charge(key, estimate.total_tokens, now)                     # Overloaded, with retry_after
    ring.refund(key, unused_tokens)                                  # of what it did not take
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Self

from serve_app.config import AppConfig
from serve_app.errors import ConfigError, Overloaded, Unauthorized

KEYS_VARIABLE = "LOCAL_ATTENTION_API_KEYS"  # the same lines, where no file is named
INSECURE_VARIABLE = "LOCAL_ATTENTION_INSECURE"  # set by `local-attention serve --insecure`

_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BURST_S = 60.0  # an idle key saves up the tokens of one minute
_UNKNOWN = "The API key is missing or not known; send it as Authorization: Bearer KEY."


def hash_key(key: str) -> str:
    """What is kept of a key: its SHA-256 in hexadecimal."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. ``tokens_per_s`` is its limit over all gateways, or None. Logs show the name."""

    name: str
    hash: str
    tokens_per_s: float | None = None


class TokenBucket:
    """A rate of tokens with a reserve. Pure: time is an argument.

    What is larger than the reserve is taken from a full bucket and paid off before the next, so
    that long requests are slowed down and never shut out.
    """

    def __init__(self, tokens_per_s: float, reserve: float) -> None:
        self._rate = tokens_per_s
        self._reserve = reserve
        self._level = reserve
        self._at = -math.inf

    def take(self, tokens: float, now: float) -> float:
        """Take tokens and return 0, or take none and return the seconds until it would work."""
        self._fill(now)
        missing = min(tokens, self._reserve) - self._level
        if missing > 1e-6:
            return missing / self._rate
        self._level -= tokens
        return 0.0

    def give_back(self, tokens: float) -> None:
        """Return tokens that were taken and not used."""
        self._level = min(self._reserve, self._level + tokens)

    def _fill(self, now: float) -> None:
        if now > self._at:
            earned = self._rate * (now - self._at)
            self._level = min(self._reserve, self._level + earned)
            self._at = now


class KeyRing:
    """The keys of one gateway, each with its part of the key's rate."""

    def __init__(self, keys: list[ApiKey], gateways: int = 1) -> None:
        self._keys = keys
        self._buckets = {
            key.name: TokenBucket(
                key.tokens_per_s / gateways, _BURST_S * key.tokens_per_s / gateways
            )
            for key in keys
            if key.tokens_per_s is not None
        }

    @classmethod
    def parse(cls, text: str, gateways: int = 1) -> Self:
        """Read keys, one on each line. Raises ``ConfigError`` with the number of a wrong line."""
        keys: list[ApiKey] = []
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split("#")[0].split()
            if not fields:
                continue
            key = _parse_fields(fields, number)
            if any(key.name == other.name or key.hash == other.hash for other in keys):
                raise ConfigError(f"Line {number} of the API keys repeats a name or a hash.")
            keys.append(key)
        if not keys:
            raise ConfigError("The list of API keys is empty; nobody could ask anything.")
        return cls(keys, gateways)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(key.name for key in self._keys)

    def check(self, authorization: str | None) -> ApiKey:
        """The key of an ``Authorization`` header. Raises ``Unauthorized``.

        Every hash is compared to its end, so that time tells nothing.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hash_key(given.strip())
        found = [key for key in self._keys if compare_digest(key.hash, digest)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized(_UNKNOWN)
        return found[0]

    def charge(self, key: ApiKey, tokens: int, now: float) -> None:
        """Take a request's tokens from its key. Raises ``Overloaded`` when they are used up."""
        bucket = self._buckets.get(key.name)
        if bucket is None:
            return
        if wait := bucket.take(tokens, now):
            after = float(max(1, math.ceil(wait)))
            raise Overloaded(
                f"The API key {key.name} has used up its {key.tokens_per_s:g} tokens per second; "
                f"retry in {after:.0f} s.",
                retry_after=after,
            )

    def refund(self, key: ApiKey, tokens: int) -> None:
        """Return what a request was charged for and did not take; nothing where it took more."""
        if (bucket := self._buckets.get(key.name)) is not None:
            bucket.give_back(max(0, tokens))


def read_keys(config: AppConfig) -> KeyRing | None:
    """The ring of the configured file, or else of the environment; None where anybody may ask.

    Raises ``ConfigError``.
    """
    file, gateways = config.gateway.api_keys_file, config.gateway.replicas
    if file is None:
        text = os.environ.get(KEYS_VARIABLE, "")
        return KeyRing.parse(text, gateways) if text else None
    try:
        return KeyRing.parse(Path(file).read_text(encoding="utf-8"), gateways)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file of API keys {file} cannot be read: {error}.") from error


def check_exposure(host: str, config: AppConfig) -> None:
    """Raise ``ConfigError`` where others can reach ``host`` while anybody may ask."""
    if _is_loopback(host) or read_keys(config) is not None:
        return
    raise ConfigError(
        f"The server is to listen on {host}, which others may reach, and no API keys are set. Set "
        f"gateway.api_keys_file or {KEYS_VARIABLE}, or the host 127.0.0.1, or say that it is meant "
        "(--insecure, or insecure: true in args of the deployment file) where something else "
        "guards the port."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse_fields(fields: list[str], number: int) -> ApiKey:
    """One line. Its contents are not repeated in an error: it may hold a key by mistake."""
    if len(fields) not in (2, 3):
        raise ConfigError(
            f"Line {number} of the API keys has {len(fields)} fields, but must have a name, a "
            "hash and, if wanted, tokens per second."
        )
    name, digest = fields[0], fields[1].lower()
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"Line {number} of the API keys has a name that is not 1 to 64 letters, digits, dots, "
            "dashes or underscores."
        )
    if not _HASH.fullmatch(digest):
        raise ConfigError(
            f"Line {number} of the API keys has no SHA-256 hash of 64 hexadecimal digits; "
            "write the hash, not the key."
        )
    return ApiKey(name, digest, _parse_rate(fields[2], number) if len(fields) == 3 else None)


def _parse_rate(text: str, number: int) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(f"Line {number} of the API keys must have a number above 0 as its rate.")
    return rate
