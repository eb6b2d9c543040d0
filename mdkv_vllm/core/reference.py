"""Reference attention over a mixed-dimension cache, in float64: the executable specification.

Slow on purpose. Every kernel is tested against it.
"""

from __future__ import annotations

import torch

from mdkv_vllm.core.basis import Basis, hadamard
from mdkv_vllm.core.formats import PageFormat, Rotation
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.packing import unpack_list


def lease_pages(kv_cache: torch.Tensor, lease_blocks: torch.Tensor) -> torch.Tensor:
    """All pages of a lease in order: uint8 ``[pages, page_bytes]`` (a copy).

    Args:
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        lease_blocks: block ids of the lease, integer ``[n]``.
    """
    pages = kv_cache[lease_blocks.long()].flatten(0, 1)
    return pages.contiguous().view(pages.shape[0], -1).view(torch.uint8)


def read_page_table(pages: torch.Tensor, layout: LeaseLayout) -> torch.Tensor:
    """The page table at the start of a lease: int32 ``[layers, kv_heads, formats, 2]``."""
    layers, heads, formats, _ = layout.table_shape
    raw = pages[: layout.table_pages].flatten()[: layers * heads * formats * 8]
    return raw.view(torch.int32).view(layout.table_shape)


def read_prompt_basis(pages: torch.Tensor, layout: LeaseLayout) -> Basis:
    """The prompt basis stored in a lease."""
    rank, head_size = layout.prompt_basis_rank, layout.geometry.head_size
    first, per_head = layout.basis_first_page, layout.basis_pages_per_head
    raw = pages[first : first + per_head * layout.pages_per_block]
    raw = raw.reshape(layout.pages_per_block, -1).view(layout.geometry.dtype)
    both = raw[:, : 2 * rank * head_size].reshape(
        layout.num_layers, layout.num_kv_heads, 2, rank, head_size
    )
    both = both.float().transpose(-1, -2)
    return Basis(both[:, :, 0].contiguous(), both[:, :, 1].contiguous())


def to_full(low: torch.Tensor, fmt: PageFormat, directions: torch.Tensor | None) -> torch.Tensor:
    """Bring a format's vectors back to the model's space: float64 ``[tokens, head_size]``.

    Args:
        low: ``[tokens, rank]``.
        fmt: the format.
        directions: basis ``[head_size, rank or more]`` for formats that use one.
    """
    if fmt.rotation is Rotation.BASIS:
        assert directions is not None
        return low.double() @ directions[:, : fmt.rank].double().T.to(low.device)
    if fmt.rotation is Rotation.HADAMARD:
        return low.double() @ hadamard(fmt.rank).double().to(low.device)
    return low.double()


def read_lease(
    kv_cache: torch.Tensor,
    lease_blocks: torch.Tensor,
    layer: int,
    head: int,
    layout: LeaseLayout,
    basis: Basis | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every kept token of one head of a lease, in the model's space.

    Returns:
        float64 keys and values ``[kept tokens, head_size]``.
    """
    pages = lease_pages(kv_cache, lease_blocks)
    table = read_page_table(pages, layout)
    if layout.prompt_basis_rank:
        basis = read_prompt_basis(pages, layout)
    keys, values = [], []
    for column, fmt in enumerate(layout.formats.formats):
        tokens, first = table[layer, head, column].tolist()
        low_k, low_v = unpack_list(
            pages[first : first + fmt.pages(tokens)], tokens, fmt, layout.geometry
        )
        keys.append(to_full(low_k, fmt, basis.keys[layer, head] if basis else None))
        values.append(to_full(low_v, fmt, basis.values[layer, head] if basis else None))
    return torch.cat(keys), torch.cat(values)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of a few query heads over one KV head, in float64.

    Args:
        query: ``[group, head_size]``.
        keys: ``[tokens, head_size]``.
        values: ``[tokens, head_size]``.
        scale: factor of the scores.

    Returns:
        output ``[group, head_size]`` and natural-log sum of exponentials ``[group]``.
    """
    if keys.shape[0] == 0:
        return torch.zeros_like(query).double(), query.new_full((query.shape[0],), -torch.inf)
    scores = query.double() @ keys.double().T * scale
    return scores.softmax(-1) @ values.double(), scores.logsumexp(-1)


def leases_of(leases: torch.Tensor, row: int) -> list[tuple[int, int]]:
    """First block of each lease of a row, and the one behind its last.

    Args:
        leases: int32 ``[rows, max_leases, 2]``; 0, 0 behind a row's last lease.
        row: which.
    """
    return [(first, end) for first, end in leases[row].tolist() if end > 0]


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
    """Attention of single-token queries over full blocks and leases.

    Args:
        query: ``[queries, query_heads, head_size]``.
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        layer: the layer to attend in.
        layout: what leases look like.
        block_table: int32 ``[rows, max_blocks]``.
        query_rows: int32 ``[queries]``, the block-table row of each query.
        lengths: int32 ``[queries]``, keys visible to each query counted from position 0; a query
            of length 0 gives zeros and minus infinity, and its row is not looked at.
        leases: int32 ``[rows, max_leases, 2]``: of each lease of a row, in the order of their
            tokens, its first block and the one behind its last; 0, 0 behind the last lease. What
            follows the last lease's blocks is at full dimension.
        basis: calibrated basis, where formats use one and it is not the prompt's own.
        scale: factor of the scores.

    Returns:
        float64 outputs ``[queries, query_heads, head_size]`` and lse ``[queries, query_heads]``.
    """
    heads, head_size = layout.num_kv_heads, layout.geometry.head_size
    block_size = layout.geometry.block_size
    outputs = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    group = query.shape[1] // heads
    for index, (row, length) in enumerate(zip(query_rows.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            continue
        held = leases_of(leases, row)
        tail = held[-1][1] if held else 0
        positions = torch.arange(tail * block_size, max(length, tail * block_size))
        blocks = block_table[row].long()[positions // block_size]
        for head in range(heads):
            slots = kv_cache[blocks, layer * heads + head, positions % block_size]
            tokens = [
                read_lease(kv_cache, block_table[row, first:end], layer, head, layout, basis)
                for first, end in held
            ]
            tokens.append((slots[:, :head_size].double(), slots[:, head_size:].double()))
            keys, values = (torch.cat(side) for side in zip(*tokens, strict=True))
            mine = slice(head * group, (head + 1) * group)
            outputs[index, mine], lse[index, mine] = attend(query[index, mine], keys, values, scale)
    return outputs, lse
