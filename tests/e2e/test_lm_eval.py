"""EleutherAI's lm_eval on the real server, against `mdkv eval` on the same examples."""

import importlib.util
import json
from pathlib import Path

import pytest

from mdkv_vllm.cli import main
from mdkv_vllm.eval.rows import read_rows

pytestmark = pytest.mark.server

# Above the server's own, so that no prompt is read from the prefix cache: it is computed alike
# however often it was asked before.
BUDGET = 0.5
TASKS = ["--tasks", "needle_digits", "followup", "--lengths", "600", "--per-task", "2"]


@pytest.fixture(scope="module")
def lm_eval():
    path = Path(__file__).parents[2] / "benchmarks" / "lm_eval" / "run.py"
    spec = importlib.util.spec_from_file_location("lm_eval_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_agrees_with_our_own_evaluation(server, model_folder, tmp_path, lm_eval, capfd):
    common = [str(model_folder), "--server", server.url, *TASKS]
    judged, ours = tmp_path / "judged", tmp_path / "ours"
    assert lm_eval([*common, "--budget", str(BUDGET), "--out", str(judged)]) == 0
    assert server.status()["recent"][-1]["kept_share"] == pytest.approx(BUDGET, abs=0.03)
    table = capfd.readouterr().out
    assert main(["eval", *common, "--budgets", str(BUDGET), "--out", str(ours)]) == 0

    samples = {
        (sample["doc"]["example"], sample["doc"]["turn"]): sample
        for path in judged.glob("*/samples_*.jsonl")
        for sample in map(json.loads, path.read_text().splitlines())
    }
    rows = {(row.example, row.turn): row for row in read_rows(ours / "rows.jsonl")}
    assert samples.keys() == rows.keys()
    assert len(rows) == 6
    for key, row in rows.items():
        assert samples[key]["resps"] == [[row.answer]]
        assert samples[key]["score"] == row.score
    for task in ("needle_digits", "followup"):
        scores = [row.score for row in rows.values() if row.task == task]
        line = next(line for line in table.splitlines() if f"mdkv_{task}_600" in line)
        assert float(line.split("|")[7]) == pytest.approx(sum(scores) / len(scores), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "long_answer"], "mdkv_long_answer_1024 has no reference answers"),
        (["--tasks", "needle_digit"], "did you mean needle_digits?"),
        (["--budget", "1.5"], "--budget: 1.5 is out of range"),
        (["--server", "http://127.0.0.1:9"], "--server http://127.0.0.1:9"),
    ],
)
def test_errors_name_the_flag(server, model_folder, tmp_path, lm_eval, capsys, arguments, message):
    common = [str(model_folder), "--server", server.url, "--out", str(tmp_path)]
    assert lm_eval([*common, *arguments]) == 2
    assert message in capsys.readouterr().err
