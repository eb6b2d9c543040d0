"""Which prefill attention a server gets, decided at start-up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from mdkv_vllm.config import ConfigError
from mdkv_vllm.kernels.interface import PrefillAttention, ReadConfig
from mdkv_vllm.kernels.registry import lease_reader
from mdkv_vllm.plugin.prefill.head_calls import HeadAttention
from mdkv_vllm.plugin.prefill.leased import LeasedPrefill
from mdkv_vllm.plugin.prefill.sdpa import SdpaHeads, SdpaPrefill

Reason = str | None
"""Why an implementation cannot be had, None where it can."""
Pair = tuple[PrefillAttention, HeadAttention]
"""Attention of chunks without leases, and of those with leases."""


def choose_prefill(
    requested: str,
    config: ReadConfig,
    dtype: torch.dtype,
    sinks: Sequence[torch.Tensor] | None = None,
) -> tuple[str, LeasedPrefill]:
    """The setting ``prefill`` on a device: its name in words, and the implementation.

    Args:
        requested: ``auto``, ``flash``, ``xformers`` or ``sdpa``.
        config: the cache and what leases look like.
        dtype: type of the queries.
        sinks: attention sinks, of each layer ``[query_heads]``; None where the model has none.

    Raises:
        ConfigError: what is requested cannot be had here.
    """
    head_size = config.layout.geometry.head_size
    if config.kv_cache.device.type == "cpu":
        name, (plain, heads) = _choose_on_cpu(requested, dtype, head_size, sinks)
    else:
        name, (plain, heads) = _choose_on_gpu(requested, dtype, head_size)
    return name, LeasedPrefill(plain, heads, lease_reader(config), config, dtype)


def _choose_on_gpu(requested: str, dtype: torch.dtype, head_size: int) -> tuple[str, Pair]:
    makers: dict[str, tuple[Callable[..., Reason], Callable[[int], Pair]]] = {
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


def _choose_on_cpu(
    requested: str, dtype: torch.dtype, head_size: int, sinks: Sequence[torch.Tensor] | None
) -> tuple[str, Pair]:
    if requested == "sdpa":
        if sinks is not None:
            raise ConfigError(
                "mixeddim.prefill is 'sdpa', which has no attention sinks, as this model does; "
                "allowed is auto"
            )
        return requested, _sdpa(0)
    if requested != "auto":
        raise ConfigError(
            f"mixeddim.prefill is {requested!r}, but the model runs on the CPU; allowed there are "
            "auto (vLLM's CPU kernel) and sdpa"
        )
    from mdkv_vllm.plugin.prefill.cpu import CpuHeads, CpuPrefill

    heads = CpuHeads(dtype, head_size)
    if sinks is not None:  # each KV head is a request there, and a kernel has one set of sinks
        heads.fewest_tokens = sys.maxsize
    return "vLLM's CPU kernel", (CpuPrefill(sinks), heads)


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


def _flash(head_size: int) -> Pair:
    from mdkv_vllm.plugin.prefill.flash import FlashHeads, FlashPrefill

    return FlashPrefill(head_size), FlashHeads(head_size)


def _xformers(head_size: int) -> Pair:
    from mdkv_vllm.plugin.prefill.xformers import XformersHeads, XformersPrefill

    return XformersPrefill(), XformersHeads()


def _sdpa(head_size: int) -> Pair:
    return SdpaPrefill(), SdpaHeads()
