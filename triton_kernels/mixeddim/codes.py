"""Integer codes in registers: packed bytes to float16, one instruction for two codes.

A code becomes a float16 by becoming its mantissa: the bits ``0x6400 | code`` are the number
``1024 + code``, and ``0x6000 | code << 1`` is ``512 + code`` in steps of a half, fine enough
for the zero points 7.5 and 1.5. So a byte permutation converts two codes; no arithmetic does.
Both kinds of offset are exact and leave by one subtraction (``ListShape.bias``).

float16 serves every 16-bit cache: codes are exact in it, and what it multiplies is bounded
(rotated queries, and weights of at most 2). A float32 cache converts codes to float32.
"""

# mypy: ignore-errors
# Device code is Triton's language, whose tensors mypy takes for the numbers they start from.

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import INTERPRETED


@triton.constexpr_function
def field_asm(bits: int, field: int) -> str:
    """PTX from four bytes in one register (``$2``) to four float16 in two (``$0``, ``$1``)."""
    if bits == 8:
        select, magic = "mov.b32 t, $2;", "0x64646464"
    else:
        low = field * bits - 1  # the code goes to bit 1 and up
        shift = f"shr.b32 t, $2, {low};" if low > 0 else "shl.b32 t, $2, 1;"
        mask = ((1 << bits) - 1) * 2 * 0x01010101
        select, magic = f"{shift} and.b32 t, t, {mask:#x};", "0x60606060"
    halves = f"prmt.b32 $0, t, {magic}, 0x4140; prmt.b32 $1, t, {magic}, 0x4342;"
    return "{ .reg .b32 t; " + select + halves + " }"


@triton.jit
def unpack_field(packed, BITS: tl.constexpr, FIELD: tl.constexpr, DOT_TYPE: tl.constexpr):
    """One code of each byte, offset as ``ListShape.bias`` says.

    Args:
        packed: uint8, any shape.
        BITS: bits per code.
        FIELD: which of a byte's codes, from its lowest bits up.
        DOT_TYPE: float16 or float32, what to convert to.
    """
    if DOT_TYPE == tl.float32:
        return ((packed >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    elif INTERPRETED:
        code = ((packed >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.uint16)
        bits = code | 0x6400 if BITS == 8 else code << 1 | 0x6000
        return bits.to(tl.float16, bitcast=True)
    else:
        # Not declared pure: Triton would move a pure operation behind the change of layout that
        # feeds the matrix units, and shuffle single bytes instead of vectors of float16.
        return tl.inline_asm_elementwise(
            field_asm(BITS, FIELD),
            "=r,=r,r",
            [packed],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )


@triton.jit
def unpack(
    packed, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, DOT_TYPE: tl.constexpr
):
    """Unpack rows of evenly spread codes: field 0 of every byte, then field 1, and so on.

    Args:
        packed: uint8 ``[ROWS, BYTES]``.

    Returns:
        ``[ROWS, BYTES * 8 // BITS]`` of ``DOT_TYPE``, offset as ``ListShape.bias`` says.
    """
    if BITS == 8:
        fields = unpack_field(packed, 8, 0, DOT_TYPE)
    elif BITS == 4:
        low = unpack_field(packed, 4, 0, DOT_TYPE)
        high = unpack_field(packed, 4, 1, DOT_TYPE)
        fields = tl.permute(tl.join(low, high), (0, 2, 1))
    else:
        even = tl.join(unpack_field(packed, 2, 0, DOT_TYPE), unpack_field(packed, 2, 2, DOT_TYPE))
        odd = tl.join(unpack_field(packed, 2, 1, DOT_TYPE), unpack_field(packed, 2, 3, DOT_TYPE))
        fields = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
    return tl.reshape(fields, [ROWS, BYTES * 8 // BITS])


@triton.jit
def funnel_shift(low, high, shift):
    """The low word of ``high:low`` shifted right by ``shift`` < 32 bits; all uint32."""
    if INTERPRETED:
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        return (both >> shift).to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, shift],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def bytes_of_words(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """uint32 ``[ROWS, WORDS]`` to its bytes, uint8 ``[ROWS, 4 * WORDS]``, lowest first."""
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), [ROWS, 4 * WORDS])


@triton.jit
def load_byte_rows(page, first_byte, PART: tl.constexpr, SHAPE: tl.constexpr):
    """Some bytes of every K row of a page of codes.

    Rows start anywhere, since a page's tokens need not fill whole words: where they are not
    word-aligned, two aligned words and a shift give four bytes.

    Args:
        page: pointer to uint8, 16-byte aligned.
        first_byte: the first byte to load of a row, a multiple of 4.

    Returns:
        uint8 ``[padded_rank, columns]``; bytes past a row's end are what follows in the page.
    """
    LIST: tl.constexpr = SHAPE.parts[PART]
    ROW: tl.constexpr = LIST.key_row
    BYTES: tl.constexpr = LIST.columns
    ROWS: tl.constexpr = LIST.padded_rank
    row = tl.arange(0, ROWS)[:, None]
    exists = row < LIST.rank
    if ROW % 16 == 0:
        at = row * ROW + first_byte + tl.arange(0, BYTES)[None, :]
        return tl.load(page + at, mask=exists, other=0)
    else:
        words = page.to(tl.pointer_type(tl.uint32))
        start = row * ROW + first_byte
        at = (start >> 2) + tl.arange(0, BYTES // 4)[None, :]
        word = tl.load(words + at, mask=exists, other=0)
        if ROW % 4 != 0:
            following = tl.load(words + at + 1, mask=exists, other=0)
            shift = tl.broadcast_to((start & 3) * 8, [ROWS, BYTES // 4])
            word = funnel_shift(word, following, shift.to(tl.uint32))
        return bytes_of_words(word, ROWS, BYTES // 4)
