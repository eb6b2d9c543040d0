"""Methods on tiny models of every family, against transformers' own attention."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mdkv_vllm.artifacts.store import load_head_scores
from mdkv_vllm.config import HEADS_FILE
from mdkv_vllm.eval.methods import methods_for
from mdkv_vllm.models.held_cache import HeldCache, full_cache
from mdkv_vllm.models.in_process import InProcessModel

PROMPT_TOKENS = 400


@pytest.fixture(scope="module")
def model(tiny_folder):
    return InProcessModel(tiny_folder, torch.float32)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(300, 30000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prefill(model, prompt):
    return model.prefill(prompt.tolist())


def test_a_full_cache_follows_transformers(model, prefill, prompt, tiny_folder):
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    continuation = [5, 17, 4000, 23]
    with torch.no_grad():
        expected = plain(torch.cat((prompt, torch.tensor(continuation)))[None]).logits[0]
    torch.testing.assert_close(prefill.logits, expected[PROMPT_TOKENS - 1], atol=5e-4, rtol=1e-3)
    found = model.follow([full_cache(prefill)] * 2, continuation)
    for row in found:
        torch.testing.assert_close(row, expected[PROMPT_TOKENS:], atol=5e-4, rtol=1e-3)


def test_generation_is_greedy_and_rows_do_not_mix(model, prefill):
    full = full_cache(prefill)
    blind = HeldCache(full.keys, full.values, full.kept.clone(), 1.0)
    blind.kept[:, :, : PROMPT_TOKENS - 4] = False
    alone = model.generate(prefill, [full], 6)[0]
    together = model.generate(prefill, [blind, full], 6)
    assert together[1] == alone
    logits = model.follow([full], alone)[0]
    assert alone[1:] == logits.argmax(-1)[: len(alone) - 1].tolist()


def test_forgotten_tokens_are_not_read(model, prefill):
    full = full_cache(prefill)
    kept = torch.rand(full.kept.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    poisoned = torch.where(kept.unsqueeze(-1), full.keys, 1e4)
    cache = HeldCache(full.keys, full.values, kept, 0.5)
    other = HeldCache(poisoned, full.values, kept, 0.5)
    found = model.follow([cache, other, full], [7, 8])
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_every_method_holds_what_it_was_asked(model, prefill):
    for method in methods_for(model).values():
        for budget in method.fixed_shares or (0.5, 0.35):
            cache = method.apply(model, prefill, budget)
            assert cache.share <= budget + 1e-6, method.name
            assert cache.share > 0.7 * budget, method.name
            assert cache.keys.shape == prefill.keys.shape
            if budget == 1:
                torch.testing.assert_close(cache.keys, prefill.keys)
            else:
                logits = model.follow([cache, full_cache(prefill)], [9])
                assert not torch.equal(logits[0], logits[1]), f"{method.name} changed nothing"


def test_ours_reads_back_what_the_lease_holds(model, prefill):
    cache = methods_for(model)["ours"].apply(model, prefill, 0.5)
    assert cache.formats is not None
    names = ("drop", "i4", "i8", "full")
    error = (cache.keys - prefill.keys.float()).norm(dim=-1) / prefill.keys.norm(dim=-1)
    means = {n: error[cache.formats == i] for i, n in enumerate(names)}
    assert means["full"].max() < 0.01  # float32 rounded to 16 bit
    assert means["i8"].mean() < 0.02
    assert means["i8"].mean() < means["i4"].mean() < 0.2


def test_peers_keep_as_many_tokens_as_they_may(model, prefill):
    methods = methods_for(model)
    for name in ("snapkv", "expected", "tova"):
        for budget in (0.5, 0.27, 0.1):
            kept = methods[name].apply(model, prefill, budget).kept.sum(-1)
            assert (kept == int(budget * PROMPT_TOKENS) // 16 * 16).all(), name
    with pytest.raises(ValueError, match="less than a page"):
        methods["snapkv"].apply(model, prefill, 0.01)
    assert methods["adakv"].apply(model, prefill, 1.0).share == 1


def test_heads_that_score_high_hold_more(model, prefill):
    methods = methods_for(model)
    scores = load_head_scores(model.folder / HEADS_FILE, str(model.folder), (3, 2)).flatten()
    best, worst = int(scores.argmax()), int(scores.argmin())
    for name in ("ours", "paper-h", "headkv"):
        kept = methods[name].apply(model, prefill, 0.35).kept.sum(-1).flatten()
        assert kept[best] > 1.2 * kept[worst], name
    even = methods["ours-even"].apply(model, prefill, 0.35)
    ours = methods["ours"].apply(model, prefill, 0.35)
    assert even.share == ours.share
    assert not torch.equal(even.formats, ours.formats)
