"""7-digit needles through the real server: found about as often as with a full cache.

The first token of an answer comes from prefill and never sees compression; a digit is a
token, so all seven digits come from the compressed cache but perhaps the first.
"""

import random

import pytest
from serving import haystack
from transformers import AutoTokenizer

DEPTHS = [0.02, 0.2, 0.5, 0.7, 0.97]
SMALL = 0.125


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_tokens", "depths", "budgets", "enough"),
    [
        (1024, DEPTHS, [1.0, SMALL], 4),
        (2048, DEPTHS, [1.0, 0.5, 0.25, SMALL], 4),
        # At 4K tokens of this text the model itself begins to miss needles.
        (4096, DEPTHS[1:4], [1.0, SMALL], 1),
    ],
)
def test_needles_are_found(fast_server, model_folder, num_tokens, depths, budgets, enough):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    numbers = random.Random(num_tokens)
    found = dict.fromkeys(budgets, 0)
    for depth in depths:
        needle = str(numbers.randint(1_000_000, 9_999_999))
        prompt = haystack(tokenizer, num_tokens, needle, depth)
        for budget in found:
            found[budget] += needle in fast_server.text(prompt, budget)
    assert found[1.0] >= enough, f"the full cache itself fails: {found}"
    for budget in budgets[1:]:
        assert found[budget] >= found[1.0] - 1, found
    reports = fast_server.status()["recent"][-(len(budgets) - 1) * len(depths) :]
    shares = sorted(round(r["kept_share"], 2) for r in reports)
    assert shares[0] <= 0.13
    assert shares[-1] <= max(budgets[1:])
