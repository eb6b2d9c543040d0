"""Compress one prompt: losses, allocation and packing.

Layers are taken in groups of the kernels' ``layers_at_once``: the losses of a whole group first,
then one allocation for all of them, then packing. On CPU a group is one layer. On a GPU it is
many, for an allocation is a long row of launches whatever its size; a layer is then loaded and
rotated a second time for packing, so that one at a time is in memory.

Extra memory at its peak, whatever the batch:

- the packed lease;
- one layer: its keys and values as read, once more in float32 per rotation in use, and its keys as
  read back from each quantised format, float32;
- what the kernels need: a few tiles, or with the torch reference a few score matrices of ``window *
  group`` rows by the prompt's tokens, for as many heads as fit
  :data:`mdkv_vllm.core.kernels.SCORE_ELEMENTS`;
- for each token, head and layer of a group: its losses (4 bytes per option), its choice (8), and
  what the allocation needs of its own. For 32 layers and the default formats that is about as
  much as the float32 keys and values of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
"""Layer index to keys and values ``[kv_heads, prompt_tokens, head_size]``, innermost contiguous, on
the prompt's device; float32, or any float type that the kernels take. May be called up to three
times for a layer, and has to give the same each time."""

Encoders = tuple[torch.Tensor, torch.Tensor]
"""Encoders of K and V, each ``[kv_heads, head_size, rank]``."""


@dataclass
class CompressedPrompt:
    """A compressed prompt before it is written into its lease; on the prompt's device.

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
        loss: one of :data:`mdkv_vllm.core.loss.LOSSES`.
        scale: factor of the attention scores.
        basis: calibrated basis, copied to a device once; None where no format needs one or it
            is the prompt's own.
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
    _bases: dict[torch.device, Basis] = field(default_factory=dict, init=False, repr=False)

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
                ``window`` queries after rotary embedding; any float type that the kernels take.
            plan: the prompt's lease plan.
            keep_allocations: keep each layer's choices, for reports.

        Raises:
            ValueError: nothing may be dropped and the plan has too few pages for that.
        """
        layout, formats, device = self.layout, self.layout.formats, queries.device
        num_pages = plan.num_lease_blocks * layout.pages_per_block
        pages = torch.zeros(num_pages, layout.geometry.page_bytes, dtype=torch.uint8, device=device)
        tokens = torch.zeros(layout.table_shape[:3], dtype=torch.int64, device=device)
        result = CompressedPrompt(pages, tokens)
        first = torch.full((), layout.lists_first_page, dtype=torch.int64, device=device)
        budgets = self._page_budgets(plan)
        for start in range(0, layout.num_layers, self.kernels.layers_at_once):
            layers = range(layout.num_layers)[start : start + self.kernels.layers_at_once]
            spans = _Spans(self, load_layer, plan.span_tokens, layers)
            losses = [self._losses(spans.layer(i), queries[i], formats) for i in layers]
            chosen = self.kernels.allocate(losses, formats, budgets[layers.start : layers.stop])
            del losses
            for layer, allocation in zip(layers, chosen, strict=True):
                vectors = [spans.layer(layer).rotated(f) for f in formats.formats]
                self.kernels.pack(
                    vectors, formats, allocation.choice, layout.geometry, pages, first
                )
                tokens[layer] = allocation.tokens
                first = first + formats.pages(allocation.tokens).sum()
            for layer, encoders in spans.prompt_bases.items():
                self._store_basis(encoders, pages, layer)
            if keep_allocations:
                result.allocations += chosen
        table = layout.page_table(tokens).contiguous().view(torch.uint8).flatten()
        pages[: layout.table_pages].view(-1)[: table.numel()] = table
        return result

    def basis_on(self, device: torch.device) -> Basis:
        """The calibrated basis on a device."""
        assert self.basis is not None
        if device not in self._bases:
            self._bases[device] = self.basis.to(device)
        return self._bases[device]

    def _page_budgets(self, plan: LeasePlan) -> list[list[int]]:
        """Pages per layer: of every head by itself, or of all its heads together."""
        layout, formats = self.layout, self.layout.formats
        if self.heads is None:
            return layout.list_pages_per_layer(plan.num_lease_blocks).unsqueeze(1).tolist()
        most = formats.formats[-1].pages(plan.span_tokens)
        least = 0 if formats.drop else formats.formats[0].pages(plan.span_tokens)
        return self.heads.pages(layout.list_pages(plan.num_lease_blocks), least, most).tolist()

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
        error = torch.zeros(values.shape[:2], device=values.device)
        if fmt.rank < span.values.shape[-1]:
            # Orthonormal columns: what the projection loses is what it does not hold.
            lost = span.value_norms().square() - values.square().sum(-1)
            error = lost.clamp_min_(0)
        if fmt.quantised:
            keys, rounding = self.kernels.round_trip(keys, values, fmt.bits)
            error = error + rounding
        return Candidate(queries[..., : fmt.rank], keys, error.sqrt())

    def _store_basis(self, encoders: Encoders, pages: torch.Tensor, layer: int) -> None:
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
        rotations: dict[Rotation, Encoders],
        kernels: CompressionKernels,
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


class _Spans:
    """The layers of a group, of which one at a time is in memory.

    Args:
        compressor: whose formats' rotations are needed.
        load: reads a layer of the prompt.
        span: tokens that are compressed.
        layers: the group.

    Attributes:
        prompt_bases: encoders of the prompt's own basis by layer; empty where there is none.
    """

    def __init__(
        self, compressor: Compressor, load: LoadLayer, span: int, layers: Sequence[int]
    ) -> None:
        self._compressor, self._load, self._span = compressor, load, span
        self._loaded: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._rotated: tuple[int, _Span] | None = None
        self.prompt_bases: dict[int, Encoders] = {}
        if compressor.layout.prompt_basis_rank:
            self.prompt_bases = self._decompose(layers)

    def layer(self, layer: int) -> _Span:
        """A layer, with what its rotations make of it; kept until another is asked for."""
        if self._rotated is None or self._rotated[0] != layer:
            self._rotated = None  # before the next takes memory
            keys, values = self._read(layer)
            rotations = self._rotations(layer, keys)
            made = _Span(keys, values, self._span, rotations, self._compressor.kernels)
            self._rotated, self._loaded = (layer, made), None
        return self._rotated[1]

    def _read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None
            self._loaded = layer, self._load(layer)
        return self._loaded[1]

    def _decompose(self, layers: Sequence[int]) -> dict[int, Encoders]:
        """The prompt's own bases, of all the group's layers and heads in one call.

        The one place where compression waits for a GPU: torch looks whether every decomposition
        converged, once a call.
        """
        layout = self._compressor.layout
        moments = []
        for layer in layers:
            some = [x[:, : self._span].float() for x in self._read(layer)]
            moments.append(torch.stack([torch.bmm(x.transpose(1, 2), x) for x in some]))
        bases = principal_basis(torch.stack(moments), layout.prompt_basis_rank)
        bases = bases.to(layout.geometry.dtype).float()
        return {layer: (keys, values) for layer, (keys, values) in zip(layers, bases, strict=True)}

    def _rotations(self, layer: int, keys: torch.Tensor) -> dict[Rotation, Encoders]:
        """Encoders per rotation in use."""
        compressor = self._compressor
        rotations = {}
        if Rotation.HADAMARD in {f.rotation for f in compressor.layout.formats.formats}:
            matrix = hadamard(keys.shape[2], keys.device).expand(keys.shape[0], -1, -1)
            rotations[Rotation.HADAMARD] = (matrix, matrix)
        if layer in self.prompt_bases:
            rotations[Rotation.BASIS] = self.prompt_bases[layer]
        elif compressor.layout.formats.uses_basis:
            basis = compressor.basis_on(keys.device)
            rotations[Rotation.BASIS] = basis.keys[layer], basis.values[layer]
        return rotations
