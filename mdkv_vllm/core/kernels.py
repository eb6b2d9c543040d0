"""The slow parts of compression as objects, so that faster ones can be put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mdkv_vllm.core.allocate import Allocation, allocate, allocate_layers
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.formats import CODE_ZERO, FormatSet, PageGeometry
from mdkv_vllm.core.layers import LayerGroup
from mdkv_vllm.core.loss import Candidate, loss_sums, window_logits
from mdkv_vllm.core.losses import Loss
from mdkv_vllm.core.packing import pack_list
from mdkv_vllm.core.prompt import Prompt
from mdkv_vllm.core.quantize import dequantize, quantize

SCORE_ELEMENTS = 1 << 24
"""Most elements of one score matrix of the reference (64 MiB); more heads are taken in turns."""


class LayersToCompress(Protocol):
    """Some layers of one prompt."""

    def losses(self) -> Sequence[torch.Tensor]:
        """Loss of every token at every option.

        Returns:
            Per layer, float32 ``[options, kv_heads, span]``; options in the order of
            ``formats.names``.
        """
        ...

    def pack(
        self, chosen: Sequence[Allocation], pages: torch.Tensor, first_page: torch.Tensor
    ) -> torch.Tensor:
        """Write the layers' lists one after the other, by layer, head and format.

        Args:
            chosen: each layer's formats.
            pages: uint8 ``[pages, page_bytes]``, contiguous; zero where nothing was written.
            first_page: the first page of the first list, int64 of one element.

        Returns:
            The first page behind the lists, likewise.
        """
        ...


class CompressionKernels(Protocol):
    """What compression spends its time on."""

    @property
    def layers_at_once(self) -> int:
        """Layers whose losses, formats and pages are best made together."""
        ...

    @property
    def reads_pages(self) -> bool:
        """Whether a prompt's tokens have to be :class:`mdkv_vllm.core.prompt.PagedTokens`."""
        ...

    def layers(self, prompt: Prompt, layers: range, bases: Basis | None) -> LayersToCompress:
        """Some layers of a prompt, with their part of its basis."""
        ...

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """Choose formats for some layers; see :func:`mdkv_vllm.core.allocate.allocate_layers`.

        Args:
            losses: per layer, float32 ``[options, kv_heads, span]``.
            formats: the formats allowed.
            budgets: per layer, the pages of each part of its heads.
        """
        ...


class LayerKernels(Protocol):
    """Kernels for one layer, of which :class:`mdkv_vllm.core.layers.LayerGroup` compresses many.

    :class:`ReferenceKernels` is the specification. Tensors are on one device.
    """

    def rotate(self, vectors: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
        """Multiply by a matrix per head.

        Args:
            vectors: float32 ``[kv_heads, span, head_size]``, innermost contiguous.
            encoder: float32 ``[kv_heads, head_size, rank]``.

        Returns:
            float32 ``[kv_heads, span, rank]``.
        """
        ...

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize and read back.

        Args:
            keys: float32 ``[kv_heads, span, rank]``, innermost contiguous.
            values: same shape.
            bits: 8, 4 or 2.

        Returns:
            Keys as read back from their codes, same shape; squared error of each value as
            read back, ``[kv_heads, span]``.
        """
        ...

    def loss_sums(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        candidates: Sequence[Candidate],
        span: int,
        scale: float,
        loss: Loss,
    ) -> torch.Tensor:
        """Per-token sums of :func:`mdkv_vllm.core.loss.loss_sums`.

        Args:
            queries: float32 ``[kv_heads, window, group, head_size]``, the prompt's last tokens.
            keys: float32 ``[kv_heads, tokens, head_size]``, the whole prompt.
            candidates: the reduced formats.
            span: tokens that are compressed.
            scale: factor of the scores.
            loss: which one.

        Returns:
            float32 ``[1 + candidates, kv_heads, span]``.
        """
        ...

    def pack(
        self,
        vectors: Sequence[tuple[torch.Tensor, torch.Tensor]],
        formats: FormatSet,
        choice: torch.Tensor,
        geometry: PageGeometry,
        pages: torch.Tensor,
        first_page: torch.Tensor,
    ) -> None:
        """Pack a layer's lists one after the other, by head and then by format.

        Args:
            vectors: per format, K and V of every span token in its space, float32
                ``[kv_heads, span, rank]``, innermost contiguous.
            formats: the formats allowed.
            choice: int64 ``[kv_heads, span]``, index into ``formats.formats``, or -1.
            geometry: the cache's sizes.
            pages: written, uint8 ``[pages, page_bytes]``, contiguous; those before and beyond
                the lists are left.
            first_page: the first page of the first list, int64 of one element.
        """
        ...


class LayerByLayer(LayerKernels):
    """What makes :class:`LayerKernels` also :class:`CompressionKernels`, but for the allocation."""

    layers_at_once = 1
    reads_pages = False

    def layers(self, prompt: Prompt, layers: range, bases: Basis | None) -> LayersToCompress:
        """See :class:`CompressionKernels`."""
        return LayerGroup(self, prompt, layers, bases)

    def rotate(self, vectors: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
        """See :class:`LayerKernels`."""
        return torch.bmm(vectors, encoder)


class ReferenceKernels(LayerByLayer):
    """:class:`LayerKernels` and :class:`CompressionKernels` in plain torch, on any device."""

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`LayerKernels`."""
        read = [dequantize(*quantize(x, bits), CODE_ZERO[bits]) for x in (keys, values)]
        return read[0], (values - read[1]).square().sum(-1)

    def loss_sums(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        candidates: Sequence[Candidate],
        span: int,
        scale: float,
        loss: Loss,
    ) -> torch.Tensor:
        """See :class:`LayerKernels`."""
        heads, window, group, _ = queries.shape
        turn = max(1, SCORE_ELEMENTS // (window * group * keys.shape[1]))
        parts = []
        for start in range(0, heads, turn):
            some = slice(start, start + turn)
            logits = window_logits(queries[some], keys[some], scale)
            mine = [Candidate(c.queries[some], c.keys[some], c.value_error) for c in candidates]
            parts.append(loss_sums(logits, mine, span, scale, loss))
        return torch.cat(parts, dim=1)

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """See :class:`CompressionKernels`."""
        return allocate_layers(allocate, losses, formats, budgets)

    def pack(
        self,
        vectors: Sequence[tuple[torch.Tensor, torch.Tensor]],
        formats: FormatSet,
        choice: torch.Tensor,
        geometry: PageGeometry,
        pages: torch.Tensor,
        first_page: torch.Tensor,
    ) -> None:
        """See :class:`LayerKernels`."""
        first = int(first_page)
        for head, chosen in enumerate(choice):
            for index, fmt in enumerate(formats.formats):
                tokens = (chosen == index).nonzero().squeeze(1)
                keys, values = (x[head, tokens] for x in vectors[index])
                packed = pack_list(keys, values, fmt, geometry)
                pages[first : first + len(packed)] = packed
                first += len(packed)
