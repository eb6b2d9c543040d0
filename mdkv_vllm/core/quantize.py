"""Integer codes with one scale per token and head."""

from __future__ import annotations

import torch

_GAUSSIAN_STEP = {4: 0.3352, 2: 0.9957}
"""Step of the uniform mid-rise quantizer with least squared error for a unit Gaussian
(Max, 1960, table II), which is what a Hadamard rotation leaves."""


def quantize(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize vectors to unsigned codes and a bf16 scale each.

    int8 spans the largest magnitude. int4 and int2 start from the Gaussian step for the
    vector's root mean square, then refit the scale to the codes by least squares. Codes are
    taken against the scale as rounded to bf16, so rounding the scale costs nothing.

    Args:
        vectors: float32 ``[..., rank]``.
        bits: 8, 4 or 2.

    Returns:
        uint8 codes ``[..., rank]`` and bfloat16 scales ``[...]``; see
        :mod:`mdkv_vllm.core.formats` for what a code stands for.
    """
    if bits == 8:
        # Nudged up so that rounding to bf16 never clips the largest element.
        scale = (vectors.abs().amax(-1, keepdim=True) * (1.00390625 / 127)).bfloat16().float()
        codes = torch.round(vectors / scale.clamp_min(1e-30)).clamp_(-127, 127) + 128
        return codes.to(torch.uint8), scale.squeeze(-1).bfloat16()
    levels, zero = 2**bits, (2**bits - 1) / 2
    step = vectors.square().mean(-1, keepdim=True).sqrt() * _GAUSSIAN_STEP[bits]
    centred = _mid_rise(vectors, step, levels)
    fitted = (vectors * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
    scale = fitted.bfloat16().float()
    codes = _mid_rise(vectors, scale, levels) + zero
    return codes.to(torch.uint8), scale.squeeze(-1).bfloat16()


def _mid_rise(vectors: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Nearest of the levels ``.. -1.5, -0.5, 0.5, 1.5 ..`` in units of ``step``."""
    half = levels // 2
    return torch.floor(vectors / step.clamp_min(1e-30)).clamp_(-half, half - 1) + 0.5


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zero: float) -> torch.Tensor:
    """Inverse of :func:`quantize`: float32 ``[..., rank]`` from codes and scales."""
    return (codes.float() - zero) * scales.float().unsqueeze(-1)
