"""What compression's kernels are compiled for: a model's cache, its formats, and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl

from mdkv_vllm.core.formats import PageFormat, PageGeometry, Rotation
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import Loss
from mdkv_vllm.core.quantize import _GAUSSIAN_STEP

from .elements import element_type
from .shapes import KernelConstant, padded


def gaussian_step(bits: int) -> float:
    """First step of the quantizer for vectors of unit variance; 0 where none is used."""
    return _GAUSSIAN_STEP.get(bits, 0.0)


@dataclass(frozen=True, repr=False)
class SpaceShape(KernelConstant):
    """How vectors of the cache come into a format's space: a product with a matrix.

    The Hadamard matrix is taken without its norm: its entries are then 0, 1 and -1, and products
    of them and 16-bit vectors are exact on the matrix units. A basis is float32, and so are
    products with it (in three products of TF32, which keep some 21 bits of their 24).

    Attributes:
        geometry: of the cache.
        rotation: the space.
        rank: dimensions of it that are wanted.
        stride: elements of a row of its matrix.
    """

    geometry: PageGeometry
    rotation: Rotation
    rank: int
    stride: int

    @property
    def moves(self) -> bool:
        """Whether there is a matrix at all."""
        return self.rotation is not Rotation.IDENTITY

    @property
    def in_basis(self) -> bool:
        """Whether every layer and head has a matrix of its own."""
        return self.rotation is Rotation.BASIS

    @property
    def operand(self) -> tl.dtype:
        """Type of the product's operands."""
        return tl.float32 if self.in_basis else element_type(self.geometry.dtype)

    @property
    def norm(self) -> float:
        """Factor of the product."""
        size = self.geometry.head_size
        return 1.0 if self.in_basis else float(size & -size) ** -0.5

    @property
    def has_ties(self) -> bool:
        """Whether sums of a 16-bit cache over their scale may lie just between two codes: where the
        factor is a power of two, which adds no digits.
        """
        return math.log2(self.norm).is_integer()

    @property
    def dims(self) -> int:
        """Dimensions of a vector."""
        return self.geometry.head_size

    @property
    def padded_dims(self) -> int:
        """The same in tiles."""
        return padded(self.dims)

    @property
    def padded_rank(self) -> int:
        """Dimensions of the result in tiles."""
        return padded(self.rank)

    @property
    def chunk(self) -> int:
        """Dimensions of a vector that a product takes at a time: more would not fit registers."""
        return 16 if self.operand is tl.float32 else min(self.padded_dims, 128)


@dataclass(frozen=True, repr=False)
class CandidateShape(KernelConstant):
    """A format that a token may be held in.

    Attributes:
        format: the page format.
        geometry: of the cache.
        basis_rank: directions of the basis; 0 for none.
    """

    format: PageFormat
    geometry: PageGeometry
    basis_rank: int

    @property
    def space(self) -> SpaceShape:
        """Its space."""
        in_basis = self.format.rotation is Rotation.BASIS
        stride = self.basis_rank if in_basis else self.geometry.head_size
        return SpaceShape(self.geometry, self.format.rotation, self.format.rank, stride)

    @property
    def first_query(self) -> int:
        """Where queries of its space start in a row of rotated queries."""
        return self.geometry.head_size if self.space.in_basis else 0

    @property
    def rank(self) -> int:
        """Stored dimensions."""
        return self.format.rank

    @property
    def padded_rank(self) -> int:
        """The same in tiles."""
        return padded(self.rank)

    @property
    def quantized(self) -> bool:
        """Whether elements are codes."""
        return self.format.quantized

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.format.bits

    @property
    def step(self) -> float:
        """First step of the quantizer."""
        return gaussian_step(self.bits)

    @property
    def zero(self) -> float:
        """The code that stands for zero."""
        return self.format.zero

    @property
    def in_hadamard(self) -> bool:
        """Whether it is codes of whole vectors."""
        return self.quantized and not self.space.in_basis

    @property
    def splits_queries(self) -> bool:
        """Whether scores are two products in float16: codes are exact in it, and a query in two."""
        return self.quantized and self.geometry.dtype != torch.float32


