"""Compression with the GPU kernels: many layers at once, read where they are in the paged cache.

The layers of a group are a dimension of every grid, and no copy of keys or values is made. Nothing
here waits for the device, and every shape follows from the prompt's length, so that a CUDA graph
could hold it. Memory per token, head and layer: what the window makes of it (4 bytes for its mass,
its value's norm, and two numbers per reduced format), its losses (4 per option), what
:mod:`.allocate` needs, 4 per format for the order of tokens, and the scales of its codes (4 per
reduced format), which packing takes from the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.basis import Basis, hadamard
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.prompt import PagedTokens, Prompt

from .allocate import allocate
from .log_sum_kernels import merge_log_sums, query_log_sums, split_queries
from .loss_kernel import finish_losses, plain_losses
from .pack import PackShape, pack_list_page
from .place import first_pages, order_tokens
from .prompt_shape import PromptShape
from .shapes import padded
from .token_sum_kernels import token_sums
from .value_error_kernels import value_errors
from .window_scores import LOG2_E

SHARE = 512
"""Tokens of a program: even a prompt of 4K at 8 heads fills 64 programs a layer."""
MAX_TILE_QUERIES = 32
LOSS_TOKENS = 256
SPLIT_TILE = 1024
NUM_WARPS = 8


@dataclass(frozen=True)
class Tiles:
    """How a pass over a prompt's tokens is cut, by what registers hold.

    Attributes:
        tokens: of a tile.
        queries: at most, of a tile.
        num_warps: of a program. One group of four, where it has a tile of 64 tokens to itself,
            sums over a vector without the other warps.
    """

    tokens: int
    queries: int
    num_warps: int

    @classmethod
    def of(cls, geometry: PageGeometry, scores_only: bool = False) -> Tiles:
        """For a cache; where vectors are but multiplied, and not converted, tiles are larger."""
        if padded(geometry.head_size) > 128 or geometry.dtype.itemsize > 2:
            return cls(16, MAX_TILE_QUERIES, 8)
        return cls(128, 64, 4) if scores_only else cls(64, MAX_TILE_QUERIES, 4)

    def options(self, count: int) -> dict[str, int]:
        """How to launch it for so many queries. A program has no room for more than one stage."""
        tile = min(padded(count), self.queries)
        return {
            "TILE": tile, "TOKENS": self.tokens, "SHARE": SHARE, "num_warps": self.num_warps,
            "num_stages": 1,
        }  # fmt: skip


@cache
def signs(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix without its norm, of 0, 1 and -1, in a type; a device gets it once."""
    return hadamard(size).sign().to(dtype).to(device)


Queries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""By KV head: ``[heads, window * group, dims]`` as they are; float32 ``[heads, window * group,
rotated_width]`` in the formats' spaces; and these as two float16, ``[heads, 2, ...]``."""


class TritonKernels:
    """:class:`mdkv_vllm.core.kernels.CompressionKernels` in Triton.

    A prompt's tokens have to be :class:`mdkv_vllm.core.prompt.PagedTokens`. The objective and the
    bound of an allocation are tensors of one element on the device, its choices int8.
    """

    layers_at_once = 64
    """All of most models'."""
    reads_pages = True

    def layers(self, prompt: Prompt, layers: range, bases: Basis | None) -> PagedGroup:
        """See :class:`mdkv_vllm.core.kernels.CompressionKernels`."""
        return PagedGroup(prompt, layers, bases)

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """See :func:`mdkv_vllm.kernels.triton.allocate.allocate`, near the reference's optimum."""
        return allocate(losses, formats, budgets)


