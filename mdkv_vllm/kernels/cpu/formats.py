"""Page formats as the C++ kernels take them, and lists packed by one of them."""

from __future__ import annotations

from functools import cache

import torch

import mdkv_vllm.kernels.cpu  # noqa: F401  (registers the operators)
from mdkv_vllm.core.formats import PageFormat, PageGeometry


@cache
def format_table(formats: tuple[PageFormat, ...]) -> torch.Tensor:
    """Descriptors of page formats, int32 ``[formats, fields]``; see csrc/common/page_format.h."""
    return torch.tensor([fmt.descriptor() for fmt in formats], dtype=torch.int32)


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
        format_table((fmt,)),
        pages,
        geometry.dtype,
    )
