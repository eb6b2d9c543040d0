"""Fails when a private symbol of vLLM that we use changes, or has become public."""

import inspect

import pytest

pytest.importorskip("vllm")

from vllm import _custom_ops
from vllm.v1.attention.backends import cpu_attn


def test_attention_isa_is_still_ours_to_choose():
    assert list(inspect.signature(cpu_attn._get_attn_isa).parameters)[:3] == [
        "dtype",
        "block_size",
        "head_size",
    ]
    chosen = inspect.signature(_custom_ops.cpu_attn_get_scheduler_metadata).parameters["isa"]
    assert chosen.default is inspect.Parameter.empty, "vLLM now chooses: compat can go"
