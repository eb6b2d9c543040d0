"""Intervals and summaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.eval.rows import Row
from mdkv_vllm.eval.statistics import solved_tasks, summarise, wilson


def row(**changes):
    values = {
        "example": "needle_digits/1024/0", "task": "needle_digits", "length": 1024, "depth": 0.5,
        "split": "choose", "turn": 0, "method": "full", "budget": 1.0, "share": 1.0, "score": 1.0,
        "divergence": 0.0, "agreement": 1.0, "answer": "",
    }  # fmt: skip
    return Row(**values | changes)


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [(0.8, 10, 0.490, 0.943), (1.0, 20, 0.839, 1.0), (0.0, 5, 0.0, 0.434)],
)
def test_wilson_intervals_as_tabled(mean, count, low, high):
    assert wilson(mean, count) == pytest.approx((low, high), abs=1e-3)


@given(mean=st.floats(0, 1), count=st.integers(1, 1000))
def test_the_interval_holds_the_mean(mean, count):
    low, high = wilson(mean, count)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1


def test_methods_are_summed_up_apart():
    rows = [
        row(method="ours", budget=0.5, share=0.49, score=1.0, divergence=0.1),
        row(method="ours", budget=0.5, share=0.47, score=0.0, divergence=0.3),
        row(method="ours", budget=0.25, share=0.25, score=None, divergence=None, agreement=None),
    ]
    half, quarter = summarise(rows)
    assert (half.count, half.accuracy, half.share) == (2, 0.5, pytest.approx(0.48))
    assert half.divergence == pytest.approx(0.2)
    assert (quarter.count, quarter.accuracy, quarter.divergence) == (1, None, None)


def test_solved_tasks_are_those_full_attention_solves():
    rows = [row(score=s) for s in (1, 1, 1, 1, 0)] + [row(length=2048, score=s) for s in (1, 0)]
    rows += [row(method="ours", task="other", score=1.0)]
    assert solved_tasks(rows) == {("needle_digits", 1024)}
