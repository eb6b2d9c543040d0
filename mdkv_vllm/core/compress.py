"""Compress one segment: losses, allocation and packing.

Layers are taken in groups of the kernels' ``layers_at_once``: the losses of a whole group first,
then one allocation for all of them, then packing. On CPU a group is one layer
(:mod:`mdkv_vllm.core.layers`). On a GPU it is many, for a row of launches takes its time whatever
its size.

Extra memory at its peak, whatever the batch:

- the packed lease, from a segment's first group of layers to its last;
- what the kernels need: on CPU one layer in float32 (see :mod:`mdkv_vllm.core.layers`) and a few
  tiles, or with the torch reference a few score matrices of ``window * group`` rows by the prompt's
  tokens, for as many heads as fit :data:`mdkv_vllm.core.kernels.SCORE_ELEMENTS`; on GPUs see
  :mod:`mdkv_vllm.kernels.triton.compress`;
- for each token, head and layer of a group: its losses (4 bytes per option), its choice, and what
  the allocation needs of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import CompressionKernels, ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import Loss
from mdkv_vllm.core.prompt import LoadLayer, Prompt
from mdkv_vllm.core.segment import Segment


@dataclass
class CompressedSegment:
    """A compressed segment before it is written into its lease; on its tokens' device.

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

    Work is done on the device of the prompt's queries. Nothing here waits for it but the
    decomposition of a prompt's own basis (``layout.prompt_basis_rank``), once per group of layers,
    and whatever the kernels do.

    Attributes:
        layout: what leases look like.
        loss: what tokens cost.
        scale: factor of the attention scores.
        basis: calibrated basis, copied to a device once; None where no format needs one or it
            is the prompt's own.
        heads: how heads share a lease's pages (MixedDimKV-H); None: layers share them evenly, and
            the heads of a layer compete for theirs (MixedDimKV).
        kernels: how the slow parts are done; plain torch unless others are given.
    """

    layout: LeaseLayout
    loss: Loss
    scale: float
    basis: Basis | None = None
    heads: HeadBudgets | None = None
    kernels: CompressionKernels = field(default_factory=ReferenceKernels)
    _bases: dict[torch.device, Basis] = field(default_factory=dict, init=False, repr=False)

    def compress(
        self,
        load_layer: LoadLayer,
        queries: torch.Tensor,
        segment: Segment,
        keep_allocations: bool = False,
    ) -> CompressedSegment:
        """Compress a segment into the pages of its lease; see :meth:`start`."""
        compression = self.start(load_layer, queries, segment, keep_allocations)
        while compression.parts_left:
            compression.advance()
        return compression.result()

    def start(
        self,
        load_layer: LoadLayer,
        queries: torch.Tensor,
        segment: Segment,
        keep_allocations: bool = False,
    ) -> Compression:
        """Begin to compress a segment.

        Args:
            load_layer: reads one layer of the segment from the cache.
            queries: float32 ``[layers, query_heads, window, head_size]``, the segment's window
                queries after rotary embedding; any float type that the kernels take.
            segment: how many tokens it has and how many blocks it keeps.
            keep_allocations: keep each layer's choices, for reports.
        """
        return Compression(self, load_layer, queries, segment, keep_allocations)

    @property
    def parts(self) -> int:
        """Groups of layers of a segment."""
        return -(-self.layout.num_layers // self.kernels.layers_at_once)

    def basis_on(self, device: torch.device) -> Basis:
        """The calibrated basis on a device."""
        assert self.basis is not None
        if device not in self._bases:
            self._bases[device] = self.basis.to(device)
        return self._bases[device]

    def page_budgets(self, segment: Segment) -> list[list[int]]:
        """Pages per layer: of every head by itself, or of all its heads together."""
        layout, formats = self.layout, self.layout.formats
        if self.heads is None:
            return layout.list_pages_per_layer(segment.num_lease_blocks).unsqueeze(1).tolist()
        most = formats.richest.pages(segment.span_tokens)
        least = 0 if formats.drop else formats.cheapest.pages(segment.span_tokens)
        return self.heads.pages(layout.list_pages(segment.num_lease_blocks), least, most).tolist()


class Compression:
    """A segment that is being compressed, one group of layers after the other.

    Its tokens may not change in the cache until it is done, but whatever else happens between two
    groups changes nothing.

    Args:
        compressor: what does not change from segment to segment.
        load_layer: see :meth:`Compressor.start`, as the other arguments.
    """

    def __init__(
        self,
        compressor: Compressor,
        load_layer: LoadLayer,
        queries: torch.Tensor,
        segment: Segment,
        keep_allocations: bool,
    ) -> None:
        layout, device = compressor.layout, queries.device
        num_pages = segment.num_lease_blocks * layout.pages_per_block
        shape = (num_pages, layout.geometry.page_bytes)
        self._compressor, self._keep_allocations = compressor, keep_allocations
        self._pages = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._first = torch.full((), layout.lists_first_page, dtype=torch.int64, device=device)
        self._prompt = Prompt(
            layout,
            compressor.loss,
            compressor.scale,
            compressor.basis_on(device) if compressor.basis is not None else None,
            load_layer,
            queries,
            segment.span_tokens,
        )
        self._budgets = compressor.page_budgets(segment)
        self._done = 0
        self._tokens = list[torch.Tensor]()
        self._allocations = list[Allocation]()

    @property
    def parts_left(self) -> int:
        """Groups of layers that are still to be done."""
        return self._compressor.parts - self._done

    def advance(self) -> None:
        """Compress the next group of layers.

        Raises:
            ValueError: nothing may be dropped and the segment has too few pages for that.
        """
        layout, kernels = self._compressor.layout, self._compressor.kernels
        start = self._done * kernels.layers_at_once
        layers = range(layout.num_layers)[start : start + kernels.layers_at_once]
        bases = self._prompt.bases(layers)
        group = kernels.layers(self._prompt, layers, bases)
        budgets = self._budgets[layers.start : layers.stop]
        chosen = kernels.allocate(group.losses(), layout.formats, budgets)
        self._first = group.pack(chosen, self._pages, self._first)
        self._tokens += [allocation.tokens for allocation in chosen]
        if layout.prompt_basis_rank:
            assert bases is not None
            self._store_bases(bases, layers)
        if self._keep_allocations:
            self._allocations += chosen
        self._done += 1

    def result(self) -> CompressedSegment:
        """The lease, once no parts are left."""
        layout, tokens = self._compressor.layout, torch.stack(self._tokens)
        table = layout.page_table(tokens).contiguous().view(torch.uint8).flatten()
        self._pages[: layout.table_pages].view(-1)[: table.numel()] = table
        return CompressedSegment(self._pages, tokens, self._allocations)

    def _store_bases(self, bases: Basis, layers: range) -> None:
        """Write prompt bases, ``[rank][head_size]`` of K then V per layer and head."""
        layout = self._compressor.layout
        both = torch.stack((bases.keys, bases.values), 2).transpose(-1, -2)
        raw = both.to(layout.geometry.dtype).contiguous().view(torch.uint8).flatten(2).flatten(0, 1)
        per_head, heads = layout.basis_pages_per_head, layout.num_kv_heads
        first = layout.basis_first_page + layers.start * heads * per_head
        room = self._pages[first : first + len(raw) * per_head].view(len(raw), -1)
        room[:, : raw.shape[1]] = raw
