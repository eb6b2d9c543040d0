"""Compress one prompt: losses, allocation and packing, a layer at a time.

Extra memory at its peak, whatever the batch: the packed lease, plus one layer in float32 (its
keys and values as read and once per rotation in use, its keys as read back from each
quantised format), plus what the kernels need: a few tiles, or with the torch reference a few
score matrices of ``window * group`` rows by the prompt's tokens, for as many heads as fit
:data:`mdkv_vllm.core.kernels.SCORE_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.basis import Basis, hadamard, principal_basis
from mdkv_vllm.core.formats import FormatSet, PageFormat, Rotation
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import CompressionKernels, ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.loss import Candidate, losses_from_sums
from mdkv_vllm.core.plan import LeasePlan

LoadLayer = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Layer index to float32 keys and values ``[kv_heads, prompt_tokens, head_size]``."""


@dataclass
class CompressedPrompt:
    """A compressed prompt before it is written into its lease.

    Attributes:
        pages: uint8 ``[num_lease_blocks * layers * kv_heads, page_bytes]``.
        tokens: int64 ``[layers, kv_heads, formats]``, tokens of each list.
        allocations: what was chosen in each layer, if asked for.
    """

    pages: torch.Tensor
    tokens: torch.Tensor
    allocations: list[Allocation] = field(default_factory=list)


