"""Speculative decoding over leases: n-gram drafts, beside stock vLLM with the same drafts."""

import pytest
from serving import haystack
from test_offline import generate, same_but_for_ties
from transformers import AutoTokenizer

pytestmark = pytest.mark.server

DRAFTS = {
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
}  # fmt: skip
SOME = DRAFTS | {"num_speculative_tokens_per_batch_size": [[1, 1, 0], [2, 256, 4]]}
"""Drafts for all requests but those that run alone, so that one engine answers with and without."""
ANSWER = 140


@pytest.fixture(scope="module")
def prompts(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [
        haystack(tokenizer, tokens, 3141592 + tokens, 0.3, skip=30_000 + 40 * tokens)
        for tokens in (100, 400, 700)
    ]


def test_drafts_change_no_answer(tmp_path, model_folder, prompts):
    """At full size the answers of stock, at 30 % those without drafts; acceptance as stock's."""
    stock = generate(
        tmp_path, model_folder, prompts, max_tokens=ANSWER, speculative_config=DRAFTS
    )
    count = len(prompts)
    together = [[*range(count)], [*range(count, 2 * count)]]
    alone = [[number] for number in range(2 * count, 3 * count)]
    ours = generate(
        tmp_path, model_folder, prompts * 3, max_tokens=ANSWER, speculative_config=SOME,
        budgets=[1.0] * count + [None] * 2 * count, calls=together + alone,
        attention_backend="mixeddim", enable_prefix_caching=False,
        additional_config={"mixeddim": {"budget": 0.3, "segment_tokens": 64}},
    )  # fmt: skip
    print(stock["drafts"], ours["drafts"], ours["ranks"][0]["totals"])
    tokens, logprobs = ours["tokens"], ours["logprobs"]
    full, drafted, plain = (slice(i * count, (i + 1) * count) for i in range(3))
    assert same_but_for_ties(stock["tokens"], stock["logprobs"], tokens[full]) >= count - 1
    assert same_but_for_ties(tokens[plain], logprobs[plain], tokens[drafted]) >= count - 1
    assert ours["drafts"][2:] == [[0, 0]] * count, "who runs alone has no drafts"
    (theirs, at_full_size, at_30_percent) = (
        accepted / proposed for proposed, accepted in [*stock["drafts"], *ours["drafts"][:2]]
    )
    assert at_full_size == pytest.approx(theirs, rel=0.1)
    assert at_30_percent > 0.5 * theirs
    assert ours["usage"] == 0
