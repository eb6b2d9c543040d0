"""A request whose segments are compressed as its tokens are computed, as the server does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import CompressedSegment, Compressor
from mdkv_vllm.core.formats import Rotation
from mdkv_vllm.core.packing import unpack_list
from mdkv_vllm.core.plan import RequestPlan, may_share
from mdkv_vllm.core.reference import read_page_table, read_prompt_basis, to_full
from mdkv_vllm.core.segment import Segment, SharedSegment
from mdkv_vllm.eval.held_request import HeldRequest
from mdkv_vllm.models.held_cache import HeldCache, Prefill, full_cache
from mdkv_vllm.models.in_process import InProcessModel


@dataclass(frozen=True)
class SegmentedRequest(HeldRequest):
    """A request that follows a plan: each segment is compressed at the very token it is due.

    Later tokens read its lease, so a prompt of several segments is computed in chunks that end
    where one is due.

    Attributes:
        plan: its segments.
        compressor: compresses them.
        queries: of the last tokens computed, those from where the next segment's window may begin
            at the latest; ``[layers, query_heads, tokens, head_size]``.
        compressed: segments of its own that are compressed, the first ones.
    """

    plan: RequestPlan
    compressor: Compressor
    queries: torch.Tensor
    compressed: int = 0

    @classmethod
    def begin(
        cls, model: InProcessModel, prefill: Prefill, plan: RequestPlan, compressor: Compressor
    ) -> SegmentedRequest:
        """A request that has computed its prompt.

        Args:
            model: the model.
            prefill: the prompt, or one that begins with it and whose own request comes later,
                computed in one piece with everything held: tokens up to where
                the first segment is due are taken from there. With the queries of its window at
                least where it has one segment, and all otherwise.
            plan: the request's plan.
            compressor: compresses its segments.
        """
        first = min(next(plan.segments()).due_at, plan.prompt_tokens)
        before = prefill.num_tokens - prefill.queries.shape[2]
        full = full_cache(prefill).first(first)
        held = HeldCache(
            full.keys.float(), full.values.float(), full.kept, 1.0,
            _at_full_size(full.kept, compressor),
        )  # fmt: skip
        queries = prefill.queries[:, :, : max(0, first - before)]
        request = cls(model, held, prefill.logits, plan, compressor, queries)._compress()
        rest = prefill.token_ids[first : plan.prompt_tokens]
        return request._computed(rest, every_logit=False)[0] if rest else request

    @property
    def for_others(self) -> tuple[SharedSegment, ...]:
        """Segments whose leases a later request may read, from its first token on."""
        terms, done = self.plan.terms, islice(self.plan.segments(), self.compressed)
        own = takewhile(lambda one: may_share(one, terms), done)
        return (*self.plan.shared, *(one.for_others for one in own))

    def followed_by(self, token_ids: Sequence[int], plan: RequestPlan) -> SegmentedRequest:
        """A later request that reads this one's leases and computes the rest of its prompt.

        Args:
            token_ids: its prompt, which begins with this one's.
            plan: its plan, behind :attr:`for_others`.
        """
        known = plan.first_own_block * plan.terms.block_size
        request = replace(
            self, plan=plan, cache=self.cache.first(known), queries=self.queries[:, :, :0],
            compressed=0,
        )  # fmt: skip
        return request._computed(token_ids[known:], every_logit=False)[0]

    def only_grows_by(self, tokens: int) -> bool:
        """See :meth:`HeldRequest.only_grows_by`."""
        segment = self._segment
        return segment is None or self.cache.num_tokens + tokens < segment.due_at

    def extend(self, token_ids: Sequence[int]) -> tuple[SegmentedRequest, torch.Tensor]:
        """See :meth:`HeldRequest.extend`."""
        return self._computed(token_ids, every_logit=True)

    @property
    def blocks_held(self) -> int:
        """Blocks of its leases and of everything behind them."""
        own = islice(self.plan.segments(), self.compressed)
        return self._blocks - sum(one.num_freed_blocks for one in (*self.plan.shared, *own))

    @property
    def _blocks(self) -> int:
        return -(-self.cache.num_tokens // self.plan.terms.block_size)

    @property
    def _segment(self) -> Segment | None:
        """The next one to be compressed, if any."""
        return next(islice(self.plan.segments(), self.compressed, None), None)

    def _computed(
        self, token_ids: Sequence[int], every_logit: bool
    ) -> tuple[SegmentedRequest, torch.Tensor]:
        request, rest, logits = self, list(token_ids), []
        while rest:
            segment = request._segment
            room = segment.due_at - request.cache.num_tokens if segment else len(rest)
            some, rest = rest[:room], rest[room:]
            more = self.model.extend(request.cache, some, every_logit)
            logits.append(more.logits)
            queries = torch.cat((request.queries, more.queries), 2)
            request = replace(
                request, cache=more.cache, logits=more.logits[-1], queries=queries
            )._compress()
        return request, torch.cat(logits)

    def _compress(self) -> SegmentedRequest:
        """Compress the next segment if it is due; count the bytes and forget older queries."""
        request, segment, tokens = self, self._segment, self.cache.num_tokens
        if segment is not None and segment.due_at == tokens:
            span = slice(segment.first_token, segment.ripe_at)
            first = self.queries.shape[2] - (tokens - segment.window_start)
            assert first >= 0, "the queries of its window were not kept"
            window = self.queries[:, :, first : first + segment.ripe_at - segment.window_start]
            result = self.compressor.compress(
                lambda layer: (self.cache.keys[layer, :, span], self.cache.values[layer, :, span]),
                window.float(),
                segment,
                keep_allocations=True,
            )
            held = read_back(self.cache, result, segment, self.compressor)
            request = replace(self, cache=held, compressed=self.compressed + 1)
        upcoming = request._segment
        kept = 0 if upcoming is None else max(0, tokens - upcoming.window_start)
        return replace(
            request,
            cache=replace(request.cache, share=request.blocks_held / request._blocks),
            queries=request.queries[:, :, request.queries.shape[2] - kept :],
        )


def read_back(
    held: HeldCache, result: CompressedSegment, segment: Segment, compressor: Compressor
) -> HeldCache:
    """Put every token of a packed lease back in its place.

    Args:
        held: all tokens, the segment's own at full size.
        result: the segment's lease, with the allocations kept.
        segment: which tokens it has.
        compressor: what compressed it.

    Returns:
        The same share as before: it is not known here.
    """
    layout, formats = compressor.layout, compressor.layout.formats
    keys, values = held.keys.clone(), held.values.clone()
    assert held.formats is not None
    kept, chosen = held.kept.clone(), held.formats.clone()
    basis: Basis | None = compressor.basis
    if layout.prompt_basis_rank:
        basis = read_prompt_basis(result.pages, layout)
    table = read_page_table(result.pages, layout)
    span = slice(segment.first_token, segment.end_token)
    for layer, allocation in enumerate(result.allocations):
        kept[layer, :, span] = allocation.choice >= 0
        chosen[layer, :, span] = allocation.choice + int(formats.drop)
        for head, choice in enumerate(allocation.choice):
            for index, fmt in enumerate(formats.formats):
                count, first = table[layer, head, index].tolist()
                pages = result.pages[first : first + fmt.pages(count)]
                low = unpack_list(pages, count, fmt, layout.geometry)
                places = (choice == index).nonzero().squeeze(1) + segment.first_token
                for full, vectors, side in ((keys, low[0], "keys"), (values, low[1], "values")):
                    directions = None
                    if fmt.rotation is Rotation.BASIS:
                        directions = getattr(basis, side)[layer, head]
                    full[layer, head, places] = to_full(vectors, fmt, directions).float()
    return HeldCache(keys, values, kept, held.share, chosen)


def _at_full_size(kept: torch.Tensor, compressor: Compressor) -> torch.Tensor:
    """Index of the format ``full`` for every token, one past the last where there is none."""
    names = compressor.layout.formats.names
    return torch.full(kept.shape, names.index("full") if "full" in names else len(names))
