"""Compress one prompt: losses, allocation and packing, a layer at a time.

Extra memory at its peak, whatever the batch: the packed lease, plus one layer's keys and
values in float32 (three copies: as read, rotated, as read back from a format), plus a few
float32 score matrices of ``window * group`` rows by the prompt's tokens for as many heads as
fit :data:`SCORE_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mdkv_vllm.core.allocate import Allocation, allocate
from mdkv_vllm.core.basis import Basis, hadamard, principal_basis
from mdkv_vllm.core.formats import FormatSet, PageFormat, PageGeometry, Rotation
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.loss import Candidate, token_losses, window_logits
from mdkv_vllm.core.packing import pack_list
from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.core.quantise import dequantise, quantise

SCORE_ELEMENTS = 1 << 24
"""Most elements of one score matrix (64 MiB in float32); more heads are taken in turns."""

LoadLayer = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Layer index to float32 keys and values ``[kv_heads, prompt_tokens, head_size]``."""

PackLists = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PageFormat, PageGeometry], torch.Tensor
]
"""Keys and values ``[lists, most_tokens, rank]``, int32 tokens ``[lists]``, format, geometry to
uint8 pages ``[pages, page_bytes]``, the lists' pages one after the other."""


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
        pack: packs many lists; the torch reference unless a kernel is given.
    """

    layout: LeaseLayout
    loss: str
    scale: float
    basis: Basis | None = None
    pack: PackLists | None = None

    def compress(
        self,
        load_layer: LoadLayer,
        queries: torch.Tensor,
        plan: LeasePlan,
        formats: FormatSet,
        keep_allocations: bool = False,
    ) -> CompressedPrompt:
        """Compress a prompt into the pages of its lease.

        Args:
            load_layer: reads one layer of the prompt from the cache.
            queries: float32 ``[layers, query_heads, window, head_size]``, the prompt's last
                ``window`` queries after rotary embedding.
            plan: the prompt's lease plan.
            formats: formats allowed for this prompt; a subset of the layout's, in order.
            keep_allocations: keep each layer's choices, for reports.
        """
        layout, geometry = self.layout, self.layout.geometry
        num_pages = plan.num_lease_blocks * layout.pages_per_block
        pages = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
        columns = [layout.formats.formats.index(f) for f in formats.formats]
        tokens = torch.zeros(layout.table_shape[:3], dtype=torch.int64)
        result = CompressedPrompt(pages, tokens)
        first = layout.lists_first_page
        budgets = layout.list_pages_per_layer(plan.num_lease_blocks).tolist()
        for layer, budget in enumerate(budgets):
            keys, values = load_layer(layer)
            rotations = self._rotations(layer, keys, values, plan.span_tokens, formats)
            span = _Span(keys, values, plan.span_tokens, rotations)
            losses = self._losses(span, queries[layer], formats)
            chosen = allocate(losses, formats, budget)
            tokens[layer][:, columns] = chosen.tokens
            self._pack_layer(span, chosen, formats, columns, pages, first, layer)
            capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
            first += int(((chosen.tokens + capacity - 1) // capacity).sum())
            if layout.prompt_basis_rank:
                self._store_basis(rotations[Rotation.BASIS], pages, layer)
            if keep_allocations:
                result.allocations.append(chosen)
        table = layout.page_table(tokens).contiguous().view(torch.uint8).flatten()
        pages[: layout.table_pages].view(-1)[: table.numel()] = table
        return result

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

    def _losses(
        self, span: _Span, queries: torch.Tensor, formats: FormatSet
    ) -> torch.Tensor:
        """Losses of one layer, float32 ``[options, kv_heads, span]``."""
        heads, num_tokens, head_size = span.keys.shape
        grouped = queries.view(heads, -1, *queries.shape[1:]).transpose(1, 2)
        rows = grouped.shape[1] * grouped.shape[2]
        turns = max(1, SCORE_ELEMENTS // (rows * num_tokens))
        parts = []
        for start in range(0, heads, turns):
            part, mine = span.heads(start, start + turns), grouped[start : start + turns]
            flat = mine.flatten(1, 2)
            losses = token_losses(
                window_logits(mine, part.keys, self.scale),
                part.value_norms(),
                [part.candidate(f, flat) for f in formats.formats if f.name != "full"],
                self.scale,
                self.loss,
                formats.drop,
            )
            if any(f.name == "full" for f in formats.formats):
                at = formats.names.index("full")
                losses = torch.cat((losses[:at], torch.zeros_like(losses[:1]), losses[at:]))
            parts.append(losses)
        return torch.cat(parts, dim=1)

    def _pack_layer(
        self,
        span: _Span,
        chosen: Allocation,
        formats: FormatSet,
        columns: list[int],
        pages: torch.Tensor,
        first: int,
        layer: int,
    ) -> None:
        """Pack one layer's lists, sorted by head and then format, from page ``first`` on."""
        geometry, heads = self.layout.geometry, chosen.choice.shape[0]
        capacity = torch.tensor([f.tokens_per_page for f in formats.formats])
        list_pages = (chosen.tokens + capacity - 1) // capacity
        ends = first + list_pages.flatten().cumsum(0).view_as(list_pages)
        for index, fmt in enumerate(formats.formats):
            counts = chosen.tokens[:, index]
            most = int(counts.max())
            if most == 0:
                continue
            order = (chosen.choice != index).int().argsort(dim=1, stable=True)[:, :most]
            keys, values = span.rotated(fmt)
            listed = [x.gather(1, order.unsqueeze(-1).expand(-1, -1, fmt.rank)) for x in (keys, values)]
            packed = (self.pack or pack_lists)(
                listed[0], listed[1], counts.to(torch.int32), fmt, geometry
            )
            starts = (ends - list_pages)[:, index]
            where = torch.cat(
                [starts[h] + torch.arange(int(list_pages[h, index])) for h in range(heads)]
            )
            pages[where] = packed

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
        self._rotated: dict[Rotation, tuple[torch.Tensor, torch.Tensor]] = {
            Rotation.IDENTITY: (keys[:, :span], values[:, :span])
        }
        for rotation, (encode_keys, encode_values) in rotations.items():
            self._rotated[rotation] = (
                torch.bmm(keys[:, :span], encode_keys),
                torch.bmm(values[:, :span], encode_values),
            )

    def heads(self, start: int, stop: int) -> _Span:
        """The same for some of the heads, sharing memory."""
        part = object.__new__(_Span)
        part.keys, part.values, part.span = self.keys[start:stop], self.values[start:stop], self.span
        part.rotations = {r: (k[start:stop], v[start:stop]) for r, (k, v) in self.rotations.items()}
        part._rotated = {r: (k[start:stop], v[start:stop]) for r, (k, v) in self._rotated.items()}
        return part

    def value_norms(self) -> torch.Tensor:
        """``|V_t|``: float32 ``[kv_heads, span]``."""
        return self.values[:, : self.span].norm(dim=-1)

    def rotated(self, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the span in a format's space, ``[kv_heads, span, rank]``."""
        keys, values = self._rotated[fmt.rotation]
        return keys[..., : fmt.rank], values[..., : fmt.rank]

    def candidate(self, fmt: PageFormat, queries: torch.Tensor) -> Candidate:
        """The span as ``fmt`` would hold it, with the queries brought into its space."""
        keys, values = self.rotated(fmt)
        rotated_queries = torch.bmm(queries, self.rotations[fmt.rotation][0][..., : fmt.rank])
        error = torch.zeros(values.shape[:2])
        if fmt.rank < self.values.shape[-1]:
            # Orthonormal columns: what the projection loses is what it does not hold.
            full = self.values[:, : self.span].square().sum(-1)
            error = (full - values.square().sum(-1)).clamp_min_(0)
        if fmt.quantised:
            keys = dequantise(*quantise(keys, fmt.bits), fmt.zero)
            read = dequantise(*quantise(values, fmt.bits), fmt.zero)
            error = error + (values - read).square().sum(-1)
        return Candidate(rotated_queries, keys, error.sqrt())


def pack_lists(
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: torch.Tensor,
    fmt: PageFormat,
    geometry: PageGeometry,
) -> torch.Tensor:
    """Pack many lists with the torch reference; see :data:`PackLists`."""
    lists = [
        pack_list(keys[i, :n], values[i, :n], fmt, geometry) for i, n in enumerate(counts.tolist())
    ]
    return torch.cat(lists)
