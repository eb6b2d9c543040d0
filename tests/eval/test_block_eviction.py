"""KV-Compress's metric and schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.eval.methods.block_eviction import evict_blocks, keep_best, squared_attention


def test_squared_attention_is_the_sum_over_window_and_group():
    queries, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8)
    metric = squared_attention(queries, keys, 0.3)
    expected = torch.zeros(2, 10)
    for head in range(4):
        for at in range(3):
            seen = keys[0, head // 2, : 10 - 2 + at].double()
            weights = (queries[0, head, at].double() @ seen.T * 0.3).softmax(-1)
            expected[head // 2, : seen.shape[0]] += weights.square().float()
    torch.testing.assert_close(metric[0], expected)


@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(40, 90),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_blocks_are_met_exactly_and_the_window_stays(layers, heads, tokens, share, seed):
    metric = torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(seed))
    window, block = 16, 8
    most = layers * heads * -(-tokens // block)
    # A head never gives up its window, nor a block that holds some of it.
    hanging = tokens - (-(-tokens // block) - 1) * block
    least = most - layers * heads * len(range(hanging - 1, tokens - window, block))
    wanted = least + round(share * (most - least))
    kept = evict_blocks(metric, window, block, wanted)
    assert kept[..., tokens - window :].all()
    assert int((-(-kept.sum(-1) // block)).sum()) == wanted
    # Within a head the cheapest go first.
    for mine, chosen in zip(metric.flatten(0, 1), kept.flatten(0, 1), strict=True):
        gone, stayed = mine[~chosen], mine[: tokens - window][chosen[: tokens - window]]
        assert not len(gone) or not len(stayed) or gone.max() <= stayed.min()


def test_the_cheaper_head_gives_more():
    metric = torch.stack((torch.full((64,), 0.1), torch.full((64,), 0.9))).unsqueeze(0)
    kept = evict_blocks(metric, 16, 16, 5)
    assert kept.sum(-1).tolist() == [[16, 64]]


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot hold the window"):
        evict_blocks(torch.rand(1, 2, 64), 16, 16, 1)


def test_each_head_keeps_its_own_number_of_best_tokens():
    metric = torch.tensor([[[0.5, 0.1, 0.9, 0.2, 0.0, 0.0], [0.5, 0.1, 0.9, 0.2, 0.0, 0.0]]])
    kept = keep_best(metric, 2, torch.tensor([[2, 4]]))
    assert kept.tolist() == [
        [[False, False, False, False, True, True], [True, False, True, False, True, True]]
    ]
