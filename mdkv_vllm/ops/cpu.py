"""The CPU kernels: full tokens in and out of the cache, packing, and decode attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from mdkv_vllm.core.basis import Basis, hadamard
from mdkv_vllm.core.formats import FormatSet, PageFormat, PageGeometry
from mdkv_vllm.core.layout import LeaseLayout

try:
    import mdkv_vllm._cpu  # noqa: F401  (its import registers the operators)
except ImportError as error:
    raise ImportError(
        "mdkv_vllm's CPU kernels are not built. Build them against the installed torch with "
        "`pip install --no-build-isolation -e .` in the source folder "
        f"(the import failed with: {error})"
    ) from error

for _name in ("store_kv", "load_kv", "mixed_decode", "pack_pages"):
    torch.library.register_fake(f"mdkv::{_name}", lambda *args, **kwargs: None)


def cpu_isas() -> list[str]:
    """Instruction sets that have kernels here, widest first.

    The first is used unless the environment variable ``MDKV_CPU_ISA`` names another.
    """
    return torch.ops.mdkv.cpu_isas()


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write full-dimension tokens into one layer's view of the cache.

    Args:
        key: ``[tokens, kv_heads, head_size]``, last dimension contiguous.
        value: same shape and type.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, keys first; any strides
            but a contiguous last dimension. Rounded to nearest even where its type is narrower.
        slot_mapping: int64 ``[tokens or more]``, ``block * block_size + offset``; a negative
            slot skips its token.
    """
    torch.ops.mdkv.store_kv.default(key, value, kv_cache, slot_mapping)


def load_kv(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    num_tokens: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Gather the first tokens of some blocks of one layer.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        block_ids: int32 or int64 ``[n]``, in token order.
        num_tokens: tokens to read.
        keys: written, ``[kv_heads, num_tokens, head_size]``; any float type.
        values: written, same shape.
    """
    torch.ops.mdkv.load_kv.default(kv_cache, block_ids, num_tokens, keys, values)


def pack_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: torch.Tensor,
    fmt: PageFormat,
    geometry: PageGeometry,
    pages: torch.Tensor,
) -> None:
    """Pack the tokens of many lists of one format, as :mod:`mdkv_vllm.core.packing` does.

    Args:
        keys: float32 ``[lists, max_tokens, rank]``, in the format's space.
        values: same shape.
        counts: int32 ``[lists]``, tokens of each list.
        fmt: the lists' format.
        geometry: the cache's sizes.
        pages: written, uint8 ``[pages of all lists, page_bytes]``, one list after the other.
    """
    torch.ops.mdkv.pack_pages.default(
        keys,
        values,
        counts,
        fmt.rank,
        fmt.bits,
        fmt.tokens_per_page,
        pages,
        element=geometry.dtype,
        token_major=fmt.full,
    )


@cache
def format_table(formats: FormatSet) -> torch.Tensor:
    """Formats as kernels know them: int32 ``[formats, 4]``, rank, bits, rotation, tokens a page."""
    rows = [(f.rank, f.bits, int(f.rotation), f.tokens_per_page) for f in formats.formats]
    return torch.tensor(rows, dtype=torch.int32)


@dataclass(frozen=True)
class DecodeTables:
    """What :func:`mixed_decode` needs to know of a model; build it once.

    Attributes:
        num_kv_heads: KV heads per layer.
        formats: int32 ``[formats, 4]``: rank, bits, rotation, tokens per page.
        basis_keys: per layer, float32 ``[kv_heads, rank, head_size]``; rank 0 without a basis.
        basis_values: same.
        hadamard: float32 ``[head_size, head_size]``.
        basis_first_page: where a prompt basis starts in a lease.
        basis_pages_per_head: pages it takes per layer and head.
        prompt_basis_rank: its rank; 0 where the basis is the calibrated one.
    """

    num_kv_heads: int
    formats: torch.Tensor
    basis_keys: tuple[torch.Tensor, ...]
    basis_values: tuple[torch.Tensor, ...]
    hadamard: torch.Tensor
    basis_first_page: int
    basis_pages_per_head: int
    prompt_basis_rank: int

    @classmethod
    def build(cls, layout: LeaseLayout, basis: Basis | None) -> DecodeTables:
        """Tables of a lease layout and, where formats use one, a calibrated basis."""
        head_size = layout.geometry.head_size
        if basis is None:
            basis = Basis.empty(layout.num_layers, layout.num_kv_heads, head_size)
        keys, values = basis.rows(torch.device("cpu"))
        return cls(
            num_kv_heads=layout.num_kv_heads,
            formats=format_table(layout.formats),
            basis_keys=keys,
            basis_values=values,
            hadamard=hadamard(head_size).contiguous(),
            basis_first_page=layout.basis_first_page,
            basis_pages_per_head=layout.basis_pages_per_head,
            prompt_basis_rank=layout.prompt_basis_rank,
        )


def mixed_decode(
    query: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    tables: DecodeTables,
    block_table: torch.Tensor,
    query_rows: torch.Tensor,
    lengths: torch.Tensor,
    leases: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of single-token queries over leases and full-dimension tokens.

    Args:
        query: ``[queries, q_heads, head_size]``.
        arena: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        layer: the layer to attend in.
        tables: the model's formats and rotations.
        block_table: int32 ``[rows, max_blocks]``.
        query_rows: int32 ``[queries]``, the block-table row of each query.
        lengths: int32 ``[queries]``, keys each query sees, counted from position 0; a query
            of length 0 gives zeros.
        leases: int32 ``[rows, 2]``, first lease block and tail block; 0, 0 for no lease.
        scale: factor of the scores.
        output: written, shape and type of the query.
        lse: written where given, float32 ``[queries, q_heads]``, natural logarithm.
    """
    torch.ops.mdkv.mixed_decode.default(
        query,
        arena,
        layer,
        tables.num_kv_heads,
        block_table,
        query_rows,
        lengths,
        leases,
        tables.formats,
        tables.basis_keys[layer],
        tables.basis_values[layer],
        tables.hadamard,
        tables.basis_first_page,
        tables.basis_pages_per_head,
        tables.prompt_basis_rank,
        scale,
        output,
        lse,
    )
