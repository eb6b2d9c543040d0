"""Tokens to page bytes and back: the specification of every page format.

The C++ and Triton packers are tested against this file byte for byte.
"""

from __future__ import annotations

import torch

from mdkv_vllm.core.formats import PageFormat, PageGeometry
from mdkv_vllm.core.quantize import dequantize, quantize


def pack_list(
    keys: torch.Tensor, values: torch.Tensor, fmt: PageFormat, geometry: PageGeometry
) -> torch.Tensor:
    """Pack the tokens of one list into its pages.

    Args:
        keys: float32 ``[tokens, rank]``, already in the format's space.
        values: float32 ``[tokens, rank]``.
        fmt: the list's format.
        geometry: the cache's sizes.

    Returns:
        uint8 ``[pages, page_bytes]``; bytes that hold no token are zero.
    """
    num_tokens, capacity = keys.shape[0], fmt.tokens_per_page
    num_pages = fmt.pages(num_tokens)
    pages = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
    if num_tokens == 0:
        return pages
    if fmt.full:
        slots = torch.cat((keys, values), dim=-1).to(geometry.dtype)
        flat = pages.view(geometry.dtype).view(num_pages * capacity, 2 * fmt.rank)
        flat[:num_tokens] = slots
        return pages
    section, scales = fmt.section_bytes, fmt.scales_offset
    if fmt.quantized:
        key_codes, key_scales = quantize(keys, fmt.bits)
        value_codes, value_scales = quantize(values, fmt.bits)
        for at, scale in ((scales, key_scales), (scales + 2 * capacity, value_scales)):
            paged = _paged(scale.unsqueeze(-1), num_pages, capacity).squeeze(-1).contiguous()
            pages[:, at : at + 2 * capacity] = paged.view(torch.uint8)
    else:
        key_codes, value_codes = keys.to(geometry.dtype), values.to(geometry.dtype)
    key_rows = _paged(key_codes, num_pages, capacity).transpose(1, 2)
    value_rows = _paged(value_codes, num_pages, capacity)
    pages[:, :section] = pack_rows(key_rows, fmt).flatten(1)
    pages[:, section : 2 * section] = pack_rows(value_rows, fmt).flatten(1)
    return pages


def unpack_list(
    pages: torch.Tensor, num_tokens: int, fmt: PageFormat, geometry: PageGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the tokens of one list back from its pages.

    Args:
        pages: uint8 ``[pages, page_bytes]``.
        num_tokens: tokens in the list.
        fmt: the list's format.
        geometry: the cache's sizes.

    Returns:
        float32 keys and values ``[tokens, rank]`` in the format's space.
    """
    num_pages, capacity = pages.shape[0], fmt.tokens_per_page
    if num_tokens == 0:
        return torch.empty(0, fmt.rank), torch.empty(0, fmt.rank)
    if fmt.full:
        slots = pages.contiguous().view(geometry.dtype).view(-1, 2 * fmt.rank)[:num_tokens].float()
        return slots[:, : fmt.rank], slots[:, fmt.rank :]
    section, scales = fmt.section_bytes, fmt.scales_offset
    key_bytes = pages[:, :section].reshape(num_pages, fmt.rank, -1)
    value_bytes = pages[:, section : 2 * section].reshape(num_pages, capacity, -1)
    keys = _unpack_rows(key_bytes, fmt, geometry.dtype).transpose(1, 2).reshape(-1, fmt.rank)
    values = _unpack_rows(value_bytes, fmt, geometry.dtype).reshape(-1, fmt.rank)
    keys, values = keys[:num_tokens], values[:num_tokens]
    if not fmt.quantized:
        return keys.float(), values.float()
    read = []
    for at, codes in ((scales, keys), (scales + 2 * capacity, values)):
        scale = pages[:, at : at + 2 * capacity].contiguous().view(torch.bfloat16).flatten()
        read.append(dequantize(codes, scale[:num_tokens], fmt.zero))
    return read[0], read[1]


def _paged(rows: torch.Tensor, num_pages: int, capacity: int) -> torch.Tensor:
    """Zero-pad ``[tokens, n]`` to whole pages: ``[pages, capacity, n]``."""
    padded = rows.new_zeros(num_pages * capacity, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded.view(num_pages, capacity, rows.shape[1])


def pack_rows(rows: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """Pack the last axis of ``[pages, rows, n]`` codes into uint8 bytes."""
    if not fmt.quantized:
        return rows.contiguous().view(torch.uint8)
    per_byte = fmt.codes_per_byte
    runs = rows.reshape(*rows.shape[:2], per_byte, -1)
    packed = runs[:, :, 0].clone()
    for field in range(1, per_byte):
        packed |= runs[:, :, field] << (field * fmt.bits)
    return packed


def _unpack_rows(packed: torch.Tensor, fmt: PageFormat, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of :func:`pack_rows`."""
    if not fmt.quantized:
        return packed.contiguous().view(dtype)
    mask = 2**fmt.bits - 1
    runs = [(packed >> (field * fmt.bits)) & mask for field in range(fmt.codes_per_byte)]
    return torch.cat(runs, dim=-1)
