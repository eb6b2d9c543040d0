"""Attention sinks: one more score of each query head, whose weight goes to no value."""

import torch

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.kernels.reference import ReferenceDecode
from mdkv_vllm.kernels.sinks import SinkDecode
from mdkv_vllm.policy import Policy


def test_a_sink_takes_weight_and_gives_nothing():
    """Three queries, of which the second is padding, in the second of two layers."""
    torch.manual_seed(0)
    heads, group, size, block, scale = 2, 3, 32, 16, 0.3
    layout = Policy(MixedDimConfig(), PageGeometry(block, size, torch.float32), 2, heads).layout
    cache = torch.randn(8, 2 * heads, block, 2 * size)
    kernel = ReferenceDecode(DecodeConfig(cache, layout, group, None, scale, 3))
    sinks = torch.randn(2, heads * group) * 3
    query, output = torch.randn(2, 3, heads * group, size)
    rows, lengths = torch.tensor([1, 0, 0]).int(), torch.tensor([40, 0, 7]).int()
    table = torch.tensor([[5, 6, 7], [1, 4, 2]]).int()
    batch = DecodeBatch(table, rows, lengths, torch.zeros(2, 1, 2).int())
    lse, recent = torch.empty(3, heads * group), torch.empty_like(query)
    SinkDecode(kernel, sinks).attend(query, 1, batch, output, lse=lse, recent=recent)
    for number in (0, 2):
        blocks, length = table[rows[number]].long(), lengths[number]
        tokens = cache[blocks, heads:].transpose(1, 2).flatten(0, 1)[:length].double()
        for head in range(heads * group):
            keys, values = tokens[:, head // group].split(size, -1)
            scores = torch.cat((scale * keys @ query[number, head].double(), sinks[1, head, None]))
            exact = scores.softmax(-1)[:-1] @ values
            torch.testing.assert_close(output[number, head].double(), exact, atol=1e-6, rtol=1e-5)
            assert abs(lse[number, head] - scores.logsumexp(-1)) < 1e-5
    assert not output[1].any()
    assert torch.equal(recent, query)
