"""Blocks of layers with sliding windows, which a model has beside those whose blocks are leases.

They are vLLM's own at full size: what lies before the window is given back, and found by the next
request with the same prefix as long as nobody else has taken it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from mdkv_vllm.plugin.manager import MixedDimManager


@dataclass(frozen=True, kw_only=True)
class WindowedSpec(SlidingWindowSpec):
    """A layer with a sliding window beside layers whose blocks are leases."""

    @classmethod
    def of(cls, spec: SlidingWindowSpec) -> Self:
        """Extend vLLM's own spec of a layer."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(SlidingWindowSpec)})


class WindowedManager(SlidingWindowManager):
    """vLLM's own, that hashes no token computed behind a lease.

    What such a token is depends on what was kept of those before it; a hash says nothing of that.
    """

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash the request's full blocks, but none from its first lease on.

        vLLM may hash a window only before each token at which the same prompt could go on. With a
        lease, that is where it begins.
        """
        leases = MixedDimManager.of_pool(self.block_pool)
        resumed = leases.before_leases(request, request.num_prompt_tokens)
        super().cache_blocks(
            request,
            leases.before_leases(request, num_tokens),
            retention_interval,
            replay_boundaries=(resumed, *replay_boundaries),
        )
