"""`mdkv demo` against a running server: what it prints is what the server did."""

import re

import pytest
from rich.console import Console

from mdkv_vllm.demo import answer
from mdkv_vllm.demo.answer import Growth, answer_plot
from mdkv_vllm.demo.command import run_demo

pytestmark = pytest.mark.server


def test_a_question_and_a_long_answer(fast_server, monkeypatch):
    monkeypatch.setattr(answer, "ANSWER_TOKENS", 600)
    console = Console(width=120, record=True)
    assert run_demo(fast_server.url, 0, console) == 0
    shown = console.export_text()
    before = int(re.search(r"prompt blocks before compression\W+(\d+)", shown)[1])
    after = int(re.search(r"prompt blocks after compression\W+(\d+)", shown)[1])
    assert after <= 0.31 * before
    plot = shown.partition("cache blocks in use while it was written")[2]
    rows = re.findall(r"│ +(\d+) │\D+(\d+) +│\D+(\d+) +│", plot)
    assert len(rows) == answer.ROWS
    tokens, compressed, full = map(int, rows[-1])
    assert tokens == 600
    # 512 of some 640 tokens keep 30 %.
    assert compressed < 0.55 * full
    assert full >= 600 // 16
    assert "compresses no answers" not in shown


def test_blocks_at_marks_that_lie_between_samples():
    growth = Growth([(1, 4), (50, 8), (90, 6)], True, 10.0)
    assert [growth.at(tokens) for tokens in (1, 20, 50, 80, 200)] == [4, 8, 8, 6, 6]
    assert Growth([], False, 0.0).at(5) == 0
    assert answer_plot({"none": Growth([], False, 0.0)}, 120).row_count == answer.ROWS + 1
