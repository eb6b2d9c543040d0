"""Losses against their definitions, computed one token at a time in float64."""

import pytest
import torch

from mdkv_vllm.core.loss import Candidate, pool, token_losses, window_logits
from mdkv_vllm.core.losses import LOSSES

HEADS, WINDOW, GROUP, TOKENS, SIZE = 2, 4, 3, 40, 16
SPAN = 30
SCALE = SIZE**-0.5


@pytest.fixture
def prompt():
    queries = torch.randn(HEADS, WINDOW, GROUP, SIZE)
    keys, values = torch.randn(2, HEADS, TOKENS, SIZE)
    reduced_keys = keys[:, :SPAN] + 0.3 * torch.randn(HEADS, SPAN, SIZE)
    reduced_values = values[:, :SPAN] + 0.2 * torch.randn(HEADS, SPAN, SIZE)
    return queries, keys, values, reduced_keys, reduced_values


def probabilities(queries, keys):
    scores = torch.einsum("hwgd,htd->hwgt", queries.double(), keys.double()) * SCALE
    for at in range(WINDOW):
        scores[:, at, :, TOKENS - WINDOW + at + 1 :] = -torch.inf
    return scores.softmax(-1).flatten(1, 2)


def losses_of(prompt, loss):
    queries, keys, values, reduced_keys, reduced_values = prompt
    candidate = Candidate(
        queries.flatten(1, 2), reduced_keys, (values[:, :SPAN] - reduced_values).norm(dim=-1)
    )
    logits = window_logits(queries, keys, SCALE)
    norms = values[:, :SPAN].norm(dim=-1)
    return token_losses(logits, norms, [candidate], SCALE, LOSSES[loss], drop=True).double()


def expected_loss(prompt, changed):
    queries, keys, values, _, reduced_values = prompt
    before = probabilities(queries, keys)[..., :SPAN]
    norms = values[:, :SPAN].double().norm(dim=-1)
    error = (values[:, :SPAN] - reduced_values).double().norm(dim=-1)
    return (changed - before).abs().sum(1) * norms + before.sum(1) * error


def test_drop_loss(prompt):
    queries, keys, values, *_ = prompt
    expected = 2 * probabilities(queries, keys)[..., :SPAN].sum(1) * values[:, :SPAN].norm(dim=-1)
    torch.testing.assert_close(losses_of(prompt, "paper")[0], expected, rtol=1e-4, atol=1e-5)


def test_paper_loss_changes_every_key_at_once(prompt):
    queries, keys, _, reduced_keys, _ = prompt
    changed = probabilities(queries, torch.cat((reduced_keys, keys[:, SPAN:]), 1))[..., :SPAN]
    torch.testing.assert_close(
        losses_of(prompt, "paper")[1], expected_loss(prompt, changed), rtol=1e-4, atol=1e-5
    )


def test_solo_loss_changes_one_key_at_a_time(prompt):
    queries, keys, _, reduced_keys, _ = prompt
    columns = []
    for token in range(SPAN):
        one = keys.clone()
        one[:, token] = reduced_keys[:, token]
        columns.append(probabilities(queries, one)[..., token])
    expected = expected_loss(prompt, torch.stack(columns, -1))
    torch.testing.assert_close(losses_of(prompt, "solo")[1], expected, rtol=1e-4, atol=1e-5)


def test_pooling():
    losses = torch.zeros(1, 1, 20)
    losses[0, 0, 10] = 1.0
    pooled = pool(losses, LOSSES["pooled"])
    assert pooled[0, 0].nonzero().flatten().tolist() == list(range(7, 19))
    torch.testing.assert_close(
        pool(losses, LOSSES["hybrid"]), losses + LOSSES["hybrid"].pooled * pooled
    )
    assert pool(losses, LOSSES["solo"]) is losses


def test_hybrid_gives_every_token_some_attention(prompt):
    queries, keys, values, *_ = prompt
    queries.mul_(30)  # nearly all of the window's attention goes to a few tokens
    mass = probabilities(queries, keys)[..., :SPAN].sum(1)
    expected = mass + LOSSES["hybrid"].prior * mass.mean(-1, keepdim=True)
    expected = 2 * expected * values[:, :SPAN].double().norm(dim=-1)
    drop, reduced = losses_of(prompt, "hybrid")
    torch.testing.assert_close(
        drop, pool(expected.unsqueeze(0), LOSSES["hybrid"])[0], rtol=1e-3, atol=1e-6
    )
    ignored = mass < 1e-4 * mass.mean(-1, keepdim=True)
    assert ignored.any()
    solo = losses_of(prompt, "solo")[1]
    assert (reduced[ignored] > 10 * solo[ignored]).all()
