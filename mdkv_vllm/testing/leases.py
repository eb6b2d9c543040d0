"""Random leases and tails in a poisoned cache, to test decode kernels against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core import reference
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.formats import PageFormat, PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.packing import pack_list, pack_rows

EVERY_FORMAT = ("r16", "r32i8", "i8", "i4", "i2", "full")
"""A format of every kind and width."""
POISON = 0xFF
"""Fills what no kernel may use; a NaN in every element type and in every scale."""


@dataclass
class Model:
    """Sizes of a test model.

    Attributes:
        names: formats beside those of the tail.
        head_size: dimensions of a head.
        group: query heads per KV head.
        kv_heads: KV heads per layer.
        layers: layers.
        block_size: tokens of a block.
        dtype: of the cache.
        query_dtype: of queries and outputs.
        prompt_basis_rank: directions of each prompt's own basis; 0 for a calibrated one.
        max_leases: leases of a request at most.
    """

    names: tuple[str, ...] = ("i4", "i8", "full")
    head_size: int = 64
    group: int = 3
    kv_heads: int = 2
    layers: int = 2
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    query_dtype: torch.dtype = torch.float32
    prompt_basis_rank: int = 0
    max_leases: int = 1

    def layout(self) -> LeaseLayout:
        """What its leases look like."""
        geometry = PageGeometry(self.block_size, self.head_size, self.dtype)
        formats = parse_formats(self.names, geometry)
        return LeaseLayout(geometry, formats, self.layers, self.kv_heads, self.prompt_basis_rank)


@dataclass
class Request:
    """One block-table row: leases and tail.

    Attributes:
        lease_blocks: blocks of its lease, 0 for none, or of each of its leases.
        tail_tokens: tokens behind them.
        freed_blocks: before every lease.
        fill: share of the lists' pages in use, of every lease or of each; 0 leaves lists empty.
    """

    lease_blocks: int | tuple[int, ...]
    tail_tokens: int
    freed_blocks: int = 3
    fill: float | tuple[float, ...] = 0.9

    @property
    def leases(self) -> list[tuple[int, float]]:
        """Blocks and fill of each lease."""
        blocks = self.lease_blocks
        if isinstance(blocks, int):
            blocks = (blocks,) if blocks else ()
        fill = self.fill if isinstance(self.fill, tuple) else (self.fill,) * len(blocks)
        return list(zip(blocks, fill, strict=True))

    def entries(self, block_size: int) -> int:
        """Entries of the block table that it takes."""
        leases = sum(self.freed_blocks + blocks for blocks, _ in self.leases)
        return leases + -(-self.tail_tokens // block_size)


class Case:
    """A cache with some requests in it, poisoned wherever nothing was written.

    A subclass says how to call the kernel under test.
    """

    lse_error = 2e-4
    """Largest absolute error of a log-sum-exp."""

    def __init__(self, model: Model, requests: list[Request], seed: int = 0) -> None:
        self.model, self.layout = model, model.layout()
        self.gen = torch.Generator().manual_seed(seed)
        rank = self.layout.formats.basis_rank
        shape = (model.layers, model.kv_heads, model.head_size, model.head_size)
        self.basis = Basis(
            *(torch.linalg.qr(self.randn(*shape))[0][..., :rank].contiguous() for _ in range(2))
        )
        entries = [request.entries(model.block_size) for request in requests]
        num_blocks = sum(entries) + 1
        pages = self.layout.pages_per_block
        self.kv_cache = torch.full(
            (num_blocks, pages, self.layout.geometry.page_bytes), POISON, dtype=torch.uint8
        ).view(model.dtype)
        self.kv_cache = self.kv_cache.view(num_blocks, pages, model.block_size, 2 * model.head_size)
        free = torch.randperm(num_blocks, generator=self.gen).tolist()
        self.block_table = torch.full((len(requests), max([*entries, 1])), -1, dtype=torch.int32)
        self.leases = torch.zeros(len(requests), model.max_leases, 2, dtype=torch.int32)
        self.totals: list[int] = []
        for row, request in enumerate(requests):
            self.add_request(row, request, free)

    def randn(self, *shape: int) -> torch.Tensor:
        """Random numbers of this case."""
        return torch.randn(*shape, generator=self.gen)

    def add_request(self, row: int, request: Request, free: list[int]) -> None:
        """Write a request into some of the free blocks."""
        model, end = self.model, 0
        for index, (num_blocks, fill) in enumerate(request.leases):
            first = end + request.freed_blocks
            end = first + num_blocks
            blocks = [free.pop() for _ in range(num_blocks)]
            self.block_table[row, first:end] = torch.tensor(blocks, dtype=torch.int32)
            self.leases[row, index] = torch.tensor([first, end])
            self.fill_lease(blocks, fill)
        tail = [free.pop() for _ in range(-(-request.tail_tokens // model.block_size))]
        self.block_table[row, end : end + len(tail)] = torch.tensor(tail, dtype=torch.int32)
        for t in range(request.tail_tokens):
            slot = self.randn(self.layout.pages_per_block, 2 * model.head_size)
            self.kv_cache[tail[t // model.block_size], :, t % model.block_size] = slot.to(
                model.dtype
            )
        self.totals.append(end * model.block_size + request.tail_tokens)

    def fill_lease(self, blocks: list[int], fill: float) -> None:
        """Write random lists, and what describes them, into the blocks of a lease."""
        layout = self.layout
        pages = torch.full(
            (len(blocks) * layout.pages_per_block, layout.geometry.page_bytes),
            POISON,
            dtype=torch.uint8,
        )
        tokens = self.draw_tokens(len(blocks), fill)
        table = layout.page_table(tokens)
        raw = table.contiguous().view(torch.uint8).flatten()
        pages.view(-1)[: raw.numel()] = raw
        if layout.prompt_basis_rank:
            self.write_prompt_basis(pages)
        for layer, head, column in torch.cartesian_prod(
            *(torch.arange(n) for n in layout.table_shape[:3])
        ).tolist():
            fmt, count = layout.formats.formats[column], int(tokens[layer, head, column])
            at = int(table[layer, head, column, 1])
            keys, values = self.randn(count, fmt.rank), self.randn(count, fmt.rank)
            # Vectors of nothing, and of next to nothing, weigh as much as others.
            tiny = torch.rand(count, generator=self.gen)
            values[tiny < 0.1] = 0
            values[tiny > 0.95] *= 1e-35
            packed = pack_list(keys, values, fmt, layout.geometry)
            if count % fmt.tokens_per_page:
                poison_unused(packed[-1], count % fmt.tokens_per_page, fmt, layout.geometry)
            pages[at : at + len(packed)] = packed
        shaped = pages.view(self.model.dtype).view(len(blocks), *self.kv_cache.shape[1:])
        self.kv_cache[blocks] = shaped

    def draw_tokens(self, lease_blocks: int, fill: float) -> torch.Tensor:
        """Tokens of each list of a lease: int64 ``[layers, kv_heads, formats]``."""
        layout = self.layout
        capacity = layout.formats.capacity(torch.device("cpu"))
        share = torch.rand(layout.table_shape[:3], generator=self.gen)
        share[torch.rand(share.shape, generator=self.gen) < 0.15] = 0  # some empty lists
        lists = layout.list_pages(lease_blocks)
        page_counts = (share / share.sum().clamp_min(1e-9) * lists * fill).floor()
        last = torch.rand(share.shape, generator=self.gen)
        tokens = ((page_counts - last).clamp_min(0) * capacity).ceil().long()
        tokens[(tokens > 0) & (torch.rand(share.shape, generator=self.gen) < 0.1)] = 1
        return tokens

    def write_prompt_basis(self, pages: torch.Tensor) -> None:
        """Write a random orthonormal basis for every layer and head."""
        layout, model = self.layout, self.model
        per_head, rank = layout.basis_pages_per_head, layout.prompt_basis_rank
        for pair in range(layout.pages_per_block):
            square = self.randn(2, model.head_size, model.head_size)
            rows = torch.linalg.qr(square)[0][..., :rank].transpose(-1, -2)
            raw = rows.to(model.dtype).contiguous().view(torch.uint8).flatten()
            first = layout.basis_first_page + pair * per_head
            pages[first : first + per_head].view(-1)[: raw.numel()] = raw

    def swap_blocks(self, a: int, b: int) -> None:
        """Exchange two blocks, so that another one is the last of the cache."""
        self.kv_cache[[a, b]] = self.kv_cache[[b, a]]
        table = self.block_table.clone()
        self.block_table[table == a], self.block_table[table == b] = b, a

    @property
    def calibrated(self) -> Basis | None:
        """The basis that formats use where it is not the prompt's own."""
        return None if self.model.prompt_basis_rank else self.basis

    def decode(
        self,
        query: torch.Tensor,
        layer: int,
        query_rows: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Run the kernel under test; it writes output and lse."""
        raise NotImplementedError

    def query(self, *shape: int) -> torch.Tensor:
        """A random query."""
        return self.randn(*shape).to(self.model.query_dtype)

    def tolerance(self) -> float:
        """Largest relative error of an output vector."""
        raise NotImplementedError

    def check(self, rows: list[int], lengths: list[int], layer: int = 1) -> None:
        """Compare kernel and reference for queries of some rows and lengths."""
        model = self.model
        heads = model.kv_heads * model.group
        query = self.query(len(rows), heads, model.head_size)
        query_rows = torch.tensor(rows, dtype=torch.int32)
        query_lengths = torch.tensor(lengths, dtype=torch.int32)
        output = torch.full((len(rows), heads + 1, model.head_size), torch.nan).to(query.dtype)
        output = output[:, 1:]  # strided rows
        lse = torch.full((len(rows), heads), torch.nan)
        scale = model.head_size**-0.5
        before = self.kv_cache.view(torch.uint8).clone()
        self.decode(query, layer, query_rows, query_lengths, scale, output, lse)
        assert torch.equal(before, self.kv_cache.view(torch.uint8))
        expected, expected_lse = reference.mixed_decode(
            query.double(),
            self.kv_cache,
            layer,
            self.layout,
            self.block_table,
            query_rows,
            query_lengths,
            self.leases,
            self.calibrated,
            scale,
        )
        error = (output.double() - expected).norm(dim=-1)
        bound = self.tolerance() * expected.norm(dim=-1) + 1e-6
        assert (error <= bound).all(), (error / expected.norm(dim=-1)).max()
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=self.lse_error)


def poison_unused(page: torch.Tensor, tokens: int, fmt: PageFormat, geometry: PageGeometry) -> None:
    """Set every bit of a page that holds none of its first ``tokens`` tokens."""
    unused = torch.arange(fmt.tokens_per_page) >= tokens
    if fmt.full:
        page.view(fmt.tokens_per_page, -1)[unused] = POISON
        return
    sections = page[: 2 * fmt.section_bytes].view(2, -1)
    if fmt.quantized:
        bits = unused * (2**fmt.bits - 1)
        by_dimension = bits.expand(1, fmt.rank, -1).to(torch.uint8)
        sections[0] |= pack_rows(by_dimension, fmt).flatten()
        scales = page[fmt.scales_offset :][: 4 * fmt.tokens_per_page]
        scales.view(2, fmt.tokens_per_page, 2)[:, unused] = POISON
    else:
        rows = sections[0].view(fmt.rank, fmt.tokens_per_page, geometry.dtype.itemsize)
        rows[:, unused] = POISON
    sections[1].view(fmt.tokens_per_page, -1)[unused] = POISON
    page[fmt.used_bytes :] = POISON


def ragged(model: Model, lease_blocks: int | None = None) -> list[Request]:
    """Requests of many lengths, with as many leases as they may have, fewer, or none.

    Args:
        model: theirs.
        lease_blocks: blocks of a lease, about; few unless told.
    """
    blocks = lease_blocks or model.layout().min_blocks + 2
    requests = [
        Request(blocks, 37),
        Request(0, 70),
        Request(blocks + 2, 1, freed_blocks=0),
        Request(blocks, 16, fill=0.4),
        Request(0, 1),
    ]
    if model.max_leases > 1:
        fill = (0.9, 0.0, *[0.5] * (model.max_leases - 2))
        sizes = tuple(blocks + index % 3 - 1 for index in range(model.max_leases))
        requests += [Request(sizes, 21, fill=fill), Request((blocks + 3, blocks), 0, 0)]
    return requests
