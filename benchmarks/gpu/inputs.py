"""A batch's cache, made on the device: real page tables, random pages of the right structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.formats import PageFormat
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.testing.plans import prompt_segments

from .loads import Holding, Load, layout_of

WINDOW = 16
"""Tokens at the end of every context that stay full."""
POISON = 0xFF
"""Fills what nothing may read: a NaN in every element type and in every scale; -1 in int64."""
CHUNK_BYTES = 256 << 20
CODE_SPREAD = {8: 74.0, 4: 4.6, 2: 1.1}
"""Root mean square of codes that are equally frequent, by bits."""


@dataclass(frozen=True)
class Inputs:
    """Several sets of requests in one cache. Tensors that kernels take are one per set: Triton
    compiles anew for a pointer of other alignment, as the middle of a tensor may have.

    Attributes:
        layout: of the load's layers.
        kv_cache: ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        block_table: int32 ``[sets * batch, blocks]``; -1 for freed blocks.
        leases: int32 ``[sets * batch, max_leases, 2]``.
        lengths: int32 ``[batch]``, the same for every set.
        query_rows: per set int32 ``[batch]``.
        queries: per set ``[batch, q_heads, head_size]``.
        tokens: int64 ``[leases, kv_heads, formats]``, of each list of every request and layer.
        tail_tokens: full tokens of every request.
        basis: calibrated basis, None where no format uses one.
        group: query heads per KV head.
    """

    layout: LeaseLayout
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    leases: torch.Tensor
    lengths: torch.Tensor
    query_rows: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    tokens: torch.Tensor
    tail_tokens: int
    basis: Basis | None
    group: int

    @property
    def sets(self) -> int:
        """Sets of requests."""
        return len(self.queries)

    @property
    def pages(self) -> int:
        """Pages that one call reads from, the last of a list and of the tail included."""
        lists = sum(
            fmt.pages(count)
            for counts in self.tokens.flatten(0, 1).tolist()
            for fmt, count in zip(self.layout.formats.formats, counts, strict=True)
        )
        tail = -(-self.tail_tokens // self.layout.geometry.block_size) * self.layout.num_kv_heads
        return len(self.lengths) * (lists + tail)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one layer's keys and values (with scales) of a set; no unused ones of pages."""
        per_token = torch.tensor([token_bytes(f) for f in self.layout.formats.formats])
        lists = int((self.tokens * per_token).sum())
        slot = self.layout.geometry.page_bytes // self.layout.geometry.block_size
        tail = self.tail_tokens * slot * self.layout.num_kv_heads
        return len(self.lengths) * (lists + tail)

    @property
    def moved_bytes(self) -> int:
        """Bytes that one call has to move.

        ``kv_bytes``, queries and outputs, block ids, page tables, and the basis once.
        """
        query = self.queries[0]
        held = int((self.block_table[0] >= 0).sum())
        per_request = 4 * held + 8 * self.tokens.numel()
        moved = self.kv_bytes + 2 * query.numel() * query.element_size()
        moved += len(self.lengths) * per_request
        if self.basis is not None:
            moved += 2 * self.basis.keys.numel() * self.basis.keys.element_size()
        return moved


def token_bytes(fmt: PageFormat) -> int:
    """Bytes of one token of one head, its two scales included."""
    return 2 * fmt.rank * fmt.bits // 8 + (4 if fmt.quantized else 0)


