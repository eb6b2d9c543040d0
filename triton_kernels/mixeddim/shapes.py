"""What a kernel is compiled for: a model's layout, and how each format is cut into tiles.

These objects are passed to kernels as one constant each. A new format is a new object, not a
new kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton.language as tl

from mdkv_vllm.core.formats import PageFormat, Rotation, parse_format
from mdkv_vllm.core.layout import LeaseLayout

MIN_TILE = 16
"""The matrix units take no smaller side."""

TILE_SIZE = 4096
"""Codes or elements of K in a tile, about; the K half of a page of 8 KiB as bytes."""

MIN_TILE_TOKENS, MAX_TILE_TOKENS = 64, 128

_ELEMENT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def padded(size: int) -> int:
    """The power of two that tiles take for a side of ``size``."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


class KernelConstant:
    """An object that kernels take as a constant.

    Triton tells compiled kernels apart by the text of their constants, on disk as well. So the
    text says all that a kernel may read, not just what the object was made from.
    """

    def __repr__(self) -> str:
        names = [name for name in dir(self) if not name.startswith("_")]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


@dataclass(frozen=True, repr=False)
class ListShape(KernelConstant):
    """One format's tiles. K rows are dimensions of a page, V rows its tokens.

    Attributes:
        format: the page format.
        element: the cache's type; also that of a format that is not quantized.
    """

    format: PageFormat
    element: tl.dtype

    def __post_init__(self) -> None:
        # A tile's last word of K may end that far behind its row; it must not leave the page.
        assert not self.quantized or self.section_bytes >= self.columns + 8

    @property
    def rank(self) -> int:
        """Stored dimensions."""
        return self.format.rank

    @property
    def padded_rank(self) -> int:
        """Dimensions of a tile."""
        return padded(self.rank)

    @property
    def in_slots(self) -> bool:
        """Whether tokens lie token-major in vLLM's own slots."""
        return self.format.full

    @property
    def in_hadamard(self) -> bool:
        """Whether tokens are in the Hadamard space."""
        return self.format.rotation is Rotation.HADAMARD

    @property
    def in_basis(self) -> bool:
        """Whether tokens are in a principal basis."""
        return self.format.rotation is Rotation.BASIS

    @property
    def quantized(self) -> bool:
        """Whether elements are integer codes."""
        return self.format.quantized

    @property
    def bits(self) -> int:
        """Bits of a code or element."""
        return self.format.bits

    @property
    def fields(self) -> int:
        """Codes in a byte."""
        return self.format.codes_per_byte

    @property
    def tokens_per_page(self) -> int:
        """Tokens of a full page."""
        return self.format.tokens_per_page

    @property
    def section_bytes(self) -> int:
        """Bytes of a page's K codes, and of its V codes."""
        return self.format.section_bytes

    @property
    def scales_offset(self) -> int:
        """Where a page's K scales start; those of V follow."""
        return self.format.scales_offset

    @property
    def used_bytes(self) -> int:
        """Bytes of a page in use."""
        return self.format.used_bytes

    @property
    def key_row(self) -> int:
        """Bytes (codes) or elements of a K row."""
        return self.tokens_per_page // self.fields

    @property
    def value_row(self) -> int:
        """Bytes (codes) or elements of a V row."""
        return self.rank // self.fields

    @property
    def padded_value_row(self) -> int:
        """Bytes or elements of a V row of a tile."""
        return padded(self.value_row)

    @property
    def columns(self) -> int:
        """Bytes or elements of every K row that a tile takes."""
        if self.in_slots:
            return max(MIN_TILE, TILE_SIZE // self.padded_rank)
        tokens = min(max(MIN_TILE_TOKENS, TILE_SIZE // self.padded_rank), MAX_TILE_TOKENS)
        return min(padded(self.key_row), tokens // self.fields)

    @property
    def chunks(self) -> int:
        """Tiles of a page."""
        return -(-self.key_row // self.columns)

    @property
    def dot_type(self) -> tl.dtype:
        """The type of products: float16 for codes of a 16-bit cache, see ``codes.py``."""
        if self.quantized and self.element != tl.float32:
            return tl.float16
        return self.element

    @property
    def bias(self) -> float:
        """What an unpacked code for zero is: the zero point, and the offset of ``codes.py``."""
        if self.dot_type == tl.float32:
            return self.format.zero
        return self.format.zero + (1024.0 if self.bits == 8 else 512.0)


@dataclass(frozen=True, repr=False)
class DecodeShape(KernelConstant):
    """What one model's decode kernels are compiled for.

    Attributes:
        layout: what leases look like.
        group: query heads per KV head.
        basis_rank: directions of the basis, the prompt's own or calibrated; 0 for none.
        max_leases: leases of a request at most.
    """

    layout: LeaseLayout
    group: int
    basis_rank: int
    max_leases: int = 1

    @cached_property
    def element(self) -> tl.dtype:
        """The cache's type."""
        return _ELEMENT[self.layout.geometry.dtype]

    @cached_property
    def parts(self) -> tuple[ListShape, ...]:
        """What a result has parts of: the formats in the page table's order, then the tail."""
        geometry = self.layout.geometry
        formats = (*self.layout.formats.formats, parse_format("full", geometry))
        return tuple(ListShape(f, self.element) for f in formats)

    @property
    def num_lists(self) -> int:
        """Columns of the page table."""
        return len(self.layout.formats.formats)

    @property
    def num_parts(self) -> int:
        """Parts that a result may have of one program."""
        return self.num_lists + 1

    @property
    def padded_parts(self) -> int:
        """Parts of one program in a tile."""
        return 1 << (self.num_parts - 1).bit_length()

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.layout.geometry.head_size

    @property
    def padded_head(self) -> int:
        """Dimensions of a head in tiles."""
        return padded(self.head_size)

    @property
    def num_warps(self) -> int:
        """Warps of an attending program: the fewest that hold its tiles in registers."""
        return 2 if self.padded_head * self.padded_group <= 128 * MIN_TILE else 4

    @property
    def padded_group(self) -> int:
        """Query heads in tiles."""
        return padded(self.group)

    @property
    def part_floats(self) -> int:
        """Floats of one part of a result."""
        return self.group * self.head_size

    @property
    def padded_basis(self) -> int:
        """Directions of the basis in tiles."""
        return padded(max(self.basis_rank, 1))

    @property
    def uses_basis(self) -> bool:
        """Whether a format reads the basis."""
        return self.layout.formats.uses_basis

    @property
    def uses_hadamard(self) -> bool:
        """Whether a format is Hadamard-rotated."""
        return any(s.format.rotation is Rotation.HADAMARD for s in self.parts)

    @property
    def hadamard_steps(self) -> int:
        """Base-2 logarithm of the size of a Hadamard block."""
        return (self.head_size & -self.head_size).bit_length() - 1

    @property
    def rotated_width(self) -> int:
        """Floats of a query in the other spaces: the basis', then the Hadamard space."""
        return self.basis_rank + self.head_size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layout.geometry.page_bytes

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.layout.geometry.block_size

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.layout.num_kv_heads

    @property
    def pages_per_block(self) -> int:
        """Pages of a block."""
        return self.layout.pages_per_block

    @property
    def has_prompt_basis(self) -> bool:
        """Whether the basis lies in the lease."""
        return self.layout.prompt_basis_rank > 0

    @property
    def basis_first_page(self) -> int:
        """Page of a lease at which its bases start."""
        return self.layout.basis_first_page

    @property
    def basis_pages_per_head(self) -> int:
        """Pages of a lease that one head's bases take."""
        return self.layout.basis_pages_per_head

    @property
    def basis_rows_per_page(self) -> int:
        """Rows of a prompt basis in a page: a whole number, so no row crosses pages."""
        return self.page_bytes // (self.head_size * self.layout.geometry.dtype.itemsize)
