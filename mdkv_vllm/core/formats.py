"""Page formats: how the tokens of one KV head are laid in one page.

A page is the byte range one KV head of one layer owns inside one vLLM block:
``block_size * 2 * head_size * itemsize`` bytes. Every format uses that page size, so
one pool of pages serves all of them.

Layout of a page, tokens ``t < tokens_per_page`` and dimensions ``d < rank``:

``full``
    vLLM's own slots: token-major, ``[t][K(head_size) | V(head_size)]``.

every other format
    ``K[d][t]`` codes, then ``V[t][d]`` codes, then (quantized only) bf16 ``K`` scales ``[t]``
    and bf16 ``V`` scales ``[t]``. Keys are dimension-major so that a kernel scores many
    tokens per instruction without a horizontal sum.

    Codes narrower than a byte are packed ``p = 8 / bits`` to a byte, evenly spread: the
    byte ``j`` of a row of ``n`` codes holds the codes ``j, j + n/p, j + 2n/p, ...`` from its
    lowest bits up, so unpacking a vector of bytes gives contiguous runs of codes.

A quantized code ``c`` (unsigned field of ``bits`` bits) stands for ``(c - zero) * scale`` with
``zero = 128`` for int8 (symmetric, codes 1..255), 7.5 for int4 and 1.5 for int2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch

SCALE_BYTES = 2
"""Bytes of one scale; one for K and one for V per token and head."""

CODE_ZERO = {8: 128.0, 4: 7.5, 2: 1.5}
"""The code that stands for zero, by bits."""

_NAME = re.compile(r"(?:r(?P<rank>[1-9][0-9]*))?(?:i(?P<bits>[248]))?")


class Kind(IntEnum):
    """How a page is laid out."""

    SLOTS = 0
    """Keys and values token by token, as the model made them."""
    ELEMENTS = 1
    """Elements of the cache's type."""
    CODES = 2
    """Integer codes with a scale per token and head."""


DESCRIPTOR = (
    "kind", "rotation", "rank", "bits", "tokens_per_page", "values_offset", "scales_offset",
    "used_bytes", "zero_halves",
)  # fmt: skip
"""Fields of :meth:`PageFormat.descriptor`, those of csrc/common/page_format.h."""


class Rotation(IntEnum):
    """The space in which a format's codes live."""

    IDENTITY = 0
    """As the model made them."""
    BASIS = 1
    """The first ``rank`` columns of a principal basis (calibrated, or of the prompt)."""
    HADAMARD = 2
    """A fixed orthonormal Hadamard matrix, which spreads outliers before quantizing."""


@dataclass(frozen=True)
class PageGeometry:
    """Sizes shared by every page of a model's cache.

    Attributes:
        block_size: tokens in one vLLM block.
        head_size: dimensions of one head's key (and of its value).
        dtype: element type of the cache; float32, float16 or bfloat16.
    """

    block_size: int
    head_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.block_size * 2 * self.head_size * self.dtype.itemsize


