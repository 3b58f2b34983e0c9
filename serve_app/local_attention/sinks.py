"""The KV cache of a sliding window whose first tokens stay visible for ever.

vLLM's sliding-window manager frees each block that the window has left. This one keeps the blocks
of the sink tokens, counts them when it admits a request, and takes a prefix-cache hit only where
they are cached along with the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):  # type: ignore[misc]
    """A sliding window of ``sliding_window`` tokens beside the first ``sink_tokens`` tokens."""

    sink_tokens: int

    @property
    def sink_blocks(self) -> int:
        return int(cdiv(self.sink_tokens, self.block_size))

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Blocks that one request may hold: the window's and the sinks', in steps as planned."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(int(window) + self.sink_blocks, int(cdiv(max_model_len, self.block_size)) + 1)


class SinkWindowManager(SlidingWindowManager):  # type: ignore[misc]
    """Holds the window's blocks and the sinks'; frees what lies between."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks between the sinks and the window."""
        del num_prompt_tokens
        gap_end = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        if gap_end > self.sink_blocks:
            self._remove_blocks_in_range(request_id, self.sink_blocks, gap_end)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As for a window, with the sinks of a prefix hit, which the window has left behind."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        kept = self._kept(new_computed_blocks, total_computed_tokens)
        return int(needed + self._get_num_evictable_blocks(kept))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over a prefix hit: the window's blocks and the sinks', null blocks between."""
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
        )
        kept = self._kept(
            new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens
        )
        self.block_pool.touch(kept)
        self.req_to_blocks[request_id][: len(kept)] = kept

    def _kept(self, blocks: Sequence[KVCacheBlock], computed_tokens: int) -> list[KVCacheBlock]:
        """The sink blocks of a prefix hit that a plain window would have skipped."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return list(blocks[: min(self.sink_blocks, skipped)])

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest hit whose window *and* sinks are cached."""
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        sinks: list[Any] = []
        for index in range(min(kv_cache_spec.sink_blocks, max_length // size)):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not cached:
                # Without all sinks only a prefix that lies within the cached ones can hit.
                max_length = index * size
                break
            sinks.append(cached)
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )
        for index, cached in enumerate(sinks[: length // size]):
            for blocks, block in zip(found, cached, strict=True):
                blocks[index] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *args: Any, **kwargs: Any
    ) -> list[bool] | None:
        """Which blocks to hash: the window's at each boundary, and always the sinks'."""
        mask: list[bool] | None = super().reachable_block_mask(
            start_block, end_block, *args, **kwargs
        )
        spec = kwargs["kv_cache_spec"]
        if mask is not None:
            for index in range(start_block, min(end_block, spec.sink_blocks)):
                mask[index - start_block] = True
        return mask


def register() -> None:
    """Tell vLLM which manager serves the spec. Safe to call more than once."""
    # Before ours, or every built-in spec would lose its manager.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        SinkWindowSpec, manager_class=SinkWindowManager, uniform_type_base_spec=SinkWindowSpec
    )
