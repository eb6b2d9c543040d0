"""Into the spaces of the formats and back: Hadamard transform and principal bases."""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .addresses import lease_page


@triton.jit
def hadamard(vector, SHAPE: tl.constexpr):
    """Multiply by ``core.basis.hadamard``, which is its own inverse, without its matrix.

    Each step adds and subtracts the halves of a block and interleaves the results, so that
    after as many steps as an index has bits every bit was the leading one once.

    Args:
        vector: float32 ``[padded_head]``, zero from the head size on.
    """
    STEPS: tl.constexpr = SHAPE.hadamard_steps
    BLOCK: tl.constexpr = 2**STEPS
    for _ in tl.static_range(STEPS):
        halves = tl.reshape(vector, [SHAPE.padded_head // BLOCK, 2, BLOCK // 2])
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        vector = tl.reshape(tl.join(first + second, first - second), [SHAPE.padded_head])
    return vector * BLOCK**-0.5


@triton.jit
def basis_rows(
    calibrated,
    cache,
    blocks,
    first_block,
    layer,
    head,
    direction,
    held,
    dim,
    SIDE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Some dimensions of some directions of a head's basis of keys (side 0) or values (side 1).

    Args:
        calibrated: pointer to float32 ``[kv_heads, basis_rank, head_size]`` of the layer; not
            read where the basis is the prompt's own.
        cache: pointer to uint8.
        blocks: pointer to the request's int32 row of the block table.
        first_block: where the lease starts in ``blocks``.
        layer: layer of the model.
        head: KV head of the layer.
        direction: numbers of directions, ``[directions]``.
        held: which of them exist.
        dim: dimensions of the head, ``[dims]``; those beyond it are zero.

    Returns:
        float32 ``[directions, dims]``, zero where there is none.
    """
    ROWS_PER_PAGE: tl.constexpr = SHAPE.basis_rows_per_page
    if SHAPE.has_prompt_basis:
        at = SIDE * SHAPE.basis_rank + direction
        first_page = SHAPE.basis_first_page
        first_page += (layer * SHAPE.num_kv_heads + head) * SHAPE.basis_pages_per_head
        page = tl.where(held, first_page + at // ROWS_PER_PAGE, 0)
        address = lease_page(cache, blocks, first_block, page, SHAPE)
        rows = address.to(tl.pointer_type(SHAPE.element)) + at % ROWS_PER_PAGE * SHAPE.head_size
    else:
        rows = calibrated + (head * SHAPE.basis_rank + direction) * SHAPE.head_size
    mask = held[:, None] & (dim < SHAPE.head_size)[None, :]
    return tl.load(rows[:, None] + dim[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def load_basis(
    calibrated,
    cache,
    blocks,
    first_block,
    tail_block,
    layer,
    head,
    SIDE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One head's basis, see :func:`basis_rows`.

    Args:
        first_block: where the only lease starts in ``blocks``; read for a prompt's basis alone.
        tail_block: where leases end; 0 for none, and then a prompt's basis is zero.

    Returns:
        float32 ``[padded_basis, padded_head]``, zero outside.
    """
    RANK: tl.constexpr = SHAPE.basis_rank
    direction = tl.arange(0, SHAPE.padded_basis)
    dim = tl.arange(0, SHAPE.padded_head)
    if SHAPE.has_prompt_basis:
        held = direction < tl.where(tail_block > 0, RANK, 0)
    else:
        held = direction < RANK
    return basis_rows(
        calibrated, cache, blocks, first_block, layer, head, direction, held, dim, SIDE, SHAPE
    )
