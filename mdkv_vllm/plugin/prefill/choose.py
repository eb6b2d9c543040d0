"""Which prefill attention a server gets, decided at start-up."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from mdkv_vllm.config import ConfigError
from mdkv_vllm.kernels.interface import PrefillAttention
from mdkv_vllm.plugin.prefill.sdpa import SdpaPrefill

Reason = str | None
"""Why an implementation cannot be had, None where it can."""


def choose_prefill(
    requested: str, device: torch.device, dtype: torch.dtype, head_size: int
) -> tuple[str, PrefillAttention]:
    """The setting ``prefill`` on a device: its name in words, and the implementation.

    Args:
        requested: ``auto``, ``flash``, ``xformers`` or ``sdpa``.
        device: where the model runs.
        dtype: type of the queries.
        head_size: dimensions of a head.

    Raises:
        ConfigError: what is requested cannot be had here.
    """
    if device.type == "cpu":
        return _choose_on_cpu(requested)
    makers: dict[str, tuple[Callable[..., Reason], Callable[[int], PrefillAttention]]] = {
        "flash": (_no_flash, _flash),
        "xformers": (_no_xformers, _xformers),
        "sdpa": (lambda *_: None, _sdpa),
    }
    reasons = {name: missing(dtype, head_size) for name, (missing, _) in makers.items()}
    if requested != "auto" and reasons[requested]:
        allowed = ", ".join(["auto", *(name for name, reason in reasons.items() if not reason)])
        raise ConfigError(
            f"mixeddim.prefill is {requested!r}, but {reasons[requested]}; allowed here: {allowed}"
        )
    if requested == "auto":
        requested = next(name for name, reason in reasons.items() if not reason)
    return requested, makers[requested][1](head_size)


def _choose_on_cpu(requested: str) -> tuple[str, PrefillAttention]:
    if requested == "sdpa":
        return requested, SdpaPrefill()
    if requested != "auto":
        raise ConfigError(
            f"mixeddim.prefill is {requested!r}, but the model runs on the CPU; allowed there are "
            "auto (vLLM's CPU kernel) and sdpa"
        )
    from mdkv_vllm.plugin.prefill.cpu import CpuPrefill

    return "vLLM's CPU kernel", CpuPrefill()


def _no_flash(dtype: torch.dtype, head_size: int) -> Reason:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16, not {dtype}"
    if not current_platform.has_device_capability(80):
        return "FlashAttention needs a GPU of compute capability 8.0 or later"
    if head_size % 8 or head_size > 256:
        return f"FlashAttention takes no heads of {head_size} dimensions"
    if get_flash_attn_version(head_size=head_size) is None:
        return "vLLM's FlashAttention is not installed"
    return None


def _no_xformers(dtype: torch.dtype, head_size: int) -> Reason:
    if find_spec("xformers") is None:
        return "xformers is not installed (pip install 'mdkv-vllm[xformers]')"
    return None


def _flash(head_size: int) -> PrefillAttention:
    from mdkv_vllm.plugin.prefill.flash import FlashPrefill

    return FlashPrefill(head_size)


def _xformers(head_size: int) -> PrefillAttention:
    from mdkv_vllm.plugin.prefill.xformers import XformersPrefill

    return XformersPrefill()


def _sdpa(head_size: int) -> PrefillAttention:
    return SdpaPrefill()
