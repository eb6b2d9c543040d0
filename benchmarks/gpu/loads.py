"""What is timed: models, batches, context lengths, and what a request holds of its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout

BLOCK_SIZE = 16
DEFAULT_FORMATS = ("i4", "i8", "full")

Kind = Literal["full", "rank", "int", "mixed"]


@dataclass(frozen=True)
class Heads:
    """One layer's attention of some model, on one GPU.

    Attributes:
        name: of the model.
        kv_heads: KV heads.
        group: query heads per KV head.
        head_size: dimensions of a head.
        dtype: of the cache and the queries.
    """

    name: str
    kv_heads: int
    group: int
    head_size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values at full dimension."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True)
class Holding:
    """What is kept of a context.

    Attributes:
        kind: ``full``: everything; ``rank``: every token at the rank that fits the budget;
            ``int``: i8 at half the bytes, else i4, and what does not fit is dropped; ``mixed``: as
            allocations come out, see :data:`MIXED_SHARES`.
        budget: share of the full bytes.
        segment_tokens: of what each lease has compressed; None for a single lease.
    """

    kind: Kind
    budget: float = 1.0
    segment_tokens: int | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        if self.kind == "full":
            return "full"
        return f"{'segments' if self.segment_tokens else self.kind} {self.budget:.4g}"

    def max_leases(self, tokens: int) -> int:
        """Leases of a context of so many tokens at most."""
        return max(tokens // self.segment_tokens, 1) if self.segment_tokens else 1

    def formats(self, head_size: int) -> tuple[str, ...]:
        """Names of the page formats. At 100 % they are a server's defaults, with no lease."""
        if self.kind == "rank":
            return (f"r{int(head_size * self.budget)}",)
        if self.kind == "int":
            return ("i8",) if self.budget >= 0.5 else ("i4",)
        return DEFAULT_FORMATS

    def shares(self, kv_heads: int) -> torch.Tensor:
        """Tokens of each list relative to each other: float64 ``[kv_heads, formats]``."""
        if self.kind != "mixed":
            return torch.ones(kv_heads, 1, dtype=torch.float64)
        octiles = torch.tensor(MIXED_SHARES[self.budget], dtype=torch.float64)
        # Evenly spread among the eight; one head alone is like the mean of all.
        if kv_heads == 1:
            return octiles.mean(0, keepdim=True)
        return octiles[(torch.arange(kv_heads) * 2 + 1) * len(octiles) // (2 * kv_heads)]


MIXED_SHARES = {
    0.5: (
        (0.2362, 0.7506, 0.0130),
        (0.1686, 0.8186, 0.0128),
        (0.1241, 0.8628, 0.0126),
        (0.1011, 0.8849, 0.0138),
        (0.0734, 0.9147, 0.0119),
        (0.0671, 0.9156, 0.0173),
        (0.0358, 0.9477, 0.0163),
        (0.0127, 0.9616, 0.0255),
    ),
    0.25: (
        (0.4503, 0.0731, 0.0024),
        (0.6116, 0.0753, 0.0030),
        (0.6522, 0.0918, 0.0022),
        (0.7003, 0.0983, 0.0027),
        (0.7630, 0.1068, 0.0027),
        (0.8231, 0.1064, 0.0022),
        (0.8296, 0.1258, 0.0030),
        (0.7476, 0.2348, 0.0043),
    ),
    0.125: (
        (0.1047, 0.0329, 0.0012),
        (0.1765, 0.0425, 0.0016),
        (0.2249, 0.0554, 0.0015),
        (0.2647, 0.0670, 0.0013),
        (0.3170, 0.0726, 0.0014),
        (0.4178, 0.0677, 0.0015),
        (0.5225, 0.0697, 0.0015),
        (0.6098, 0.0997, 0.0025),
    ),
    0.0625: (
        (0.0519, 0.0199, 0.0006),
        (0.0934, 0.0244, 0.0005),
        (0.1051, 0.0342, 0.0003),
        (0.1241, 0.0402, 0.0003),
        (0.1475, 0.0436, 0.0003),
        (0.1696, 0.0458, 0.0003),
        (0.1812, 0.0563, 0.0009),
        (0.2601, 0.0579, 0.0009),
    ),
}
"""Tokens held as i4, i8 and full, as shares of the compressed span; the rest is dropped.

Measured: SmolLM2-135M-Instruct in bfloat16, default settings, three prompts of 4,096 tokens of
Python's language reference. Its 90 KV heads, by the pages that they got, in eight equal groups; a
row is a group's mean. Heads differ, and so do the programs that read them.
"""

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
FULL = Holding("full")
HOLDINGS = (
    FULL,
    *(Holding(kind, budget) for budget in BUDGETS for kind in ("mixed", "int", "rank")),
)

MODELS = (
    Heads("Llama-3.1-8B, Qwen3-8B", 8, 4, 128),
    Heads("Llama-3.1-70B, TP 8", 1, 8, 128),
    Heads("Llama-3.2-1B", 8, 4, 64),
)
BATCHES = (1, 8, 64, 256)
LENGTHS = (4096, 32768, 131072)


@dataclass(frozen=True)
class Load:
    """A batch of requests in the middle of their answers.

    Attributes:
        heads: the attention.
        batch: requests, one query each.
        tokens: context of each.
        layers: in every block of the cache, side by side.
    """

    heads: Heads
    batch: int
    tokens: int
    layers: int = 1

    @property
    def name(self) -> str:
        """In words."""
        more = f", {self.layers} layers" if self.layers > 1 else ""
        return f"{self.heads.name}, batch {self.batch} x {self.tokens}{more}"

    @property
    def full_bytes(self) -> int:
        """Bytes of one layer's keys and values at full dimension."""
        return self.batch * self.tokens * self.heads.token_bytes


def layout_of(heads: Heads, holding: Holding, layers: int = 1) -> LeaseLayout:
    """The lease layout of some layers."""
    geometry = PageGeometry(BLOCK_SIZE, heads.head_size, heads.dtype)
    formats = parse_formats(holding.formats(heads.head_size), geometry)
    return LeaseLayout(geometry, formats, layers, heads.kv_heads)


LLAMA = MODELS[0]
DECISIVE = tuple(Load(LLAMA, batch, tokens) for batch in (16, 64, 1) for tokens in (32768, 8192))
"""What decides which kernel serves, in order of worth; Qwen3-8B has the same heads."""
DECISIVE_HOLDINGS = (FULL, Holding("mixed", 0.25), Holding("mixed", 0.125))
SEGMENTS = Holding("mixed", 0.25, 1024)
SEGMENTS_FROM = 32768
"""Tokens of a context that is timed in segments as well."""

MANY_LAYERS = (
    (Load(LLAMA, 14, 32768, layers=32), FULL),
    (Load(LLAMA, 56, 32768, layers=32), Holding("mixed", 0.25)),
)
"""Caches beyond 50 GiB, of which a call reads one layer in 32: every page of virtual memory, a
little of each."""

EVERY_LOAD = tuple(
    Load(heads, batch, tokens) for tokens in LENGTHS for batch in BATCHES for heads in MODELS
)
"""Models take turns, so that a run that ends early has some of each."""


def parse_loads(names: Sequence[str]) -> tuple[Load, ...]:
    """Loads of Llama-3.1-8B named as ``BATCHxTOKENS``, for instance ``16x32768``.

    Raises:
        ValueError: a name is not of that form.
    """
    loads = []
    for name in names:
        batch, _, tokens = name.partition("x")
        if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
            raise ValueError(f"--loads {name!r}; allowed is BATCHxTOKENS, for instance 16x32768")
        loads.append(Load(LLAMA, int(batch), int(tokens)))
    return tuple(loads)
