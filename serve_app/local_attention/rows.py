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
from typing import Any, TypeVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    max_decode_query_len,
    subclass_attention_backend_with_overrides,
)

from serve_app.errors import LocalAttentionError
from serve_app.local_attention import row_kernels

# Backends whose kernels take rows: varlen queries, one block table row and KV length each.
ROW_BACKENDS = ("CPU_ATTN", "FLASH_ATTN")


Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Lengths = TypeVar("Lengths", int, torch.Tensor)


def most_rows(query_lens: Lengths, chunk: int) -> Lengths:
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
    context = (seq_lens - query_lens).clamp(min=0)
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

        def __init__(self, spec: Any, layer_names: list[str], config: Any, device: Any) -> None:
            super().__init__(spec, layer_names, config, device)
            self.supports_draft_decode_metadata_update = False
            self.decode_query_len = max_decode_query_len(config)
            most = max(
                config.scheduler_config.max_num_seqs,
                config.compilation_config.max_cudagraph_capture_size or 0,
            ) * most_rows(self.decode_query_len, chunk)
            self.buffers: Buffers = (
                torch.zeros(most + 1, dtype=torch.int32, device=device),
                torch.zeros(most, dtype=torch.int32, device=device),
                torch.zeros(most, chunk // spec.block_size, dtype=torch.int32, device=device),
            )

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            batch = common_attn_metadata
            rows_each = (
                most_rows(batch.max_query_len, chunk)
                if batch.max_query_len <= self.decode_query_len
                else 0
            )
            if batch.block_table_tensor.is_cuda:
                filled = self._on_device(batch, rows_each)
            else:
                filled = chunk_rows(
                    batch.query_start_loc,
                    batch.seq_lens,
                    batch.block_table_tensor,
                    chunk,
                    self.kv_cache_spec.block_size,
                    _count(batch, chunk),
                )
            in_rows = batch.replace(
                query_start_loc=filled[0],
                seq_lens=filled[1],
                block_table_tensor=filled[2],
                num_reqs=len(filled[1]),
                max_query_len=min(batch.max_query_len, chunk),
                max_seq_len=min(batch.max_seq_len, chunk),
            )
            # FlashAttention 3's ahead-of-time schedule has room for one row a request.
            self.scheduled = rows_each == 1
            return super().build(common_prefix_len, in_rows, fast_build)

        def _get_scheduler_metadata(self, *, aot_schedule: bool, **kwargs: Any) -> Any:
            # Not by fast_build, which would leave the builder without its window for good.
            scheduled = aot_schedule and self.scheduled
            return super()._get_scheduler_metadata(aot_schedule=scheduled, **kwargs)

        def _on_device(self, batch: CommonAttentionMetadata, rows_each: int) -> Buffers:
            table = batch.block_table_tensor
            size = self.kv_cache_spec.block_size
            if rows_each:
                count = batch.num_reqs * rows_each
                starts, kv_lens, tables = self.buffers
                out = (starts[: count + 1], kv_lens[:count], tables[:count])
            else:
                count = _count(batch, chunk)
                out = (
                    batch.seq_lens.new_empty(count + 1),
                    batch.seq_lens.new_empty(count),
                    table.new_empty(count, chunk // size),
                )
            row_kernels.chunk_rows(
                batch.query_start_loc,
                batch.seq_lens,
                table,
                chunk,
                size,
                rows_each,
                most_rows(batch.max_query_len, chunk),
                out,
            )
            return out

    made: type[AttentionBackend] = subclass_attention_backend_with_overrides(
        f"Chunked{chunk}_",
        backend,
        {
            "get_builder_cls": lambda: ChunkedBuilder,
            # Rows are counted from the host's query lengths.
            "supports_device_cpu_query_lens_mismatch": classmethod(lambda _: False),
        },
    )
    return made


def _count(batch: CommonAttentionMetadata, chunk: int) -> int:
    starts = batch.query_start_loc_cpu
    return int(most_rows(starts[1:] - starts[:-1], chunk).sum())
