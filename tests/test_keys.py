"""API keys and their token rates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import AppConfig
from serve_app.errors import ConfigError, Overloaded, Unauthorized
from serve_app.keys import KEYS_VARIABLE, KeyRing, TokenBucket, check_exposure, hash_key

TEXT = f"""
# who    what
alice    {hash_key("key of alice")}    100
bob      {hash_key("key of bob").upper()}   # no limit
"""


def test_a_known_key_has_its_name() -> None:
    ring = KeyRing.parse(TEXT)
    assert ring.names == ("alice", "bob")
    assert ring.check("Bearer key of alice").name == "alice"
    assert ring.check("bearer  key of bob ").name == "bob"


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "Bearer", "Bearer ", "key of alice", "Basic key of alice"),
        *("Bearer key of Alice", "Bearer key of alicekey of alice", "Bearer é\ud800"),
        f"Bearer {hash_key('key of alice')}",  # the file's contents open nothing
    ],
)
def test_anything_else_is_refused_in_the_same_words(header: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        KeyRing.parse(TEXT).check(header)
    assert str(caught.value) == (
        "The API key is missing or not known; send it as Authorization: Bearer KEY."
    )
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("\nalice", "Line 2 of the API keys has 1 fields"),
        ("alice secret", "write the hash, not the key"),
        (f"al/ice {hash_key('a')}", "has a name that is not"),
        (f"a {hash_key('a')}\na {hash_key('b')}", "Line 2 of the API keys repeats"),
        (f"a {hash_key('a')}\nb {hash_key('a')}", "Line 2 of the API keys repeats"),
        (f"a {hash_key('a')} fast", "a number above 0"),
        (f"a {hash_key('a')} -5", "a number above 0"),
        (f"a {hash_key('a')} nan", "a number above 0"),
        (f"a {hash_key('a')} inf", "a number above 0"),
        (f"a {hash_key('a')} 5 6", "has 4 fields"),
    ],
)
def test_a_wrong_list_is_refused_without_repeating_it(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        KeyRing.parse(text)
    assert "secret" not in str(caught.value)


def test_a_key_is_held_to_its_rate() -> None:
    ring = KeyRing.parse(TEXT)
    alice, bob = ring.check("Bearer key of alice"), ring.check("Bearer key of bob")
    ring.charge(alice, 6000, now=0.0)  # the minute that an idle key saved
    with pytest.raises(Overloaded, match="alice has used up its 100 tokens per second") as caught:
        ring.charge(alice, 250, now=1.0)
    assert caught.value.retry_after == 2.0
    with pytest.raises(Overloaded):
        ring.charge(alice, 250, now=2.49)
    ring.charge(alice, 250, now=2.5)
    ring.charge(bob, 10**9, now=0.0)


def test_a_refund_counts_at_once_and_never_beyond_the_reserve() -> None:
    ring = KeyRing.parse(TEXT)
    alice = ring.check("Bearer key of alice")
    ring.charge(alice, 6000, now=0.0)
    ring.refund(alice, 3000)
    ring.charge(alice, 3000, now=0.0)
    ring.refund(alice, 10**9)
    ring.charge(alice, 6000, now=0.0)
    with pytest.raises(Overloaded):
        ring.charge(alice, 1, now=0.0)


def test_a_request_beyond_the_reserve_is_slowed_down_not_shut_out() -> None:
    bucket = TokenBucket(tokens_per_s=10, reserve=100)
    assert bucket.take(1000, now=0.0) == 0
    assert bucket.take(1, now=0.0) == pytest.approx(90.1)
    assert bucket.take(1, now=90.1) == 0


@pytest.mark.parametrize("gateways", [1, 3])
def test_gateways_share_a_rate(gateways: int) -> None:
    rings = [KeyRing.parse(TEXT, gateways) for _ in range(gateways)]
    alice = rings[0].check("Bearer key of alice")
    taken = 0
    for second in range(600):
        for ring in rings:
            try:
                ring.charge(alice, 20, now=float(second))
            except Overloaded:
                continue
            taken += 20
    assert taken <= 100 * 600 + 6000


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 500))), st.floats(1, 1000))
def test_no_more_than_rate_and_reserve_is_ever_taken(
    asks: list[tuple[float, int]], rate: float
) -> None:
    bucket = TokenBucket(rate, reserve=500)
    now, taken = 0.0, 0
    for gap, tokens in asks:
        now += gap
        wait = bucket.take(tokens, now)
        if wait == 0:
            taken += tokens
        else:
            assert 0 < wait < math.inf
    assert taken <= 500 + rate * now + 1e-3


def config(**gateway: object) -> AppConfig:
    return AppConfig.model_validate(
        {
            "model": "m",
            "served_model_name": "m",
            "device": "cpu",
            "gateway": gateway,
            "pools": {"only": {"max_model_len": 64}},
        }
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    check_exposure(host, config())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.example"])
def test_others_need_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"{host}.*no API keys"):
        check_exposure(host, config())
    monkeypatch.setenv(KEYS_VARIABLE, f"alice {hash_key('k')}")
    check_exposure(host, config())


def test_a_keys_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none cannot be read"):
        check_exposure("0.0.0.0", config(api_keys_file=str(tmp_path / "none")))