class PagedGroup:
    """:class:`mdkv_vllm.core.kernels.LayersToCompress` of a prompt in the paged cache.

    Args:
        prompt: the prompt.
        layers: the group.
        bases: of these layers, where a format uses one.
    """

    def __init__(self, prompt: Prompt, layers: range, bases: Basis | None) -> None:
        tokens, layout = prompt.load, prompt.layout
        assert isinstance(tokens, PagedTokens), "GPU kernels read the paged cache"
        self._prompt, self._layers, self._tokens = prompt, layers, tokens
        heads, device = layout.num_kv_heads, tokens.kv_cache.device
        group = prompt.queries.shape[1] // heads
        rank = 0 if bases is None else bases.rank
        self._shape = PromptShape(layout, group, prompt.queries.dtype, prompt.loss, rank)
        self._matrix = signs(layout.geometry.head_size, layout.geometry.dtype, device)
        nothing = self._matrix
        self._bases = (nothing, nothing) if bases is None else (bases.keys, bases.values)
        self._heads = len(layers) * heads
        self._code_scales: torch.Tensor | None = None

    def losses(self) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.LayersToCompress`; all layers in one tensor."""
        shape, span, heads = self._shape, self._prompt.span, self._heads
        queries = self._queries()
        count, shares = queries[0].shape[1], triton.cdiv(span, SHARE)
        options = Tiles.of(shape.layout.geometry).options(count)
        log_sums = self._log_sums(queries)
        sums = self._floats(1 + shape.num_candidates, heads, span)
        masses = self._floats(heads, shares)
        code_scales = torch.empty(
            shape.num_candidates, 2, heads, span, dtype=torch.uint16, device=sums.device
        )
        token_sums[(shares, heads)](
            *self._source(), *queries, *self._spaces(0), self._layers.start, span, count,
            self._scale, log_sums, sums, masses, code_scales, SHAPE=shape, **options,
        )  # fmt: skip
        del options["TILE"]
        norms, errors = self._floats(heads, span), self._floats(shape.num_candidates, heads, span)
        value_errors[(shares, heads)](
            *self._source(), *self._spaces(1), self._layers.start, span, norms, errors, code_scales,
            SHAPE=shape, **options,
        )  # fmt: skip
        kv_heads = shape.heads
        losses = self._floats(len(self._layers), shape.num_options, kv_heads, span)
        tiles = triton.cdiv(span, LOSS_TOKENS)
        plain_losses[(tiles, heads)](
            sums, norms, errors, masses, span, shares, SHAPE=shape, TOKENS=LOSS_TOKENS
        )
        finish_losses[(tiles, kv_heads, len(self._layers))](
            norms, errors, span, losses, SHAPE=shape, TOKENS=LOSS_TOKENS
        )
        self._code_scales = code_scales
        return losses

    def pack(
        self, chosen: Sequence[Allocation], pages: torch.Tensor, first_page: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`mdkv_vllm.core.kernels.LayersToCompress`; takes the scales of the losses."""
        if self._code_scales is None:
            self.losses()
        formats, span = self._prompt.layout.formats, self._prompt.span
        number, device = len(formats.formats), pages.device
        choice = torch.stack([allocation.choice for allocation in chosen])
        tokens = torch.stack([allocation.tokens for allocation in chosen])
        order = torch.empty(self._heads, number, span, dtype=torch.int32, device=device)
        order_tokens[(self._heads,)](choice, span, order, FORMATS=number, num_warps=NUM_WARPS)
        table = torch.empty(self._heads, number, 2, dtype=torch.int64, device=device)
        end = torch.empty_like(first_page)
        first_pages[(1,)](
            tokens, formats.capacity(device), first_page, self._heads * number, table, end,
            FORMATS=number,
        )  # fmt: skip
        for index, fmt in enumerate(formats.formats):
            pack_list_page[(fmt.pages(span), self._heads)](
                *self._source(), self._matrix, *self._bases, self._layers.start, order, table, span,
                self._code_scales, pages, pages.shape[0], LIST=PackShape.of(self._shape, index),
                FORMAT=index, FORMATS=number, SHAPE=self._shape,
            )  # fmt: skip
        return end

    @property
    def _scale(self) -> float:
        return self._prompt.scale * LOG2_E.value

    def _source(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tokens.kv_cache, self._tokens.blocks

    def _spaces(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._matrix, self._bases[side]

    def _floats(self, *sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=self._tokens.kv_cache.device)

    def _queries(self) -> Queries:
        shape, some = self._shape, slice(self._layers.start, self._layers.stop)
        grouped = self._prompt.queries[some].unflatten(1, (shape.heads, shape.group))
        queries = grouped.transpose(2, 3).reshape(self._heads, -1, shape.dims)
        plain = queries.float()
        spaces = [plain @ hadamard(shape.dims, plain.device)]
        if shape.basis_rank:
            spaces.append(plain @ self._bases[0].flatten(0, 1))
        rotated = torch.cat(spaces, -1) if len(spaces) > 1 else spaces[0]
        each = rotated[0].numel()
        halves = torch.empty(self._heads, 2, each, dtype=torch.float16, device=rotated.device)
        split_queries[(triton.cdiv(each, SPLIT_TILE), self._heads)](
            rotated, each, halves, TILE=SPLIT_TILE
        )
        return queries, rotated, halves

    def _log_sums(self, queries: Queries) -> torch.Tensor:
        """float32 ``[1 + candidates, heads, queries]``, base 2, of those that the loss reads."""
        shape, span, count = self._shape, self._prompt.span, queries[0].shape[1]
        rest = self._parts(queries, span, self._tokens.tokens, -1)
        candidates = range(-1, shape.num_candidates if shape.together else 0)
        log_sums = self._floats(len(candidates), self._heads, count)
        for candidate in candidates:
            parts = self._parts(queries, 0, span, candidate)
            merge_log_sums[(triton.cdiv(count, MAX_TILE_QUERIES), self._heads)](
                parts, rest, count, parts.shape[1], rest.shape[1], log_sums[candidate + 1],
                TILE=MAX_TILE_QUERIES, num_warps=2,
            )  # fmt: skip
        return log_sums

    def _parts(self, queries: Queries, first: int, last: int, candidate: int) -> torch.Tensor:
        """float32 ``[heads, shares, queries]``: log-sum-exps over shares of some tokens, base 2."""
        shape, count = self._shape, queries[0].shape[1]
        shares = triton.cdiv(last - first, SHARE)
        options = Tiles.of(shape.layout.geometry, candidate < 0).options(count)
        parts = self._floats(self._heads, shares, count)
        first_query = self._tokens.tokens - count // shape.group
        query_log_sums[(shares, triton.cdiv(count, options["TILE"]), self._heads)](
            *self._source(), *queries, *self._spaces(0), self._layers.start, first, last, count,
            first_query, self._scale, parts, SHAPE=shape, CANDIDATE=candidate,
            CAUSAL=last > first_query, **options,
        )  # fmt: skip
        return parts
