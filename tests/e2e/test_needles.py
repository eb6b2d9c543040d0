"""7-digit needles through the real server: found about as often as with a full cache.

The first token of an answer comes from prefill and never sees compression; a digit is a
token, so all seven digits come from the compressed cache but perhaps the first.
"""

import random

import pytest
from serving import haystack
from transformers import AutoTokenizer

DEPTHS = [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.97]
FEWER = DEPTHS[::2]
"""Where a prompt takes long, and nothing ever went wrong that shorter ones did not show."""


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_tokens", "depths", "enough"), [(1024, DEPTHS, 8), (2048, FEWER, 4), (4096, FEWER, 2)]
)
def test_needles_are_found(server, model_folder, num_tokens, depths, enough):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    numbers = random.Random(num_tokens)
    found = {1.0: 0, 0.5: 0, 0.25: 0, 0.125: 0}
    for depth in depths:
        needle = str(numbers.randint(1_000_000, 9_999_999))
        prompt = haystack(tokenizer, num_tokens, needle, depth)
        for budget in found:
            found[budget] += needle in server.text(prompt, budget)
    # At 4K tokens of this text the model itself begins to miss needles.
    assert found[1.0] >= enough, f"the full cache itself fails: {found}"
    for budget in (0.5, 0.25, 0.125):
        assert found[budget] >= found[1.0] - 1, found
    reports = server.status()["recent"][-3 * len(depths) :]
    shares = sorted(round(r["kept_share"], 2) for r in reports)
    assert shares[0] <= 0.13
    assert shares[-1] <= 0.5
