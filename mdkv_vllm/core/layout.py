"""How a lease's pages are sublet: page table, prompt basis, then the lists.

The blocks of a lease form one run of ``num_lease_blocks * layers * kv_heads`` pages: page
``p`` is page ``p % (layers * kv_heads)`` of lease block ``p // (layers * kv_heads)``. Any list
may use any of them, whichever layer or head vLLM meant the bytes for.

    | page table | prompt basis (optional) | lists: by layer, then head, then format |

The page table is ``int32 [layers, kv_heads, formats, 2]``: tokens in the list, and the
list's first page. It lives in the lease itself, so a kernel needs nothing but the block
table to read a compressed prompt, and nothing outlives the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.formats import FormatSet, PageGeometry

TABLE_ENTRY_BYTES = 8
"""int32 tokens, int32 first page."""


def _pages(num_bytes: int, page_bytes: int) -> int:
    return -(-num_bytes // page_bytes)


@dataclass(frozen=True)
class LeaseLayout:
    """Where things lie inside every lease of a model.

    Attributes:
        geometry: the cache's sizes.
        formats: the formats the page table has a column for.
        num_layers: layers whose pages share a block.
        num_kv_heads: KV heads per layer (on this rank).
        prompt_basis_rank: columns of a per-prompt basis stored in the lease; 0 for none.
    """

    geometry: PageGeometry
    formats: FormatSet
    num_layers: int
    num_kv_heads: int
    prompt_basis_rank: int = 0

    @property
    def pages_per_block(self) -> int:
        """Pages in one vLLM block."""
        return self.num_layers * self.num_kv_heads

    @property
    def table_shape(self) -> tuple[int, int, int, int]:
        """Shape of the int32 page table."""
        return (self.num_layers, self.num_kv_heads, len(self.formats.formats), 2)

    @property
    def table_pages(self) -> int:
        """Pages the page table takes at the start of a lease."""
        entries = self.pages_per_block * len(self.formats.formats)
        return _pages(entries * TABLE_ENTRY_BYTES, self.geometry.page_bytes)

    @property
    def basis_pages_per_head(self) -> int:
        """Pages one head's prompt basis takes: K basis then V basis, ``[rank][head_size]``."""
        size = 2 * self.prompt_basis_rank * self.geometry.head_size * self.geometry.dtype.itemsize
        return _pages(size, self.geometry.page_bytes)

    @property
    def basis_first_page(self) -> int:
        """First page of the prompt basis of layer 0, head 0; the heads follow in order."""
        return self.table_pages

    @property
    def lists_first_page(self) -> int:
        """First page that lists may use."""
        return self.table_pages + self.basis_pages_per_head * self.pages_per_block

    @property
    def min_blocks(self) -> int:
        """Blocks of the smallest lease: page table, basis, and a page per head."""
        return _pages(self.lists_first_page, self.pages_per_block) + 1

    def list_pages(self, num_lease_blocks: int) -> int:
        """Pages that the lists of a lease of that many blocks share."""
        return num_lease_blocks * self.pages_per_block - self.lists_first_page

    def list_pages_per_layer(self, num_lease_blocks: int) -> torch.Tensor:
        """Page budget of each layer, even but for a remainder: int64 ``[layers]``."""
        share, rest = divmod(self.list_pages(num_lease_blocks), self.num_layers)
        budgets = torch.full((self.num_layers,), share, dtype=torch.int64)
        budgets[:rest] += 1
        return budgets

    def page_table(self, tokens: torch.Tensor) -> torch.Tensor:
        """Build a page table from the number of tokens of each list.

        Args:
            tokens: integer ``[layers, kv_heads, formats]``.

        Returns:
            int32 ``[layers, kv_heads, formats, 2]``: tokens, first page; on the same device.
        """
        pages = self.formats.pages(tokens)
        ends = pages.flatten().cumsum(0)
        first = self.lists_first_page + (ends - pages.flatten()).view_as(pages)
        return torch.stack((tokens, first), dim=-1).to(torch.int32)
