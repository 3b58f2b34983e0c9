"""The index arithmetic of rows and sinks as Triton kernels: one launch a KV group and step.

Each writes what its torch namesake in ``rows`` and ``sink_layers`` returns, into buffers that a
captured CUDA graph reads again at every replay.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton


def chunk_rows(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    chunk: int,
    block_size: int,
    rows_each: int,
    most: int,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill ``out`` (query starts ``[count + 1]``, KV lengths ``[count]``, tables).

    ``rows_each`` rows a request, or 0 for as many as each request's queries need; ``most`` is the
    most that any one needs.
    """
    starts, kv_lens, table = out
    requests = len(seq_lens)
    width = chunk // block_size
    _chunk_rows[(requests, most)](
        query_start_loc,
        seq_lens,
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        starts,
        kv_lens,
        table,
        table.stride(0),
        requests,
        len(kv_lens),
        CHUNK=chunk,
        WIDTH=width,
        ROWS_EACH=rows_each,
        BLOCK_R=triton.next_power_of_2(max(requests, 1)) if rows_each == 0 else 1,
        BLOCK_W=min(triton.next_power_of_2(width), 1024),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _chunk_rows(  # type: ignore[no-untyped-def]
    starts_in,
    seq_lens,
    table_in,
    table_in_stride,
    table_in_columns,
    starts_out,
    kv_lens_out,
    table_out,
    table_out_stride,
    requests,
    count,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS_EACH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    request = tl.program_id(0)
    nth = tl.program_id(1)
    start = tl.load(starts_in + request)
    queries = tl.load(starts_in + request + 1) - start
    end = tl.load(seq_lens + request)
    context = tl.maximum(end - queries, 0)
    if ROWS_EACH == 0:
        others = tl.arange(0, BLOCK_R)
        earlier = others < request
        after = tl.load(starts_in + others + 1, mask=earlier, other=0)
        lens = after - tl.load(starts_in + others, mask=earlier, other=0)
        before = tl.sum(tl.where(earlier, (lens + CHUNK - 2) // CHUNK + 1, 0))
        needed = (queries + CHUNK - 2) // CHUNK + 1
    else:
        before = request * ROWS_EACH
        needed = ROWS_EACH
    row = before + nth
    if nth < needed and row < count:
        group = context // CHUNK + nth
        first = tl.minimum(tl.maximum(group * CHUNK, context), end)
        last = tl.minimum((group + 1) * CHUNK, end)
        tl.store(starts_out + row, start + tl.maximum(first - context, 0))
        tl.store(kv_lens_out + row, tl.where(last > first, last - group * CHUNK, 0))
        if row == count - 1:
            tl.store(starts_out + count, tl.load(starts_in + requests))
        for base in range(0, WIDTH, BLOCK_W):
            column = base + tl.arange(0, BLOCK_W)
            inside = column < WIDTH
            source = tl.minimum(group * WIDTH + column, table_in_columns - 1)
            block = tl.load(table_in + request * table_in_stride + source, mask=inside, other=0)
            tl.store(table_out + row * table_out_stride + column, block, mask=inside)


def window_rows(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window: int,
    sinks: int,
    block_size: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Fill ``out`` (KV lengths ``[requests]``, tables) for one query a request."""
    kv_lens, table = out
    width = table.shape[1]
    _window_rows[(len(seq_lens),)](
        seq_lens,
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        kv_lens,
        table,
        table.stride(0),
        WINDOW=window,
        SINKS=sinks,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCK_W=min(triton.next_power_of_2(width), 1024),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _window_rows(  # type: ignore[no-untyped-def]
    seq_lens,
    table_in,
    table_in_stride,
    table_in_columns,
    kv_lens_out,
    table_out,
    table_out_stride,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    request = tl.program_id(0)
    end = tl.load(seq_lens + request)
    sink_blocks: tl.constexpr = SINKS // BLOCK_SIZE
    gap = end > WINDOW + SINKS
    first = tl.where(gap, (end - WINDOW) // BLOCK_SIZE, 0)
    shift = tl.where(gap, first - sink_blocks, 0)
    tl.store(kv_lens_out + request, end - shift * BLOCK_SIZE)
    for base in range(0, WIDTH, BLOCK_W):
        column = base + tl.arange(0, BLOCK_W)
        inside = column < WIDTH
        moved = tl.where(column == 0, first, tl.where(column <= sink_blocks, column - 1, column))
        moved = tl.where(column > sink_blocks, column + shift, moved)
        source = tl.minimum(tl.where(gap, moved, column), table_in_columns - 1)
        block = tl.load(table_in + request * table_in_stride + source, mask=inside, other=0)
        tl.store(table_out + request * table_out_stride + column, block, mask=inside)
