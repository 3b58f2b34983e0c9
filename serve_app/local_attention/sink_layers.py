"""Exact attention to a window and the first tokens, on each backend's own kernels.

A query at position ``i`` sees the window ``i - window < j <= i`` and the sinks ``j < sinks``.
RoPE is in the cached keys already, so a kernel only needs to be shown the right keys; in which
order does not matter.

One query a request (decode): the block table ``[first window block][sink blocks][other window
blocks]`` leaves the visible keys contiguous at its end, so the kernel's own sliding window of
``window + sinks`` keys is exact, in one pass over few blocks. It needs whole sink blocks and a
window longer than a block.

Otherwise FlashAttention runs twice, over the window and over the sinks, and the parts are merged
by their log-sum-exps; Triton's kernel has a prefix-and-window mask of its own; the CPU gathers
the keys and computes in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from serve_app.errors import LocalAttentionError
from serve_app.local_attention import row_kernels


@dataclass(frozen=True)
class SinkRows:
    """The second pass's batch: which queries see how many of the first tokens."""

    starts: torch.Tensor  # [rows + 1] query starts
    kv_lens: torch.Tensor  # [rows] sinks visible beside the window
    table: torch.Tensor  # [rows, sink blocks]
    max_query_len: int


def window_rows(
    seq_lens: torch.Tensor, block_table: torch.Tensor, window: int, sinks: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """KV lengths and block tables of one query a request, as described above.

    A window that still overlaps the sinks keeps the request's own table.
    """
    sink_blocks = sinks // block_size
    gap = seq_lens > window + sinks
    first = torch.where(gap, (seq_lens - window) // block_size, 0)
    shift = torch.where(gap, first - sink_blocks, 0)
    column = torch.arange(_width(window, sinks, block_size), device=seq_lens.device)
    moved = torch.where(column <= sink_blocks, column - 1, column + shift[:, None])
    moved[:, 0] = first
    source = torch.where(gap[:, None], moved, column).clamp(max=block_table.shape[1] - 1)
    return seq_lens - shift * block_size, block_table.gather(1, source.long())


def sink_rows(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, window: int, sinks: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Owner ``[count]``, query starts ``[count + 1]`` and visible sinks ``[count]`` of each row.

    The query at ``i`` sees ``clamp(i + 1 - window, 0, sinks)`` sinks beside its window, so a
    request needs a row for each number that its queries reach: at most
    ``min(queries, sinks + 1)``, and ``count`` is the sum of those.
    """
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    context = seq_lens - query_lens
    per_request = query_lens.clamp(max=sinks + 1)
    requests = torch.arange(len(query_lens), device=query_lens.device)
    owner = torch.repeat_interleave(requests, per_request, output_size=count)
    before = torch.cumsum(per_request, 0) - per_request
    nth = torch.arange(count, device=owner.device) - before[owner]
    context, end = context[owner], seq_lens[owner]
    seen = (context + 1 - window).clamp(0, sinks) + nth
    first = torch.where(nth == 0, context, seen + window - 1)
    first = torch.where(seen > sinks, end, torch.minimum(torch.maximum(first, context), end))
    starts = query_start_loc.new_empty(count + 1)
    starts[:-1] = query_start_loc[:-1][owner] + first - context
    starts[-1] = query_start_loc[-1]
    return owner, starts, seen.clamp(max=sinks).to(seq_lens.dtype)


def _width(window: int, sinks: int, block_size: int) -> int:
    return sinks // block_size + -(-(window - 1) // block_size) + 1


@functools.cache
def sink_backend(
    backend: type[AttentionBackend], window: int, sinks: int
) -> type[AttentionBackend]:
    """``backend`` for layers with this window and these sinks; its name stays."""
    makers: dict[str, Callable[[], type[Any]]] = {
        "CPU_ATTN": lambda: _cpu_layer(backend, window, sinks),
        "FLASH_ATTN": lambda: _flash_layer(backend, window, sinks),
        "TRITON_ATTN": lambda: _triton_layer(backend, window, sinks),
    }
    name = backend.get_name()
    if name not in makers:
        raise LocalAttentionError(
            f"Attention sinks do not run on the attention backend {name}; choose FLASH_ATTN or "
            "TRITON_ATTN (--attention-backend)."
        )
    layer, builder = makers[name](), _builder(backend, window, sinks)
    made: type[AttentionBackend] = subclass_attention_backend_with_overrides(
        f"Window{window}Sinks{sinks}_",
        backend,
        {"get_impl_cls": lambda: layer, "get_builder_cls": lambda: builder},
    )
    return made


def _builder(backend: type[AttentionBackend], window: int, sinks: int) -> type[Any]:
    underlying: Any = backend.get_builder_cls()
    if backend.get_name() == "CPU_ATTN":
        return underlying  # type: ignore[no-any-return]

    class SinkBuilder(underlying):  # type: ignore[misc]
        supports_update_block_table = False
        supports_draft_decode_metadata_update = False

        def __init__(self, spec: Any, layer_names: list[str], config: Any, device: Any) -> None:
            super().__init__(spec, layer_names, config, device)
            self.supports_draft_decode_metadata_update = False
            size = spec.block_size
            self.scheduled = True
            self.one_pass = sinks % size == 0 and window > size
            most = max(
                config.scheduler_config.max_num_seqs,
                config.compilation_config.max_cudagraph_capture_size or 0,
            )
            # A captured graph reads these again at every replay.
            self.kv_lens = torch.zeros(most, dtype=torch.int32, device=device)
            width = _width(window, sinks, size) if self.one_pass else 0
            self.table = torch.zeros(most, width, dtype=torch.int32, device=device)
            self.prefix_lens = torch.full((most,), sinks, dtype=torch.int32, device=device)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            support: AttentionCGSupport = underlying.get_cudagraph_support(
                vllm_config, kv_cache_spec
            )
            single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, single, key=lambda one: one.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            batch = common_attn_metadata
            decode = batch.max_query_len == 1
            if decode and self.one_pass:
                metadata = super().build(common_prefix_len, self._one_pass(batch), fast_build)
                metadata.sink_rows = None
                return metadata
            # FlashAttention 3's ahead-of-time schedule is for the one pass's window.
            self.scheduled = False
            metadata = super().build(common_prefix_len, batch, fast_build)
            self.scheduled = True
            metadata.sink_rows = self._second_pass(batch, decode)
            metadata.rswa_prefix_lens = self.prefix_lens[: batch.num_reqs]
            metadata.rswa_window = window
            return metadata

        def _get_scheduler_metadata(self, *, aot_schedule: bool, **kwargs: Any) -> Any:
            # Not by fast_build, which would leave the builder without its window for good.
            scheduled = aot_schedule and self.scheduled
            return super()._get_scheduler_metadata(aot_schedule=scheduled, **kwargs)

        def _one_pass(self, batch: CommonAttentionMetadata) -> Any:
            kv_lens = self.kv_lens[: batch.num_reqs]
            table = self.table[: batch.num_reqs]
            size = self.kv_cache_spec.block_size
            row_kernels.window_rows(
                batch.seq_lens, batch.block_table_tensor, window, sinks, size, (kv_lens, table)
            )
            # Not the batch's longest: FlashAttention takes the table's width for it, and its
            # ahead-of-time schedule must do the same to agree whether the window cuts anything.
            width = table.shape[1] * size
            return batch.replace(seq_lens=kv_lens, block_table_tensor=table, max_seq_len=width)

        def _second_pass(self, batch: CommonAttentionMetadata, decode: bool) -> SinkRows:
            blocks = -(-sinks // self.kv_cache_spec.block_size)
            table = batch.block_table_tensor[:, :blocks]
            if decode:
                kv_lens = self.kv_lens[: batch.num_reqs]
                torch.sub(batch.seq_lens, window, out=kv_lens).clamp_(0, sinks)
                return SinkRows(batch.query_start_loc, kv_lens, table, 1)
            starts_cpu = batch.query_start_loc_cpu
            count = int((starts_cpu[1:] - starts_cpu[:-1]).clamp(max=sinks + 1).sum())
            owner, starts, kv_lens = sink_rows(
                batch.query_start_loc, batch.seq_lens, window, sinks, count
            )
            return SinkRows(starts, kv_lens, table[owner], batch.max_query_len)

    return SinkBuilder


def _refuse(backend: str, alibi_slopes: Any, learned_sinks: Any) -> None:
    if alibi_slopes is not None:
        raise LocalAttentionError(
            f"ALiBi's bias goes by distance, which attention_sinks on {backend} do not keep; use "
            "sliding_window without sinks for this model."
        )
    if learned_sinks is not None:
        raise LocalAttentionError(
            "This model has learned sinks of its own, which do not go with attention_sinks; use "
            "sliding_window without sinks."
        )


def _flash_layer(backend: type[AttentionBackend], window: int, sinks: int) -> type[Any]:
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    underlying: Any = backend.get_impl_cls()

    class SinkFlash(underlying):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _refuse("FLASH_ATTN", self.alibi_slopes, self.sinks)
            # One pass sees the window and the sinks as one window.
            self.sliding_window = (window + sinks - 1, 0)

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            if attn_metadata is None or attn_metadata.sink_rows is None:
                done: torch.Tensor = super().forward(
                    layer,
                    query,
                    key,
                    value,
                    kv_cache,
                    attn_metadata,
                    output,
                    output_scale,
                    output_block_scale,
                )
                return done
            tokens = attn_metadata.num_actual_tokens
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            keys = canonicalize_singleton_dim_strides(keys)
            values = canonicalize_singleton_dim_strides(values)
            if is_quantized_kv_cache(self.kv_cache_dtype):
                keys = keys.view(current_platform.fp8_dtype())
                values = values.view(current_platform.fp8_dtype())
            run = functools.partial(
                self._pass, layer, query[:tokens], keys, values, output[:tokens], attn_metadata
            )
            rows = attn_metadata.sink_rows
            near = SinkRows(
                attn_metadata.query_start_loc,
                attn_metadata.seq_lens,
                attn_metadata.block_table,
                attn_metadata.max_query_len,
            )
            near_out, near_lse = run(near, attn_metadata.max_seq_len, True, [window - 1, 0])
            far_out, far_lse = run(rows, sinks, False, None)
            merge_attn_states(output[:tokens], far_out, far_lse, near_out, near_lse)
            return output

        def _pass(
            self,
            layer: Any,
            query: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            like: torch.Tensor,
            metadata: Any,
            rows: SinkRows,
            max_kv_len: int,
            causal: bool,
            band: list[int] | None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            scales = (len(rows.kv_lens), self.num_kv_heads)
            out, lse = flash_attn_varlen_func(
                q=query,
                k=keys,
                v=values,
                out=torch.empty_like(like),
                cu_seqlens_q=rows.starts,
                max_seqlen_q=rows.max_query_len,
                seqused_k=rows.kv_lens,
                max_seqlen_k=max_kv_len,
                softmax_scale=self.scale,
                causal=causal,
                window_size=band,
                block_table=rows.table,
                softcap=self.logits_soft_cap,
                return_softmax_lse=True,
                fa_version=self.vllm_flash_attn_version,
                q_descale=(
                    layer._q_scale.expand(scales) if self.supports_quant_query_input else None
                ),
                k_descale=layer._k_scale.expand(scales),
                v_descale=layer._v_scale.expand(scales),
                num_splits=metadata.max_num_splits,
            )
            return out, lse

    return SinkFlash


def _triton_layer(backend: type[AttentionBackend], window: int, sinks: int) -> type[Any]:
    underlying: Any = backend.get_impl_cls()

    class SinkTriton(underlying):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _refuse("TRITON_ATTN", self.alibi_slopes, self.sinks)

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            one_pass = attn_metadata is not None and attn_metadata.sink_rows is None
            # Else the kernel's own prefix-and-window mask, set in the metadata.
            self.sliding_window = (window + sinks - 1, 0) if one_pass else (-1, -1)
            done: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
            )
            return done

    return SinkTriton


def _cpu_layer(backend: type[AttentionBackend], window: int, sinks: int) -> type[Any]:
    underlying: Any = backend.get_impl_cls()

    class SinkCPU(underlying):  # type: ignore[misc]
        """Gathers each request's visible keys and computes in float32: exact, not fast."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _refuse("CPU_ATTN", self.alibi_slopes, self.sinks)
            if self.is_fp8_kv_cache:
                raise LocalAttentionError(
                    "Attention sinks on the CPU need an unquantised KV cache; set kv_cache_dtype "
                    "to auto."
                )

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            del key, value, output_scale, output_block_scale
            if attn_metadata is None:
                return output
            starts = attn_metadata.query_start_loc.tolist()
            for request, end in enumerate(attn_metadata.seq_lens.tolist()):
                begin, stop = starts[request], starts[request + 1]
                if begin == stop:
                    continue
                positions = torch.arange(end - (stop - begin), end)
                nearest = max(0, int(positions[0]) - window + 1)
                seen = torch.cat([torch.arange(min(sinks, nearest)), torch.arange(nearest, end)])
                keys, values = self._gather(
                    layer, kv_cache, attn_metadata.block_table[request], seen
                )
                mask = (seen <= positions[:, None]) & (
                    (seen > positions[:, None] - window) | (seen < sinks)
                )
                output[begin:stop] = self._attend(query[begin:stop], keys, values, mask)
            return output

        def _gather(
            self, layer: Any, kv_cache: torch.Tensor, table: torch.Tensor, seen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Keys and values ``[KV heads, seen, head size]`` of the tokens ``seen``."""
            size = kv_cache.shape[2]
            blocks, which = torch.unique(seen // size, return_inverse=True)
            order = _stored_order(kv_cache.dtype, size, self.head_size, layer.isa)
            pages = kv_cache[table[blocks].long()].flatten(2)
            both = []
            for half, places in zip(pages.chunk(2, dim=2), order, strict=True):
                tokens = half[:, :, places].unflatten(2, (size, self.head_size))
                both.append(tokens[which, :, seen % size].transpose(0, 1).float())
            return both[0], both[1]

        def _attend(
            self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            shape = query.shape
            query = query.view(shape[0], self.num_kv_heads, -1, self.head_size).float()
            scores = torch.einsum("qhgd,hkd->hgqk", query, keys) * self.scale
            if self.logits_soft_cap:
                scores = torch.tanh(scores / self.logits_soft_cap) * self.logits_soft_cap
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            return torch.einsum("hgqk,hkd->qhgd", weights, values).reshape(shape)

    return SinkCPU


@functools.cache
def _stored_order(
    dtype: torch.dtype, block_size: int, head_size: int, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the CPU kernel stores element ``[token, channel]`` of a block's keys and values.

    Kernels pack blocks each in their own way, so one block of known numbers is stored and read
    back: its two digits, since a bfloat16 holds whole numbers up to 256 only.
    """
    from vllm import _custom_ops as ops

    numbers = torch.arange(block_size * head_size).view(block_size, 1, head_size)
    digits = []
    for digit in (numbers // 256, numbers % 256):
        page = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
        keys, values = page.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digit.to(dtype),
            digit.to(dtype),
            keys,
            values,
            torch.arange(block_size, dtype=torch.int64),
            isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        digits.append(page.view(2, -1).long())
    stored = digits[0] * 256 + digits[1]
    return stored[0].argsort(), stored[1].argsort()
