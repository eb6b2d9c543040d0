"""Float64 attention on any device: the specification, fast enough for long contexts."""

from __future__ import annotations

import torch

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.packing import unpack_list
from mdkv_vllm.core.reference import (
    attend,
    leases_of,
    read_page_table,
    read_prompt_basis,
    to_full,
)


def mixed_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    layout: LeaseLayout,
    block_table: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    leases: torch.Tensor,
    basis: Basis | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of single-token queries; arguments as in ``core.reference.mixed_decode``.

    A query of length 0 gives zeros and minus infinity, and its row is not looked at.

    Returns:
        float64 outputs ``[queries, query_heads, head_size]`` and lse ``[queries, query_heads]``.
    """
    heads, group = layout.num_kv_heads, query.shape[1] // layout.num_kv_heads
    outputs = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64, device=query.device)
    for index, (row, length) in enumerate(zip(query_rows.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            continue
        held = leases_of(leases, row)
        tail = held[-1][1] if held else 0
        keys, values = _tail(kv_cache, layer, layout, block_table[row], tail, length)
        parts = [[(keys[head], values[head]) for head in range(heads)]]
        parts += [
            _lease(kv_cache, block_table[row, first:end], layer, layout, basis)
            for first, end in held
        ]
        for head in range(heads):
            own = [part[head] for part in parts]
            keys, values = (torch.cat(side) for side in zip(*own, strict=True))
            mine = slice(head * group, (head + 1) * group)
            outputs[index, mine], lse[index, mine] = attend(query[index, mine], keys, values, scale)
    return outputs, lse


def _tail(
    kv_cache: torch.Tensor,
    layer: int,
    layout: LeaseLayout,
    blocks: torch.Tensor,
    first: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full tokens from a block on: float64 keys and values ``[kv_heads, tokens, head_size]``."""
    block_size, heads = layout.geometry.block_size, layout.num_kv_heads
    last = max(first, -(-length // block_size))
    pages = kv_cache[blocks[first:last].long(), layer * heads : (layer + 1) * heads]
    slots = pages.transpose(0, 1).flatten(1, 2)[:, : max(length - first * block_size, 0)].double()
    return slots[..., : layout.geometry.head_size], slots[..., layout.geometry.head_size :]


def _lease(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    layer: int,
    layout: LeaseLayout,
    basis: Basis | None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Kept tokens of each head: float64 keys and values ``[tokens, head_size]``."""
    pages = kv_cache[blocks.long()].view(torch.uint8).flatten(2).flatten(0, 1)
    table = read_page_table(pages, layout)[layer].tolist()
    if layout.prompt_basis_rank:
        basis = read_prompt_basis(pages, layout)
    kept = []
    for head, lists in enumerate(table):
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for fmt, (tokens, first) in zip(layout.formats.formats, lists, strict=True):
            if tokens == 0:
                continue
            low = unpack_list(
                pages[first : first + fmt.pages(tokens)], tokens, fmt, layout.geometry
            )
            for side, vectors, full in (("keys", low[0], keys), ("values", low[1], values)):
                directions = getattr(basis, side)[layer, head] if basis else None
                full.append(to_full(vectors, fmt, directions))
        nothing = [torch.empty(0, layout.geometry.head_size, device=pages.device).double()]
        kept.append((torch.cat(keys or nothing), torch.cat(values or nothing)))
    return kept
