"""Requests whose segments are compressed while their tokens are computed, on tiny models."""

import re
from itertools import islice, pairwise

import pytest
import torch

from mdkv_vllm.eval.held_request import HeldRequest, follow, generate
from mdkv_vllm.eval.methods.ours import MixedDim
from mdkv_vllm.eval.methods.segments import SegmentedRequest
from mdkv_vllm.models.held_cache import full_cache
from mdkv_vllm.models.in_process import InProcessModel

PROMPT_TOKENS, ANSWER_TOKENS, SEGMENT = 400, 300, 128
ROLLING = {"segments": "rolling", "segment_tokens": SEGMENT, "window": 16}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return InProcessModel(tiny_folder, torch.float32)


@pytest.fixture(scope="module")
def tokens():
    count = PROMPT_TOKENS + ANSWER_TOKENS
    return torch.randint(300, 30000, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def prefill(model, tokens):
    return model.prefill(tokens[:PROMPT_TOKENS])


@pytest.fixture(scope="module")
def rolling(model, prefill):
    return MixedDim("rolling", ROLLING).begin(model, prefill, 0.4)


def test_what_is_held_is_what_the_plan_says(rolling, tokens):
    request, answer = rolling, tokens[PROMPT_TOKENS:]
    assert isinstance(request, SegmentedRequest)
    seen = set()
    for piece in (answer[:1], answer[1:150], answer[150:151], answer[151:]):
        request, logits = request.extend(piece)
        computed = request.cache.num_tokens
        assert len(logits) == len(piece)
        assert request.compressed == len(request.plan.due(computed))
        assert request.blocks_held == request.plan.blocks_held(computed)
        assert request.cache.share == request.blocks_held / -(-computed // 16)
        seen.add(request.compressed)
    assert len(seen) > 1, "no segment of the answer was compressed"


def test_segments_follow_one_another_and_the_tail_is_full(rolling, tokens):
    request, _ = rolling.extend(tokens[PROMPT_TOKENS:])
    done = list(islice(request.plan.segments(), request.compressed))
    assert done[0].first_token == 0
    assert all(one.end_token == other.first_token for one, other in pairwise(done))
    cache, end = request.cache, done[-1].end_token
    assert cache.kept[:, :, end:].all()
    full = cache.formats[0, 0, -1]
    assert (cache.formats[:, :, end:] == full).all()
    for segment in done:
        span = slice(segment.first_token, segment.end_token)
        assert (cache.formats[:, :, span] != full).any()


def test_a_prompt_of_one_segment_is_compressed_as_a_whole(model, prefill):
    whole = MixedDim("whole", {"segments": "prompt"}).begin(model, prefill, 0.4)
    long = {"segments": "rolling", "segment_tokens": 1024}
    one = MixedDim("one", long).begin(model, prefill, 0.4)
    last = model.prefill(prefill.token_ids, 16)  # no other queries are needed
    again = MixedDim("last", {"segments": "prompt"}).begin(model, last, 0.4)
    for other in (one, again):
        assert other.compressed == 1
        assert torch.equal(whole.cache.keys, other.cache.keys)
        assert torch.equal(whole.cache.values, other.cache.values)
        assert torch.equal(whole.cache.kept, other.cache.kept)
        assert torch.equal(whole.logits, prefill.logits)


def test_later_tokens_read_the_segments_before_them(model, prefill, rolling):
    assert rolling.compressed > 1
    assert not torch.allclose(rolling.logits, prefill.logits, atol=1e-3)
    nearly_all = {**ROLLING, "formats": ["i8", "full"]}
    close = MixedDim("close", nearly_all).begin(model, prefill, 0.9)
    assert close.compressed > 1
    distances = [(r.logits - prefill.logits).norm() for r in (close, rolling)]
    assert distances[0] < distances[1] / 2


def test_pieces_make_no_difference(rolling, tokens):
    answer = tokens[PROMPT_TOKENS:]
    _, whole = rolling.extend(answer)
    request, pieces = rolling, []
    for start in range(0, len(answer), 70):
        request, logits = request.extend(answer[start : start + 70])
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces), whole, atol=2e-3, rtol=1e-3)


def test_requests_that_only_grow_are_followed_together(model, prefill, rolling, tokens):
    full = HeldRequest(model, full_cache(prefill), prefill.logits)
    few = tokens[PROMPT_TOKENS : PROMPT_TOKENS + 40]
    assert rolling.only_grows_by(len(few))
    assert not rolling.only_grows_by(ANSWER_TOKENS)
    for request, logits in zip((full, rolling), follow([full, rolling], few), strict=True):
        alone = torch.cat((request.logits.unsqueeze(0), request.extend(few)[1]))
        torch.testing.assert_close(logits, alone, atol=5e-4, rtol=1e-3)
    answers = generate([full, rolling], 4)
    assert generate([rolling], ANSWER_TOKENS)[0][:4] == answers[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ours:", "'' is no NAME=VALUE"),
        ("ours:window", "'window' is no NAME=VALUE"),
        ("ours:{window", "has no settings behind its colon"),
        ("ours:budget=0.5", "budget has a flag of its own"),
        ("ours:windw=3", "windw is unknown; did you mean window"),
    ],
)
def test_settings_of_a_method_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MixedDim.parse(text)


@pytest.mark.parametrize(
    "text", ["ours:window=32,segments=rolling", 'ours:{"window": 32, "segments": "rolling"}']
)
def test_settings_of_a_method_are_read(text):
    assert MixedDim.parse(text) == MixedDim(text, {"window": 32, "segments": "rolling"})


def test_a_later_turn_reads_what_an_earlier_one_left(model, tokens):
    """Its leases to the bit, everything behind them computed and compressed anew."""
    prefill = model.prefill(tokens)
    settings = {"segments": "prompt", "segment_tokens": SEGMENT}
    alone = MixedDim("cold", settings).begin(model, model.prefill(tokens[:PROMPT_TOKENS]), 0.4)
    # The same numbers need the same shapes of matrix products.
    first = SegmentedRequest.begin(model, prefill, alone.plan, alone.compressor)
    (shared,) = first.for_others
    warm = MixedDim("warm", settings, warm=True).begin(model, prefill, 0.4, [PROMPT_TOKENS])
    assert warm.plan.shared == (shared,)
    assert warm.compressed == 1
    assert warm.blocks_held == warm.plan.blocks_held(len(tokens))
    known = 16 * shared.end_block
    assert known == 16 * ((PROMPT_TOKENS - 16) // 16)
    assert torch.equal(warm.cache.keys[:, :, :known], first.cache.keys[:, :, :known])
    assert torch.equal(warm.cache.kept[:, :, :known], first.cache.kept[:, :, :known])
    cold = MixedDim("cold", settings, warm=False).begin(model, prefill, 0.4, [PROMPT_TOKENS])
    assert cold.plan.shared == ()
    assert not torch.equal(cold.logits, warm.logits)
    assert not warm.cache.kept[:, :, known:].all()
