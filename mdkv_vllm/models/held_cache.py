"""A prefilled prompt, and what a compression method would hold of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK_TOKENS = 16
"""Tokens of a full page; per (layer, head) a paged server holds whole pages."""


@dataclass(frozen=True)
class Prefill:
    """One prompt after its prefill.

    Attributes:
        token_ids: the prompt.
        keys: after rotary embedding, ``[layers, kv_heads, tokens, head_size]``.
        values: same shape.
        queries: of the prompt's last tokens or all, ``[layers, query_heads, window, head_size]``.
        inputs: per layer, the arguments of its attention module.
        logits: float32 ``[vocabulary]`` after the last prompt token.
    """

    token_ids: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    inputs: list[dict[str, Any]]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)


@dataclass
class Recorder:
    """Collects, layer by layer, what a :class:`Prefill` consists of.

    Attributes:
        window: last queries to keep; None for all.
    """

    window: int | None = None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)

    def keep_inputs(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        """Forward pre-hook of an attention module."""
        del module, args
        self.inputs.append(dict(kwargs))

    def keep_layer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep one layer's tensors, ``[heads, tokens, head_size]``."""
        self.queries.append(query[:, -(self.window or 0) :].clone())
        self.keys.append(key)
        self.values.append(value)

    def finish(self, token_ids: tuple[int, ...], logits: torch.Tensor) -> Prefill:
        """All layers together."""
        return Prefill(token_ids, *self.tensors(), self.inputs, logits)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and queries of all layers, ``[layers, heads, tokens, head_size]``."""
        keys, values, queries = (torch.stack(x) for x in (self.keys, self.values, self.queries))
        return keys, values, queries


@dataclass(frozen=True)
class HeldCache:
    """What attention reads of a request's tokens under some method, simulated at full size.

    Attributes:
        keys: ``[layers, kv_heads, tokens, head_size]``, as read back.
        values: same shape.
        kept: bool ``[layers, kv_heads, tokens]``; False where a token is forgotten.
        share: bytes held over those of the full cache in 16 bit, all that the request holds
            charged.
        formats: int64 like ``kept``, index of each token's format, for pictures; None for most. The
            last token is at full size.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor
    share: float
    formats: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are held or forgotten."""
        return self.keys.shape[2]

    def first(self, tokens: int) -> HeldCache:
        """The cache of its first tokens, as they are held.

        Args:
            tokens: how many.

        Returns:
            The same share as before: that of the first tokens is not known here.
        """
        return HeldCache(
            self.keys[:, :, :tokens],
            self.values[:, :, :tokens],
            self.kept[:, :, :tokens],
            self.share,
            None if self.formats is None else self.formats[:, :, :tokens],
        )

    def grown(self, keys: torch.Tensor, values: torch.Tensor) -> HeldCache:
        """The cache with more tokens behind it, at full size.

        Args:
            keys: ``[layers, kv_heads, new_tokens, head_size]``.
            values: same shape.
        """
        before, new = self.num_tokens, keys.shape[2]
        formats = self.formats
        if formats is not None:
            full = formats[..., -1:].expand(*formats.shape[:2], new)
            formats = torch.cat((formats, full), 2)
        return HeldCache(
            torch.cat((self.keys, keys.to(self.keys.dtype)), 2),
            torch.cat((self.values, values.to(self.values.dtype)), 2),
            torch.cat((self.kept, self.kept.new_ones(*self.kept.shape[:2], new)), 2),
            (self.share * before + new) / (before + new),
            formats,
        )


def full_cache(prefill: Prefill) -> HeldCache:
    """Everything, as it is."""
    kept = torch.ones(prefill.keys.shape[:3], dtype=torch.bool, device=prefill.keys.device)
    return HeldCache(prefill.keys, prefill.values, kept, 1.0)


def evicted(prefill: Prefill, kept: torch.Tensor) -> HeldCache:
    """Tokens at full size or not at all.

    Args:
        prefill: the prompt.
        kept: bool ``[layers, kv_heads, tokens]``.

    Returns:
        The cache; its share counts whole pages of :data:`BLOCK_TOKENS` per layer and head.
    """
    pages = -(-kept.sum(-1) // BLOCK_TOKENS)
    full_pages = -(-kept.shape[-1] // BLOCK_TOKENS) * kept[..., 0].numel()
    return HeldCache(prefill.keys, prefill.values, kept, float(pages.sum()) / full_pages)
