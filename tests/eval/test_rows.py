"""Rows survive a stop, and reports are made of them."""

import pytest
from test_statistics import row

from mdkv_vllm.eval.report import markdown, plots
from mdkv_vllm.eval.rows import append_rows, read_rows


def test_rows_are_read_as_written(tmp_path):
    path = tmp_path / "some" / "rows.jsonl"
    assert read_rows(path) == []
    first, second = row(), row(method="ours", score=None, answer="two\nlines")
    append_rows(path, [first])
    third = row(end_share=0.3, quarters=((0.0, 1.0), (0.25, 0.5), (0.5, 0.5), (1.0, 0.0)))
    append_rows(path, [second, third])
    assert read_rows(path) == [first, second, third]


def test_the_report_shows_quarters_of_given_answers():
    given = [
        row(method="ours", share=0.25, end_share=share, quarters=((kl, 1.0),) * 4)
        for share, kl in ((0.3, 0.5), (0.5, 0.25))
    ]
    text = markdown([row(), *given])
    (line,) = [one for one in text.splitlines() if "40.0%" in one]
    assert line == f"| ours | 25.0% | 40.0% | 2 |{' 0.3750 1.000 |' * 4}"


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row()])
    path.write_text(path.read_text() + '{"example": "half')
    with pytest.raises(ValueError, match=r"rows.jsonl:2 is no row"):
        read_rows(path)


def test_the_report_counts_only_solved_tasks_in_its_headline(tmp_path):
    rows = [row(score=1.0), row(method="ours", budget=0.5, share=0.49, score=0.25)]
    rows += [row(task="hard", score=0.0), row(task="hard", method="ours", budget=0.5, score=0.0)]
    rows += [row(task="long_answer", method="ours", budget=0.5, score=None, divergence=0.125)]
    headline, rest = markdown(rows).split("## Long answers")
    assert "needle_digits at 1024" in headline
    assert "hard" not in headline
    assert "| ours | 49.0% | 1 | 0.250 |" in headline
    assert "0.1250" in rest
    assert "hard 1024" in rest
    drawn = plots(rows, tmp_path)
    assert [path.name for path in drawn] == ["accuracy.svg", "divergence.svg", "depths.svg"]
    assert all(path.read_text().startswith("<?xml") for path in drawn)
    before = drawn[0].read_bytes()
    assert plots(rows, tmp_path)[0].read_bytes() == before
