"""Chunked attention as virtual rows.

A request whose queries stand at positions ``ctx .. ctx + q - 1`` touches at most
``(q + chunk - 2) // chunk + 1`` chunks. Each becomes one row of the batch, with its own queries,
its own short block table and its own KV length; the kernel then runs plain causal attention. How
many rows a request may need follows from its query length alone, so no sequence length is copied
to the host, and a batch of single-token queries has exactly one row a request: those batches
can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from serve_app.errors import LocalAttentionError

# Backends whose kernels take rows: varlen queries, one block table row and KV length each.
ROW_BACKENDS = ("CPU_ATTN", "FLASH_ATTN")


def most_rows(query_lens: torch.Tensor, chunk: int) -> torch.Tensor:
    """The most chunks that ``query_lens`` consecutive queries touch, wherever they begin."""
    return (query_lens + chunk - 2) // chunk + 1


def chunk_rows(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    chunk: int,
    block_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a batch: query starts ``[count + 1]``, KV lengths ``[count]``, block tables.

    ``count`` is the sum of :func:`most_rows`; rows that the batch does not need are empty.
    """
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    context = seq_lens - query_lens
    per_request = most_rows(query_lens, chunk)
    requests = torch.arange(len(query_lens), device=query_lens.device)
    owner = torch.repeat_interleave(requests, per_request, output_size=count)
    before = torch.cumsum(per_request, 0) - per_request
    nth = torch.arange(count, device=owner.device) - before[owner]
    context, end = context[owner], seq_lens[owner]
    group = context // chunk + nth
    first = torch.minimum(torch.maximum(group * chunk, context), end)
    last = torch.minimum((group + 1) * chunk, end)
    kv_lens = torch.where(last > first, last - group * chunk, 0)
    starts = query_start_loc.new_empty(count + 1)
    starts[:-1] = query_start_loc[:-1][owner] + first - context
    starts[-1] = query_start_loc[-1]
    width = chunk // block_size
    columns = group[:, None] * width + torch.arange(width, device=owner.device)
    columns = columns.clamp(max=block_table.shape[1] - 1)
    return starts, kv_lens.to(seq_lens.dtype), block_table[owner[:, None], columns]


@functools.cache
def chunked_backend(backend: type[AttentionBackend], chunk: int) -> type[AttentionBackend]:
    """``backend`` with metadata in rows of ``chunk`` tokens; its kernels and name stay."""
    if backend.get_name() not in ROW_BACKENDS:
        raise LocalAttentionError(
            f"Chunked attention does not run on the attention backend {backend.get_name()}; "
            "choose FLASH_ATTN or TRITON_ATTN (--attention-backend)."
        )
    underlying: Any = backend.get_builder_cls()

    class ChunkedBuilder(underlying):  # type: ignore[misc]
        # Another group's metadata holds other rows, so none may be borrowed.
        supports_update_block_table = False
        supports_draft_decode_metadata_update = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            # Mixed batches have a data-dependent number of rows.
            support: AttentionCGSupport = underlying.get_cudagraph_support(
                vllm_config, kv_cache_spec
            )
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda one: one.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            batch = _in_rows(common_attn_metadata, chunk, self.kv_cache_spec.block_size)
            return super().build(common_prefix_len, batch, fast_build)

    name = f"Chunked{chunk}_"
    made: type[AttentionBackend] = subclass_attention_backend(name, backend, ChunkedBuilder)
    return made


def _in_rows(batch: CommonAttentionMetadata, chunk: int, block_size: int) -> Any:
    starts_cpu = batch.query_start_loc_cpu
    count = int(most_rows(starts_cpu[1:] - starts_cpu[:-1], chunk).sum())
    starts, kv_lens, table = chunk_rows(
        batch.query_start_loc, batch.seq_lens, batch.block_table_tensor, chunk, block_size, count
    )
    return batch.replace(
        query_start_loc=starts,
        seq_lens=kv_lens,
        block_table_tensor=table,
        num_reqs=count,
        max_query_len=min(batch.max_query_len, chunk),
        max_seq_len=min(batch.max_seq_len, chunk),
    )