@dataclass(frozen=True)
class PageFormat:
    """One way to hold a token: layout, rank, element width and rotation.

    Attributes:
        name: as the user writes it: ``full``, ``r16``, ``i4``, ``r32i8``.
        kind: the layout.
        rank: stored dimensions of K and of V.
        bits: bits per stored element.
        rotation: the space of the stored elements.
        tokens_per_page: how many tokens one page holds.
    """

    name: str
    kind: Kind
    rank: int
    bits: int
    rotation: Rotation
    tokens_per_page: int

    @property
    def full(self) -> bool:
        """Whether tokens are held as the model made them."""
        return self.kind is Kind.SLOTS

    @property
    def quantized(self) -> bool:
        """Whether elements are integer codes with a scale per token and head."""
        return self.kind is Kind.CODES

    @property
    def codes_per_byte(self) -> int:
        """Codes packed into one byte; 1 for elements of a byte or more."""
        return max(1, 8 // self.bits)

    @property
    def zero(self) -> float:
        """The code value that stands for zero."""
        return CODE_ZERO[self.bits] if self.quantized else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's K and V with their scales, without rounding to pages."""
        return 2 * (self.rank * self.bits / 8 + SCALE_BYTES * self.quantized)

    @property
    def section_bytes(self) -> int:
        """Bytes of the K codes of a page; the V codes take as many."""
        return self.rank * self.tokens_per_page * self.bits // 8

    @property
    def scales_offset(self) -> int:
        """Byte offset of the K scales in a page; the V scales follow them."""
        return 2 * self.section_bytes

    @property
    def values_offset(self) -> int:
        """Byte offset of the V codes in a page; of slots, of V in a token's slot."""
        return self.rank * self.bits // 8 if self.full else self.section_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of a page that hold anything."""
        return self.scales_offset + 2 * SCALE_BYTES * self.tokens_per_page * self.quantized

    @property
    def zero_halves(self) -> int:
        """Twice the code value that stands for zero, which is an integer."""
        return int(2 * self.zero)

    def descriptor(self) -> tuple[int, ...]:
        """All that kernels need to know, in the order of :data:`DESCRIPTOR`."""
        return tuple(int(getattr(self, name)) for name in DESCRIPTOR)

    def pages(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one list take."""
        return -(-tokens // self.tokens_per_page)


class FormatError(ValueError):
    """A format name that means nothing, or that does not fit the model."""


def parse_format(name: str, geometry: PageGeometry) -> PageFormat:
    """Turn a format name into a :class:`PageFormat` for a cache geometry.

    Args:
        name: ``full``; ``r<rank>`` (rank below the head size, a multiple of 4, in the
            cache dtype); ``i8``, ``i4`` or ``i2`` (full rank); or both, ``r32i8``.
            ``drop`` stores nothing and therefore has no page format.
        geometry: the cache's sizes.

    Raises:
        FormatError: the name is not of that form, or its rank does not fit.
    """
    if name == "full":
        return PageFormat(
            name,
            Kind.SLOTS,
            geometry.head_size,
            geometry.dtype.itemsize * 8,
            Rotation.IDENTITY,
            geometry.block_size,
        )
    match = _NAME.fullmatch(name) if name else None
    if match is None:
        raise FormatError(
            f"formats: {name!r} is not a page format; allowed are 'drop', 'full', "
            "'r<rank>' (r16), 'i8', 'i4', 'i2' and 'r<rank>i<bits>' (r32i8)"
        )
    rank = int(match["rank"] or geometry.head_size)
    if match["rank"] and (rank >= geometry.head_size or rank % 4):
        raise FormatError(
            f"formats: {name!r} has rank {rank}; allowed are multiples of 4 below the "
            f"model's head size {geometry.head_size}"
        )
    quantized = match["bits"] is not None
    bits = int(match["bits"] or geometry.dtype.itemsize * 8)
    per_byte = max(1, 8 // bits)
    token_bits = 2 * (rank * bits + (SCALE_BYTES * 8 if quantized else 0))
    tokens = geometry.page_bytes * 8 // token_bits // per_byte * per_byte
    return PageFormat(
        name,
        Kind.CODES if quantized else Kind.ELEMENTS,
        rank,
        bits,
        Rotation.BASIS if match["rank"] else Rotation.HADAMARD,
        tokens,
    )


@dataclass(frozen=True)
class FormatSet:
    """The formats an allocation may choose from, cheapest first.

    Attributes:
        formats: page formats by falling ``tokens_per_page``.
        drop: whether a token may be forgotten altogether.
    """

    formats: tuple[PageFormat, ...]
    drop: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names with ``drop`` first where it is allowed."""
        return (("drop",) if self.drop else ()) + tuple(f.name for f in self.formats)

    @property
    def cheapest(self) -> PageFormat:
        """That of which most tokens fit a page."""
        return self.formats[0]

    @property
    def richest(self) -> PageFormat:
        """That of which fewest tokens fit a page."""
        return self.formats[-1]

    @property
    def uses_basis(self) -> bool:
        """Whether any format stores its tokens in a principal basis."""
        return any(f.rotation is Rotation.BASIS for f in self.formats)

    @property
    def basis_rank(self) -> int:
        """The highest rank read from the basis; 0 where none is."""
        return max((f.rank for f in self.formats if f.rotation is Rotation.BASIS), default=0)

    def pages(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pages that lists take: int64 of the same shape.

        Args:
            tokens: int64 ``[..., formats]``, tokens of each list.
        """
        capacity = self.capacity(tokens.device)
        return (tokens + capacity - 1) // capacity

    @cache
    def capacity(self, device: torch.device) -> torch.Tensor:
        """Tokens per page of each format: int64 ``[formats]``, copied to the device once."""
        return torch.tensor([f.tokens_per_page for f in self.formats]).to(device)


def full_format(geometry: PageGeometry) -> PageFormat:
    """The format of tokens that are not compressed."""
    return parse_format("full", geometry)


def parse_formats(names: tuple[str, ...], geometry: PageGeometry) -> FormatSet:
    """Parse a list of names into a :class:`FormatSet`.

    Raises:
        FormatError: a name is wrong or stands twice, or nothing but ``drop`` is named.
    """
    if len(set(names)) != len(names):
        raise FormatError(f"formats: {list(names)} names a format twice")
    formats = [parse_format(name, geometry) for name in names if name != "drop"]
    if not formats:
        raise FormatError(f"formats: {list(names)} keeps no token; name a format beside 'drop'")
    formats.sort(key=lambda f: -f.tokens_per_page)
    return FormatSet(tuple(formats), "drop" in names)