def list_tokens(
    layout: LeaseLayout, shares: torch.Tensor, lease_blocks: int, span: int
) -> torch.Tensor:
    """Tokens of each list so that a lease is as full as it gets; layers hold the same.

    Args:
        layout: of the load's layers.
        shares: float64 ``[kv_heads, formats]``, tokens relative to each other.
        lease_blocks: blocks of the lease.
        span: tokens that there are; no head holds more.

    Returns:
        int64 ``[kv_heads, formats]``.
    """
    capacity = layout.formats.capacity(torch.device("cpu"))
    pages = layout.list_pages(lease_blocks)

    def scaled(factor: float) -> torch.Tensor:
        most = (span / shares.sum(1, keepdim=True)).clamp_max(factor)
        return (shares * most).long()

    low, high = 0.0, span / float(shares.sum(1).min())
    for _ in range(50):
        middle = (low + high) / 2
        fits = layout.num_layers * int((-(-scaled(middle) // capacity)).sum()) <= pages
        low, high = (middle, high) if fits else (low, middle)
    return scaled(low)


def build(
    load: Load,
    holding: Holding,
    sets: int,
    device: torch.device,
    generator: torch.Generator,
    max_leases: int | None = None,
) -> Inputs:
    """Make a cache and the requests in it.

    Args:
        load: the batch.
        holding: what each request holds.
        sets: disjoint sets of requests.
        device: where.
        generator: of that device.
        max_leases: of a request, as kernels are told; what the load needs unless told.
    """
    heads, layout = load.heads, layout_of(load.heads, holding, load.layers)
    block_size, pages_per_block = layout.geometry.block_size, layout.pages_per_block
    segments = prompt_segments(
        load.tokens, block_size, WINDOW, holding.budget, layout.min_blocks, holding.segment_tokens
    )
    tail = segments[-1].end_block if segments else 0
    columns = [*(range(*one.lease) for one in segments), range(tail, -(-load.tokens // block_size))]
    sizes = [len(some) for some in columns]
    rows, held = sets * load.batch, sum(sizes)
    num_blocks = rows * held + 1
    shape = (num_blocks, pages_per_block, block_size, 2 * heads.head_size)
    kv_cache = torch.empty(shape, dtype=heads.dtype, device=device).normal_(generator=generator)
    ids = torch.randperm(num_blocks, generator=generator, device=device)[1:].view(rows, held)
    tokens = torch.zeros(len(segments), *layout.table_shape[1:3], dtype=torch.int64)
    shares = holding.shares(heads.kv_heads)
    for index, (segment, own) in enumerate(zip(segments, ids.split(sizes, dim=1), strict=False)):
        tokens[index] = list_tokens(layout, shares, segment.num_lease_blocks, segment.span_tokens)
        blocks = own[:, :, None] * pages_per_block
        places = (blocks + torch.arange(pages_per_block, device=device)).flatten(1)
        _write_lists(kv_cache, places, layout, tokens[index], generator)
    block_table = torch.full((rows, columns[-1].stop), -1, dtype=torch.int32, device=device)
    block_table[:, [column for some in columns for column in some]] = ids.int()
    leases = torch.zeros(rows, max_leases or max(len(segments), 1), 2, dtype=torch.int32)
    for index, segment in enumerate(segments):
        leases[:, index] = torch.tensor(segment.lease)
    every_row = torch.arange(rows, dtype=torch.int32, device=device).view(sets, load.batch)
    query = (load.batch, heads.q_heads, heads.head_size)
    return Inputs(
        layout,
        kv_cache,
        block_table,
        leases.to(device),
        torch.full((load.batch,), load.tokens, dtype=torch.int32, device=device),
        tuple(row.clone() for row in every_row),
        tuple(
            torch.empty(query, dtype=heads.dtype, device=device).normal_(generator=generator)
            for _ in range(sets)
        ),
        tokens,
        load.tokens - tail * block_size,
        _random_basis(layout, device, generator),
        heads.group,
    )


def _random_basis(
    layout: LeaseLayout, device: torch.device, generator: torch.Generator
) -> Basis | None:
    if not layout.formats.uses_basis:
        return None
    size, rank = layout.geometry.head_size, layout.formats.basis_rank
    shape = 2, layout.num_layers, layout.num_kv_heads, size, size
    square = torch.empty(shape, device=device)
    keys, values = torch.linalg.qr(square.normal_(generator=generator))[0][..., :rank].unbind(0)
    return Basis(keys.contiguous(), values.contiguous())


def _write_lists(
    kv_cache: torch.Tensor,
    places: torch.Tensor,
    layout: LeaseLayout,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Write page tables and quantized pages, and poison what no list has.

    Pages of elements are left as they are, filled with normal numbers.

    Args:
        kv_cache: the cache.
        places: int64 ``[rows, lease pages]``, where each page of each lease is in the cache.
        layout: of the load's layers.
        tokens: int64 ``[kv_heads, formats]``.
        generator: of the cache's device.
    """
    pages = kv_cache.view(torch.uint8).view(-1, layout.geometry.page_bytes)
    table = layout.page_table(tokens.expand(layout.num_layers, -1, -1))
    used = torch.zeros(places.shape[1], dtype=torch.bool)
    used[: layout.table_pages] = True
    raw = torch.full((layout.table_pages, pages.shape[1]), POISON, dtype=torch.uint8)
    entries = table.contiguous().view(torch.uint8).flatten()
    raw.view(-1)[: entries.numel()] = entries
    pages[places[:, : layout.table_pages]] = raw.to(pages.device)
    for column, fmt in enumerate(layout.formats.formats):
        for count, first in table[:, :, column].flatten(0, 1).tolist():
            last = first + fmt.pages(count)
            used[first:last] = True
            if fmt.quantized:
                _write_codes(pages, places[:, first:last].flatten(), fmt, generator)
    unused = places[:, (~used).to(places.device)].flatten()
    for chunk in unused.split(max(1, CHUNK_BYTES // pages.shape[1])):
        pages.view(torch.int64)[chunk] = -1


def _write_codes(
    pages: torch.Tensor, places: torch.Tensor, fmt: PageFormat, generator: torch.Generator
) -> None:
    """Random codes, with scales that make them numbers of about 1."""
    for chunk in places.split(max(1, CHUNK_BYTES // pages.shape[1])):
        raw = torch.empty(len(chunk), pages.shape[1], dtype=torch.uint8, device=pages.device)
        raw.random_(0, 256, generator=generator)
        if fmt.bits == 8:
            raw.clamp_(min=1)  # no packer writes a code of 0
        scales = torch.empty(len(chunk), 2 * fmt.tokens_per_page, device=pages.device)
        scales.uniform_(0.5, 1.5, generator=generator).div_(CODE_SPREAD[fmt.bits])
        end = fmt.scales_offset + 4 * fmt.tokens_per_page
        raw[:, fmt.scales_offset : end] = scales.bfloat16().view(torch.uint8)
        # Eight bytes at a time; pages are whole in them.
        pages.view(torch.int64)[chunk] = raw.view(torch.int64)