@dataclass(frozen=True)
class Compressor:
    """Everything about compression that does not change from prompt to prompt.

    Attributes:
        layout: what leases look like.
        loss: one of :data:`mdkv_vllm.core.loss.LOSSES`.
        scale: factor of the attention scores.
        basis: calibrated basis; None where no format needs one or it is the prompt's own.
        heads: how heads share a lease's pages (MixedDimKV-H); None: layers share them evenly, and
            the heads of a layer compete for theirs (MixedDimKV).
        kernels: how the slow parts are done; plain torch unless others are given.
    """

    layout: LeaseLayout
    loss: str
    scale: float
    basis: Basis | None = None
    heads: HeadBudgets | None = None
    kernels: CompressionKernels = field(default_factory=ReferenceKernels)

    def compress(
        self,
        load_layer: LoadLayer,
        queries: torch.Tensor,
        plan: LeasePlan,
        keep_allocations: bool = False,
    ) -> CompressedPrompt:
        """Compress a prompt into the pages of its lease.

        Args:
            load_layer: reads one layer of the prompt from the cache.
            queries: float32 ``[layers, query_heads, window, head_size]``, the prompt's last
                ``window`` queries after rotary embedding.
            plan: the prompt's lease plan.
            keep_allocations: keep each layer's choices, for reports.
        """
        layout, geometry, formats = self.layout, self.layout.geometry, self.layout.formats
        num_pages = plan.num_lease_blocks * layout.pages_per_block
        pages = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
        capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
        tokens = torch.zeros(layout.table_shape[:3], dtype=torch.int64)
        result = CompressedPrompt(pages, tokens)
        first = layout.lists_first_page
        for layer, budgets in enumerate(self._page_budgets(plan)):
            keys, values = load_layer(layer)
            rotations = self._rotations(layer, keys, values, plan.span_tokens, formats)
            span = _Span(keys, values, plan.span_tokens, rotations)
            losses = self._losses(span, queries[layer], formats)
            chosen = self._allocate(losses, budgets)
            tokens[layer] = chosen.tokens
            vectors = [span.rotated(f) for f in formats.formats]
            self.kernels.pack(vectors, formats, chosen.choice, geometry, pages[first:])
            first += int(((chosen.tokens + capacity - 1) // capacity).sum())
            if layout.prompt_basis_rank:
                self._store_basis(rotations[Rotation.BASIS], pages, layer)
            if keep_allocations:
                result.allocations.append(chosen)
        table = layout.page_table(tokens).contiguous().view(torch.uint8).flatten()
        pages[: layout.table_pages].view(-1)[: table.numel()] = table
        return result

    def _page_budgets(self, plan: LeasePlan) -> list[list[int]]:
        """Pages per layer: of every head by itself, or of all its heads together."""
        layout, formats = self.layout, self.layout.formats
        if self.heads is None:
            return layout.list_pages_per_layer(plan.num_lease_blocks).unsqueeze(1).tolist()
        most = formats.formats[-1].pages(plan.span_tokens)
        least = 0 if formats.drop else formats.formats[0].pages(plan.span_tokens)
        return self.heads.pages(layout.list_pages(plan.num_lease_blocks), least, most).tolist()

    def _allocate(self, losses: torch.Tensor, budgets: list[int]) -> Allocation:
        """Choose formats for one layer, its heads divided evenly among the budgets."""
        parts = [
            self.kernels.allocate(part, self.layout.formats, budget)
            for part, budget in zip(losses.chunk(len(budgets), dim=1), budgets, strict=True)
        ]
        return Allocation(
            torch.cat([part.choice for part in parts]),
            torch.cat([part.tokens for part in parts]),
            sum(part.objective for part in parts),
            sum(part.lower_bound for part in parts),
        )

    def _rotations(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        span: int,
        formats: FormatSet,
    ) -> dict[Rotation, tuple[torch.Tensor, torch.Tensor]]:
        """Encoders of K and V, each ``[kv_heads, head_size, rank]``, per rotation in use."""
        used = {f.rotation for f in formats.formats}
        rotations = {}
        heads, head_size = keys.shape[0], keys.shape[2]
        if Rotation.HADAMARD in used:
            matrix = hadamard(head_size).expand(heads, -1, -1)
            rotations[Rotation.HADAMARD] = (matrix, matrix)
        if rank := self.layout.prompt_basis_rank:
            moments = [torch.bmm(x[:, :span].transpose(1, 2), x[:, :span]) for x in (keys, values)]
            encoders = [principal_basis(m, rank).to(self.layout.geometry.dtype) for m in moments]
            rotations[Rotation.BASIS] = (encoders[0].float(), encoders[1].float())
        elif Rotation.BASIS in used:
            assert self.basis is not None
            rotations[Rotation.BASIS] = (self.basis.keys[layer], self.basis.values[layer])
        return rotations

    def _losses(self, span: _Span, queries: torch.Tensor, formats: FormatSet) -> torch.Tensor:
        """Losses of one layer, float32 ``[options, kv_heads, span]``."""
        heads = span.keys.shape[0]
        grouped = queries.unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
        rotated = span.rotate_queries(grouped.flatten(1, 2))
        candidates = [
            self._candidate(span, f, rotated[f.rotation])
            for f in formats.formats
            if f.name != "full"
        ]
        sums = self.kernels.loss_sums(
            grouped, span.keys, candidates, span.span, self.scale, self.loss
        )
        errors = [c.value_error for c in candidates]
        losses = losses_from_sums(sums, span.value_norms(), errors, self.loss, formats.drop)
        if "full" in formats.names:
            at = formats.names.index("full")
            losses = torch.cat((losses[:at], torch.zeros_like(losses[:1]), losses[at:]))
        return losses

    def _candidate(self, span: _Span, fmt: PageFormat, queries: torch.Tensor) -> Candidate:
        """The span as ``fmt`` would hold it; queries ``[kv_heads, rows, rank or more]``."""
        keys, values = span.rotated(fmt)
        error = torch.zeros(values.shape[:2])
        if fmt.rank < span.values.shape[-1]:
            # Orthonormal columns: what the projection loses is what it does not hold.
            lost = span.value_norms().square() - values.square().sum(-1)
            error = lost.clamp_min_(0)
        if fmt.quantised:
            keys, rounding = self.kernels.round_trip(keys, values, fmt.bits)
            error = error + rounding
        return Candidate(queries[..., : fmt.rank], keys, error.sqrt())

    def _store_basis(
        self, encoders: tuple[torch.Tensor, torch.Tensor], pages: torch.Tensor, layer: int
    ) -> None:
        """Write a layer's prompt basis, ``[rank][head_size]`` of K then V per head."""
        layout = self.layout
        both = torch.stack(encoders, 1).transpose(-1, -2).to(layout.geometry.dtype).contiguous()
        raw = both.view(torch.uint8).flatten(1)
        per_head = layout.basis_pages_per_head
        first = layout.basis_first_page + layer * layout.num_kv_heads * per_head
        room = pages[first : first + layout.num_kv_heads * per_head].view(layout.num_kv_heads, -1)
        room[:, : raw.shape[1]] = raw


class _Span:
    """One layer's prompt, with rotated copies of its span made once."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        span: int,
        rotations: dict[Rotation, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.keys, self.values, self.span, self.rotations = keys, values, span, rotations
        self._norms = values[:, :span].norm(dim=-1)
        self._rotated: dict[Rotation, tuple[torch.Tensor, torch.Tensor]] = {
            Rotation.IDENTITY: (keys[:, :span], values[:, :span])
        }
        for rotation, (encode_keys, encode_values) in rotations.items():
            self._rotated[rotation] = (
                torch.bmm(keys[:, :span], encode_keys),
                torch.bmm(values[:, :span], encode_values),
            )

    def value_norms(self) -> torch.Tensor:
        """``|V_t|``: float32 ``[kv_heads, span]``."""
        return self._norms

    def rotated(self, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the span in a format's space, ``[kv_heads, span, rank]``."""
        keys, values = self._rotated[fmt.rotation]
        return keys[..., : fmt.rank], values[..., : fmt.rank]

    def rotate_queries(self, queries: torch.Tensor) -> dict[Rotation, torch.Tensor]:
        """Queries ``[kv_heads, rows, head_size]`` in the space of the keys of each rotation."""
        return {r: torch.bmm(queries, keys) for r, (keys, _) in self.rotations.items()}
