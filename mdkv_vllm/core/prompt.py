"""A prompt that is to be compressed: where its tokens are, and what its formats need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mdkv_vllm.core.basis import Basis, principal_basis
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import Loss

LoadLayer = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Layer index to keys and values ``[kv_heads, prompt_tokens, head_size]``, innermost contiguous, on
the prompt's device; float32, or any float type that the kernels take. May be called up to three
times for a layer, and has to give the same each time."""


@dataclass(frozen=True)
class PagedTokens:
    """A prompt in the paged cache, for kernels that read it there; also a :data:`LoadLayer`.

    Attributes:
        kv_cache: the whole cache, ``[blocks, layers * kv_heads, block_size, 2 * head_size]``.
        blocks: int32 ``[blocks of the prompt or more]``, in token order.
        tokens: of the prompt.
        kv_heads: KV heads of a layer.
    """

    kv_cache: torch.Tensor
    blocks: torch.Tensor
    tokens: int
    kv_heads: int

    def __call__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :data:`LoadLayer`; a gathered copy in the cache's type."""
        heads = slice(layer * self.kv_heads, (layer + 1) * self.kv_heads)
        used = self.blocks[: -(-self.tokens // self.kv_cache.shape[2])]
        both = self.kv_cache[:, heads].index_select(0, used).transpose(0, 1).flatten(1, 2)
        keys, values = both[:, : self.tokens].chunk(2, dim=-1)
        return keys, values


@dataclass
class Prompt:
    """One prompt on its way through a compressor.

    Attributes:
        layout: of its lease.
        loss: what tokens cost.
        scale: factor of the attention scores.
        basis: the calibrated basis on the prompt's device; None where no format needs one or it is
            the prompt's own.
        load: reads a layer.
        queries: float32 or a type that the kernels take, ``[layers, query_heads, window,
            head_size]``: the prompt's last ``window`` queries after rotary embedding.
        span: tokens that are compressed.
    """

    layout: LeaseLayout
    loss: Loss
    scale: float
    basis: Basis | None
    load: LoadLayer
    queries: torch.Tensor
    span: int
    _loaded: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; kept until another is asked for."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None  # before the next takes memory
            self._loaded = layer, self.load(layer)
        return self._loaded[1]

    def bases(self, layers: range) -> Basis | None:
        """The basis of some layers, calibrated or the prompt's own; None where no format uses one.

        The prompt's own bases, of all layers and heads in one call, are the one thing for which
        compression waits for a GPU: torch looks whether every decomposition converged.
        """
        if not self.layout.formats.uses_basis:
            return None
        if not self.layout.prompt_basis_rank:
            assert self.basis is not None
            mine = slice(layers.start, layers.stop)
            return Basis(self.basis.keys[mine], self.basis.values[mine])
        moments = []
        for layer in layers:
            some = [x[:, : self.span].float() for x in self.layer(layer)]
            moments.append(torch.stack([torch.bmm(x.transpose(1, 2), x) for x in some]))
        bases = principal_basis(torch.stack(moments), self.layout.prompt_basis_rank)
        # As the lease holds them.
        bases = bases.to(self.layout.geometry.dtype).float()
        return Basis(bases[:, 0].contiguous(), bases[:, 1].contiguous())
