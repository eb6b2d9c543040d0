"""Losses and packing of one layer after the other, from kernels for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.basis import Basis, hadamard
from mdkv_vllm.core.formats import PageFormat, Rotation
from mdkv_vllm.core.loss import Candidate, losses_from_sums
from mdkv_vllm.core.prompt import Prompt

if TYPE_CHECKING:
    from mdkv_vllm.core.kernels import LayerKernels

Encoders = tuple[torch.Tensor, torch.Tensor]
"""Encoders of K and V, each ``[kv_heads, head_size, rank]``."""


class LayerGroup:
    """:class:`mdkv_vllm.core.kernels.LayersToCompress` of kernels for a layer.

    One layer at a time is in memory: its keys and values as read, once more in float32 per rotation
    in use, and its keys as read back from each quantized format, float32.
    """

    def __init__(
        self, kernels: LayerKernels, prompt: Prompt, layers: range, bases: Basis | None
    ) -> None:
        self._kernels, self._prompt, self._layers, self._bases = kernels, prompt, layers, bases
        self._rotated: tuple[int, _Span] | None = None

    def losses(self) -> list[torch.Tensor]:
        """See :class:`mdkv_vllm.core.kernels.LayersToCompress`."""
        return [self._losses(layer) for layer in self._layers]

    def pack(
        self, chosen: Sequence[Allocation], pages: torch.Tensor, first_page: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.LayersToCompress`."""
        formats = self._prompt.layout.formats
        for layer, allocation in zip(self._layers, chosen, strict=True):
            vectors = [self._span(layer).rotated(f) for f in formats.formats]
            geometry = self._prompt.layout.geometry
            self._kernels.pack(vectors, formats, allocation.choice, geometry, pages, first_page)
            first_page = first_page + formats.pages(allocation.tokens).sum()
        return first_page

    def _span(self, layer: int) -> _Span:
        """A layer, with what its rotations make of it; kept until another is asked for."""
        if self._rotated is None or self._rotated[0] != layer:
            self._rotated = None  # before the next takes memory
            keys, values = self._prompt.layer(layer)
            rotations = self._rotations(layer, keys)
            made = _Span(keys, values, self._prompt.span, rotations, self._kernels)
            self._rotated = layer, made
        return self._rotated[1]

    def _rotations(self, layer: int, keys: torch.Tensor) -> dict[Rotation, Encoders]:
        """Encoders per rotation in use."""
        rotations = {}
        formats = self._prompt.layout.formats
        if Rotation.HADAMARD in {f.rotation for f in formats.formats}:
            matrix = hadamard(keys.shape[2], keys.device).expand(keys.shape[0], -1, -1)
            rotations[Rotation.HADAMARD] = (matrix, matrix)
        if self._bases is not None:
            at = layer - self._layers.start
            rotations[Rotation.BASIS] = self._bases.keys[at], self._bases.values[at]
        return rotations

    def _losses(self, layer: int) -> torch.Tensor:
        """Losses of one layer, float32 ``[options, kv_heads, span]``."""
        prompt, span = self._prompt, self._span(layer)
        formats, queries = prompt.layout.formats, prompt.queries[layer]
        heads = span.keys.shape[0]
        grouped = queries.unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
        rotated = span.rotate_queries(grouped.flatten(1, 2))
        candidates = [
            self._candidate(span, f, rotated[f.rotation])
            for f in formats.formats
            if f.name != "full"
        ]
        sums = self._kernels.loss_sums(
            grouped, span.keys, candidates, span.span, prompt.scale, prompt.loss
        )
        errors = [c.value_error for c in candidates]
        losses = losses_from_sums(sums, span.value_norms(), errors, prompt.loss, formats.drop)
        if "full" in formats.names:
            at = formats.names.index("full")
            losses = torch.cat((losses[:at], torch.zeros_like(losses[:1]), losses[at:]))
        return losses

    def _candidate(self, span: _Span, fmt: PageFormat, queries: torch.Tensor) -> Candidate:
        """The span as ``fmt`` would hold it; queries ``[kv_heads, rows, rank or more]``."""
        keys, values = span.rotated(fmt)
        error = torch.zeros(values.shape[:2], device=values.device)
        if fmt.rank < span.values.shape[-1]:
            # Orthonormal columns: what the projection loses is what it does not hold.
            lost = span.value_norms().square() - values.square().sum(-1)
            error = lost.clamp_min_(0)
        if fmt.quantized:
            keys, rounding = self._kernels.round_trip(keys, values, fmt.bits)
            error = error + rounding
        return Candidate(queries[..., : fmt.rank], keys, error.sqrt())


class _Span:
    """One layer's prompt, with rotated copies of its span made once."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        span: int,
        rotations: dict[Rotation, Encoders],
        kernels: LayerKernels,
    ) -> None:
        self.keys, self.values, self.span, self.rotations = keys, values, span, rotations
        self._norms: torch.Tensor | None = None
        self._rotated: dict[Rotation, Encoders] = {
            Rotation.IDENTITY: (keys[:, :span], values[:, :span])
        }
        for rotation, (encode_keys, encode_values) in rotations.items():
            self._rotated[rotation] = (
                kernels.rotate(keys[:, :span], encode_keys),
                kernels.rotate(values[:, :span], encode_values),
            )

    def value_norms(self) -> torch.Tensor:
        """``|V_t|``: float32 ``[kv_heads, span]``."""
        if self._norms is None:
            self._norms = self.values[:, : self.span].norm(dim=-1, dtype=torch.float32)
        return self._norms

    def rotated(self, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the span in a format's space, ``[kv_heads, span, rank]``."""
        keys, values = self._rotated[fmt.rotation]
        return keys[..., : fmt.rank], values[..., : fmt.rank]

    def rotate_queries(self, queries: torch.Tensor) -> dict[Rotation, torch.Tensor]:
        """Queries ``[kv_heads, rows, head_size]`` in the space of the keys of each rotation."""
        return {r: torch.bmm(queries.float(), keys) for r, (keys, _) in self.rotations.items()}
