"""The losses there are, by the names that the setting ``loss`` takes; a new one is an entry here.

What each part means is computed in :mod:`mdkv_vllm.core.loss`; kernels read the same objects.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """How much a token at a reduced format is taken to cost.

    Attributes:
        joint: whether a format's probabilities are those of all tokens at that format together; if
            not, of one token at a time.
        own: weight of a token's own loss, 0 or 1.
        pooled: weight of the largest loss among its neighbours.
        prior: attention that every token is expected to get from later queries, over what the
            window's queries give a token of its head on average (benchmarks/NOTES.md says why).
    """

    joint: bool = False
    own: float = 1.0
    pooled: float = 0.0
    prior: float = 0.0


LOSSES = {
    "paper": Loss(joint=True),
    "solo": Loss(),
    "pooled": Loss(own=0.0, pooled=1.0),
    "hybrid": Loss(pooled=0.2, prior=0.4),
}
"""``paper`` is that of MixedDimKV (arXiv 2603.20616, section 3); the others are ours."""

POOL_BEFORE, POOL_AFTER = 8, 3
"""A token's pooled loss is the largest from so many tokens before it to so many after it.

SnapKV pools over 3 either way. Reaching further back is ours: an answer copied from the prompt is
read token by token, and the queries that read its later tokens do not exist yet.
"""
