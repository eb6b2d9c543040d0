"""`mdkv eval` against the real server, and in process on the same prompts."""

import json

import pytest

from mdkv_vllm.cli import main
from mdkv_vllm.eval.rows import read_rows

pytestmark = pytest.mark.server

BUDGET = "0.5"
ARGUMENTS = ["--tasks", "needle_digits", "needle_words", "--lengths", "600", "--per-task", "3"]


def test_in_process_agrees_with_the_server(server, model_folder, tmp_path):
    """The same prompts at the same budget: the same answers, but for float ties."""
    by_server, in_process = tmp_path / "server", tmp_path / "offline"
    common = [str(model_folder), *ARGUMENTS, "--budgets", BUDGET, "--out"]
    assert main(["eval", *common, str(by_server), "--server", server.url]) == 0
    assert (
        main(
            [
                "eval",
                *common,
                str(in_process),
                "--offline",
                "--methods",
                "ours",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    served = {row.example: row for row in read_rows(by_server / "rows.jsonl")}
    ours = {
        row.example: row for row in read_rows(in_process / "rows.jsonl") if row.method == "ours"
    }
    assert served.keys() == ours.keys()
    assert len(served) == 6
    same = sum(served[key].answer.strip() == ours[key].answer.strip() for key in served)
    assert same >= 5, [(served[key].answer, ours[key].answer) for key in served]
    report = (by_server / "report.md").read_text()
    assert "needle_digits 600" in report

    # A second run measures nothing again.
    before = (by_server / "rows.jsonl").read_text()
    assert main(["eval", *common, str(by_server), "--server", server.url]) == 0
    assert (by_server / "rows.jsonl").read_text() == before
    assert all(json.loads(line)["score"] is not None for line in before.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offline", "--methods", "magic"], "--methods: 'magic' is unknown"),
        (["--offline", "--budgets", "1.5"], "--budgets: 1.5 is out of range"),
        (["--server", "http://127.0.0.1:9"], "--server http://127.0.0.1:9"),
        (["--server", "URL", "--tasks", "needle_digit"], "did you mean needle_digits?"),
    ],
)
def test_errors_name_the_flag(server, model_folder, tmp_path, capsys, arguments, message):
    arguments = [server.url if part == "URL" else part for part in arguments]
    assert main(["eval", str(model_folder), *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
