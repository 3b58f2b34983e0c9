"""The flood's arrivals and verdicts, and the models without weights that it can run on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import shape
from benchmarks.flood import Measured, Traffic, Writer, arrivals, table
from benchmarks.session import System
from load_tests.compare import Side
from load_tests.stream import Record
from serve_app.config import load_config

MIX = (Traffic("short", 20.0, (32, 128), 16), Traffic("long", 2.0, (600, 800), 16))


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parent.parent / "benchmarks/configs").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_every_configuration_loads(path: Path) -> None:
    assert load_config(path).pools


def trace(seed: str, salts: int) -> list[tuple[float, bytes]]:
    made = arrivals(MIX, 10.0, Writer("m", 800), seed, random.Random(salts))
    return [(at, ask.body) for at, ask in made]


def test_both_sides_of_a_round_get_the_same_lengths_at_the_same_times() -> None:
    one, other = trace("0/0", salts=1), trace("0/0", salts=2)
    assert [(at, len(body)) for at, body in one] == [(at, len(body)) for at, body in other]
    assert not {body for _, body in one} & {body for _, body in other}
    assert [at for at, _ in one] == sorted(at for at, _ in one)
    assert trace("0/1", salts=1) != one


def test_prompts_keep_to_their_class_and_arrivals_to_their_rate() -> None:
    made = arrivals(MIX, 100.0, Writer("m", 800), "t", random.Random(0))
    for traffic in MIX:
        mine = [ask for _, ask in made if ask.length_class == traffic.name]
        assert len(mine) == pytest.approx(100 * traffic.rate, rel=0.2)
        texts = [len(json.loads(ask.body)["messages"][0]["content"]) for ask in mine]
        assert texts == [ask.prompt_tokens for ask in mine]
        assert traffic.prompt[0] <= min(texts)
        assert max(texts) <= traffic.prompt[1]


def block(side: Side, short_ms: float, long_ms: float, outcome: str = "ok") -> Measured:
    records = []
    for name, ms in (("short", short_ms), ("long", long_ms)):
        record = Record(name, 0.0, 10, outcome=outcome)  # type: ignore[arg-type]
        record.ttft_ms = record.e2e_ms = ms
        records.append(record)
    return Measured(0, side, records, 0.1)


def judged(*blocks: Measured) -> str:
    return table({"A": System("default", "a.yaml"), "B": System("ours", "b.yaml")}, blocks)


def test_the_verdict_follows_both_targets() -> None:
    met = judged(block("A", 500, 1000), block("B", 100, 1200))
    assert "short: TTFT A / B (target at least 5 at p99): 5.00, 5.00, 5.00" in met
    assert met.count(": met.") == 2
    missed = judged(block("A", 499, 1000), block("B", 100, 1201))
    assert missed.count(": MISSED.") == 2


def test_what_failed_is_counted_and_not_timed() -> None:
    shown = judged(block("A", 500, 1000), block("A", 9, 9, "failed"), block("B", 100, 1000))
    assert "| short | A default:a | 2 | 1 | 500 | 500 | 500 |" in shown


@pytest.mark.parametrize("text", ["ours", "theirs:a.yaml", ":a.yaml", "ours:"])
def test_a_system_is_a_kind_and_a_configuration(text: str) -> None:
    with pytest.raises(ValueError, match="is not ours:CONFIG"):
        System.parse(text)


def test_every_id_of_a_shape_has_a_name_and_a_byte_stays_a_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shape.build(tmp_path, shape.TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == shape.TINY["vocab_size"]
    assert tokenizer.encode("hi")[1:] == [ord("h"), ord("i")]
    assert all(tokenizer.decode([number]) for number in range(300, 512))