@dataclass(frozen=True, repr=False)
class PromptShape(KernelConstant):
    """One model's compression.

    Attributes:
        layout: of leases.
        group: query heads per KV head.
        query_dtype: of window queries.
        loss: what tokens cost.
        basis_rank: directions of the basis; 0 for none.
    """

    layout: LeaseLayout
    group: int
    query_dtype: torch.dtype
    loss: Loss
    basis_rank: int

    @property
    def element(self) -> tl.dtype:
        """The cache's type."""
        return element_type(self.layout.geometry.dtype)

    @property
    def score_type(self) -> tl.dtype:
        """Type in which queries and keys as they are are multiplied."""
        return element_type(torch.promote_types(self.query_dtype, self.layout.geometry.dtype))

    @property
    def dims(self) -> int:
        """Dimensions of a head."""
        return self.layout.geometry.head_size

    @property
    def padded_dims(self) -> int:
        """The same in tiles."""
        return padded(self.dims)

    @property
    def score_chunk(self) -> int:
        """Dimensions that a product of scores takes at a time."""
        wide = self.score_type is tl.float32 or self.padded_dims > 128
        return min(self.padded_dims, 16 if self.score_type is tl.float32 else 64 if wide else 128)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.layout.geometry.block_size

    @property
    def heads(self) -> int:
        """KV heads of a layer."""
        return self.layout.num_kv_heads

    @property
    def pages_per_block(self) -> int:
        """Pages of a block."""
        return self.layout.pages_per_block

    @property
    def candidates(self) -> tuple[CandidateShape, ...]:
        """The reduced formats, in order."""
        formats, geometry = self.layout.formats, self.layout.geometry
        reduced = [f for f in formats.formats if not f.full]
        return tuple(CandidateShape(f, geometry, self.basis_rank) for f in reduced)

    @property
    def num_candidates(self) -> int:
        """How many."""
        return len(self.candidates)

    @property
    def spaces(self) -> tuple[SpaceShape, ...]:
        """The candidates' spaces, one behind the other."""
        return tuple(candidate.space for candidate in self.candidates)

    @property
    def uses_hadamard(self) -> bool:
        """Whether a candidate is codes of whole vectors."""
        return any(c.in_hadamard for c in self.candidates)

    @property
    def hadamard(self) -> SpaceShape:
        """The space of such candidates."""
        return SpaceShape(self.layout.geometry, Rotation.HADAMARD, self.dims, self.dims)

    @property
    def rotated_width(self) -> int:
        """Floats of a rotated query: in the Hadamard space, then in the basis."""
        return self.dims + self.basis_rank

    @property
    def drops(self) -> bool:
        """Whether option 0 is to drop."""
        return self.layout.formats.drop

    @property
    def options(self) -> tuple[int, ...]:
        """Per option, its candidate; -1 for dropping, -2 for a token as it is."""
        numbers, options = iter(range(self.num_candidates)), [-1] * self.drops
        for fmt in self.layout.formats.formats:
            options.append(-2 if fmt.full else next(numbers))
        return tuple(options)

    @property
    def num_options(self) -> int:
        """How many."""
        return len(self.options)

    @property
    def together(self) -> bool:
        """Whether probabilities change as though all tokens took the format."""
        return self.loss.joint

    @property
    def prior(self) -> float:
        """Attention that tokens are expected to get later."""
        return self.loss.prior

    @property
    def by_errors(self) -> tuple[bool, ...]:
        """Of each candidate, whether its scores are those of keys as they are, and what the keys'
        errors add. Where all change together, scores have to be those of the log-sum-exps.
        """
        return tuple(c.in_hadamard and not self.together for c in self.candidates)

    @property
    def pooled_weight(self) -> float:
        """Weight of the pooled loss."""
        return self.loss.pooled

    @property
    def own_weight(self) -> float:
        """Weight of a token's own loss."""
        return self.loss.own
