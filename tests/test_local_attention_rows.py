"""Rows and tables show each query exactly the keys of its rule, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import LocalAttentionError
from serve_app.pattern import LayerRule

pytest.importorskip("vllm")
from serve_app.local_attention.rows import chunk_rows, chunked_backend, most_rows
from serve_app.local_attention.sink_layers import sink_backend, sink_rows, window_rows

BLOCKS = 80  # a request's block table
# (tokens before, new tokens) of each request; a padding request has neither.
REQUESTS = st.lists(
    st.one_of(st.tuples(st.integers(0, 300), st.integers(1, 130)), st.just((0, 0))),
    min_size=1,
    max_size=5,
)


def batch(requests: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query starts, sequence lengths and block tables of blocks that no two requests share."""
    queries = torch.tensor([new for _, new in requests], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0).int()])
    lengths = torch.tensor([before + new for before, new in requests], dtype=torch.int32)
    table = torch.arange(len(requests) * BLOCKS, dtype=torch.int32).view(-1, BLOCKS)
    return starts, lengths, table


def key(request: int, position: int, block_size: int) -> tuple[int, int]:
    """Where a token's key lies: its block and its place there."""
    return request * BLOCKS + position // block_size, position % block_size


def shown(table: list[int], length: int, block_size: int) -> list[tuple[int, int]]:
    return [(table[i // block_size], i % block_size) for i in range(length)]


@given(requests=REQUESTS, block_size=st.sampled_from([8, 16]), blocks=st.integers(1, 5))
def test_chunk_rows(requests: list[tuple[int, int]], block_size: int, blocks: int) -> None:
    chunk = blocks * block_size
    rule = LayerRule("chunked_attention", chunk)
    starts, lengths, table = batch(requests)
    count = int(most_rows(starts[1:] - starts[:-1], chunk).sum())
    rows = chunk_rows(starts, lengths, table, chunk, block_size, count)
    row_starts, kv_lens, tables = (part.tolist() for part in rows)
    assert len(kv_lens) == count
    token = 0
    for request, (before, new) in enumerate(requests):
        for position in range(before, before + new):
            row = max(r for r in range(count) if row_starts[r] <= token)
            # Causal, aligned to the row's end: its last query sees all of its keys.
            seen = kv_lens[row] - (row_starts[row + 1] - 1 - token)
            expected = [
                key(request, j, block_size) for j in range(position + 1) if rule.sees(position, j)
            ]
            assert shown(tables[row], seen, block_size) == expected
            token += 1


@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=5),
    block_size=st.sampled_from([8, 16]),
    longer=st.integers(1, 200),
    sink_blocks=st.integers(1, 4),
)
def test_window_rows(lengths: list[int], block_size: int, longer: int, sink_blocks: int) -> None:
    window, sinks = block_size + longer, sink_blocks * block_size
    rule = LayerRule("sliding_attention", window, sinks)
    _, seq_lens, table = batch([(length, 0) for length in lengths])
    kv_lens, tables = window_rows(seq_lens, table, window, sinks, block_size)
    for request, length in enumerate(lengths):
        if length:
            row = shown(tables[request].tolist(), int(kv_lens[request]), block_size)
            expected = [
                key(request, j, block_size) for j in range(length) if rule.sees(length - 1, j)
            ]
            # The kernel's own window of this many keys cuts the rest.
            assert sorted(row[-(window + sinks) :]) == sorted(expected)


@given(requests=REQUESTS, window=st.integers(1, 90), sinks=st.integers(1, 40))
def test_sink_rows(requests: list[tuple[int, int]], window: int, sinks: int) -> None:
    starts, lengths, _ = batch(requests)
    count = int((starts[1:] - starts[:-1]).clamp(max=sinks + 1).sum())
    rows = sink_rows(starts, lengths, window, sinks, count)
    owner, row_starts, kv_lens = (part.tolist() for part in rows)
    rule = LayerRule("sliding_attention", window, sinks)
    token = 0
    for request, (before, new) in enumerate(requests):
        for position in range(before, before + new):
            row = max(r for r in range(count) if row_starts[r] <= token)
            beside = [
                j for j in range(position + 1) if rule.sees(position, j) and j <= position - window
            ]
            assert owner[row] == request
            assert kv_lens[row] == len(beside)
            token += 1


class ForeignBackend:
    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"


def test_a_backend_without_the_kernels_is_refused_by_name() -> None:
    with pytest.raises(LocalAttentionError, match="FLASHINFER; choose FLASH_ATTN"):
        chunked_backend(ForeignBackend, 64)  # type: ignore[arg-type]
    with pytest.raises(LocalAttentionError, match="FLASHINFER; choose FLASH_ATTN"):
        sink_backend(ForeignBackend, 64, 4)  # type: ignore[arg-type]
