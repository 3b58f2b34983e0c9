"""Records of load tests that never ran, for what is made of them."""

from __future__ import annotations

import random

from load_tests.stream import Record


def answered(name: str, tokens: int, ttft: float, at: float) -> Record:
    record = Record(name, at, tokens, "ok", sent=at, ended=at + 1, status=200)
    record.ttft_ms, record.itl_ms, record.e2e_ms, record.output_tokens = ttft, ttft / 20, 900.0, 32
    return record


def some_records(lengths: dict[str, int], slowest: float) -> list[Record]:
    rng = random.Random(0)
    return [
        answered(name, tokens, rng.uniform(0.1, 1) * slowest * tokens / max(lengths.values()), i)
        for name, tokens in lengths.items()
        for i in range(20)
    ]
