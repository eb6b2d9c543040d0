"""Private symbols of vLLM that we use, each with the reason and when it can go.

``tests/plugin/test_compat.py`` fails when one of them changes or is no longer needed.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa


def attention_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Name of the instruction set that vLLM's CPU attention kernel should use.

    Private because vLLM has no public name for the choice; can go when
    ``cpu_attention_with_kv_cache`` makes it itself.
    """
    return _get_attn_isa(dtype, block_size, head_size)
