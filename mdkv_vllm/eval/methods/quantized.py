"""Uniform quantization of the whole cache, every token alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkv_vllm.core.basis import hadamard
from mdkv_vllm.core.formats import CODE_ZERO, SCALE_BYTES
from mdkv_vllm.core.quantize import dequantize, quantize
from mdkv_vllm.models.held_cache import HeldCache, Prefill
from mdkv_vllm.models.in_process import InProcessModel


@dataclass(frozen=True)
class Uniform:
    """Integer codes with a scale per token and head, after a Hadamard rotation.

    Attributes:
        name: how reports call it.
        bits: 8, 4 or 2.
        head_size: of the model; fixes the share of bytes.
    """

    name: str
    bits: int
    head_size: int

    @property
    def fixed_shares(self) -> tuple[float, ...]:
        """The one size it has."""
        return ((self.head_size * self.bits / 8 + SCALE_BYTES) / (2 * self.head_size),)

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        rotation = hadamard(self.head_size)

        def round_trip(x: torch.Tensor) -> torch.Tensor:
            rotated = x.float() @ rotation
            return dequantize(*quantize(rotated, self.bits), CODE_ZERO[self.bits]) @ rotation

        kept = torch.ones(prefill.keys.shape[:3], dtype=torch.bool)
        return HeldCache(round_trip(prefill.keys), round_trip(prefill.values), kept, budget)


@dataclass(frozen=True)
class Float8:
    """vLLM's ``--kv-cache-dtype fp8``: e4m3 with a scale of one."""

    name: str = "fp8"
    fixed_shares: tuple[float, ...] = (0.5,)

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""

        def round_trip(x: torch.Tensor) -> torch.Tensor:
            limit = torch.finfo(torch.float8_e4m3fn).max
            return x.float().clamp(-limit, limit).to(torch.float8_e4m3fn).float()

        kept = torch.ones(prefill.keys.shape[:3], dtype=torch.bool)
        return HeldCache(round_trip(prefill.keys), round_trip(prefill.values), kept, budget)
