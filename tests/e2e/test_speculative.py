"""Speculative decoding over leases: n-gram drafts, beside stock vLLM with the same drafts."""

from collections import Counter

import pytest
from serving import haystack
from test_offline import generate, same_but_for_ties
from transformers import AutoTokenizer

pytestmark = pytest.mark.server

DRAFTS = {
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
    "num_speculative_tokens_per_batch_size": [[1, 2, 0], [3, 256, 4]],
}  # fmt: skip
"""None for two requests at once or one, so that one engine answers with drafts and without."""
LENGTHS, ANSWER = (100, 400, 700), 110


def test_drafts_change_no_answer(tmp_path, model_folder):
    """At full size the answers are stock's, at 30 % those without drafts; so is the acceptance."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [
        haystack(tokenizer, tokens, 3141592 + tokens, 0.3, skip=30_000 + 40 * tokens)
        for tokens in LENGTHS
    ]
    more = [*prompts, prompts[0][:20]]
    stock = generate(
        tmp_path, model_folder, prompts + more, ANSWER, speculative_config=DRAFTS,
        calls=[[0, 1], [2], [3, 4, 5, 6]],
    )  # fmt: skip
    ours = generate(
        tmp_path, model_folder, more * 2 + prompts, ANSWER,
        budgets=[1.0] * 4 + [None] * 7, calls=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10]],
        attention_backend="mixeddim", enable_prefix_caching=False, speculative_config=DRAFTS,
        additional_config={"mixeddim": {"budget": 0.3, "segment_tokens": 64}},
    )  # fmt: skip
    tokens, logprobs = ours["tokens"], ours["logprobs"]
    assert same_but_for_ties(stock["tokens"][:3], stock["logprobs"][:3], tokens[:3]) >= 2
    assert same_but_for_ties(tokens[8:11], logprobs[8:11], tokens[4:7]) >= 2
    theirs, at_full_size, at_30_percent = stock["drafts"][2], *ours["drafts"][:2]
    assert [*stock["drafts"][:2], *ours["drafts"][2:]] == [[0, 0]] * 4, "answers without drafts"
    acceptance = theirs[1] / theirs[0]
    assert acceptance > 0.05, "no draft was accepted, so nothing is tested"
    assert at_full_size[1] / at_full_size[0] == pytest.approx(acceptance, rel=0.2)
    assert at_30_percent[1] / at_30_percent[0] > 0.5 * acceptance
    # The same segments are compressed with drafts and without, those of answers among them.
    reports = [r for r in ours["ranks"][0]["recent"] if r["prompt_tokens"] in LENGTHS]
    seen = Counter((r["prompt_tokens"], r["first_token"], r["end_token"]) for r in reports)
    assert set(seen.values()) == {2}
    assert {r["prompt_tokens"] for r in reports if r["part"] == "answer"} == set(LENGTHS)
    assert ours["usage"] == 0
