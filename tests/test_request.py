"""Requests are parsed once, and other plugins' fields are left alone."""

import pytest

from mdkv_vllm.config import Budget, ConfigError
from mdkv_vllm.request import CompressionRequest, without_compression


def test_fields_of_others_are_not_ours():
    fields = {"kv_transfer_params": {"a": 1}, "mixeddim_budget": 0.5}
    parsed = CompressionRequest.parse("a", 100, fields)
    assert parsed == CompressionRequest("a", 100, Budget(share=0.5), generates=True)
    assert CompressionRequest.parse("a", 100, None).budget is None
    with pytest.raises(ConfigError, match="mixeddim_bugdet is unknown"):
        CompressionRequest.parse("a", 100, {"mixeddim_bugdet": 0.5})


@pytest.mark.parametrize("ours", [{}, {"mixeddim_budget": 0.2}, {"mixeddim_budget_tokens": 300}])
def test_without_compression(ours):
    others = {"kv_transfer_params": {"a": 1}, "seed_of_mine": 3}
    left = without_compression(others | ours)
    assert CompressionRequest.parse("a", 100, left).budget == Budget(share=1.0)
    assert {key: left[key] for key in others} == others
    assert len(left) == 3
    assert without_compression(None) == {"mixeddim_budget": 1.0}
