"""Rows of the published shapes, read and refused."""

import json

import pytest

from mdkv_vllm.tasks import TaskError
from mdkv_vllm.tasks.example import score
from mdkv_vllm.tasks.published import LONGBENCH, load_published

BABILONG = {
    "input": "Mary went to the office. The sea was calm.\nJohn slept.",
    "question": "Where is Mary? ",
    "target": "office",
}
RULER = {
    "index": 7,
    "input": "Remember the numbers.\nThe magic number for a-b is: 12.\n"
    "What is the magic number for a-b? The magic number for a-b is",
    "outputs": ["12"],
    "length": 31,
}
LONGBENCH_ROW = {
    "input": "Who slept?",
    "context": "John slept.\n\nMary did not.",
    "answers": ["John", "John did"],
    "length": 5,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0a",
}


def count(text):
    return len(text.split())


def load(folder, name, *rows):
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_published(path, count)


def test_babilong(tmp_path):
    first, second = load(tmp_path, "1k_qa1.jsonl", BABILONG, {**BABILONG, "input": "Short."})
    assert first.task == second.task == "babilong_1k_qa1"
    assert (first.index, second.index) == (0, 1)
    assert first.length == second.length > count(BABILONG["input"])
    assert first.context == BABILONG["input"]
    (turn,) = first.turns
    assert turn.question.endswith("Where is Mary?")
    assert score(turn, " In the office.") == 1
    assert score(turn, " In the garden.") == 0


def test_ruler_question_and_answer_prefix_are_parted(tmp_path):
    (example,) = load(tmp_path, "niah_single_1_4096.jsonl", RULER)
    (turn,) = example.turns
    assert example.task == "ruler_niah_single_1_4096"
    assert example.context == "Remember the numbers.\nThe magic number for a-b is: 12."
    assert turn.question == "What is the magic number for a-b?"
    assert turn.answer_prefix == "The magic number for a-b is"
    assert turn.scoring == "all"
    assert score(turn, " 12.") == 1


@pytest.mark.parametrize(
    ("row", "question", "prefix"),
    [
        ({"input": "List.\nQuestion: Which? Answer: They are:"}, "Question: Which?",
         "Answer: They are:"),
        ({"input": "List.\nWhich? They are:", "answer_prefix": " They are:"}, "Which?",
         "They are:"),
        ({"input": "List.\nWhich?", "answer_prefix": " They are:"}, "Which?", "They are:"),
        ({"input": "List.\nName them."}, "Name them.", ""),
    ],
)  # fmt: skip
def test_ruler_prompts_of_other_shapes(tmp_path, row, question, prefix):
    (example,) = load(tmp_path, "cwe.jsonl", {"outputs": ["a"], **row})
    assert example.context == "List."
    assert (example.turns[0].question, example.turns[0].answer_prefix) == (question, prefix)


@pytest.mark.parametrize(
    ("name", "scoring", "max_tokens"),
    [("qa_1", "any", 32), ("vt", "all", 30), ("fwe", "all", 50), ("other", "all", 128)],
)
def test_ruler_scoring_follows_the_files_name(tmp_path, name, scoring, max_tokens):
    (example,) = load(tmp_path, f"{name}.jsonl", RULER)
    assert (example.turns[0].scoring, example.turns[0].max_tokens) == (scoring, max_tokens)


def test_longbench(tmp_path):
    (example,) = load(tmp_path, "longbench_hotpotqa.jsonl", LONGBENCH_ROW)
    (turn,) = example.turns
    assert example.task == "longbench_hotpotqa"
    assert example.context == LONGBENCH_ROW["context"]
    assert turn.question.endswith("Question: Who slept?")
    assert score(turn, "John did.") == 1
    assert 0 < score(turn, "John and Mary") < 1


@pytest.mark.parametrize("dataset", LONGBENCH)
def test_every_longbench_data_set_gives_its_own_answer_full_marks(tmp_path, dataset):
    row = {
        **LONGBENCH_ROW,
        "dataset": dataset,
        "input": "Text with {braces}.",
        "answers": ["One 1"],
    }
    (example,) = load(tmp_path, "rows.jsonl", row)
    assert score(example.turns[0], "One 1") == 1
    assert score(example.turns[0], "Two 2") == 0
    uses_input = "{input}" in LONGBENCH[dataset].question
    assert ("Text with {braces}." in example.turns[0].question) == uses_input


def test_a_folder_is_read_whole_and_keys_are_unique(tmp_path):
    (tmp_path / "ruler").mkdir()
    load(tmp_path / "ruler", "niah.jsonl", RULER, RULER)
    load(tmp_path, "qa1.jsonl", BABILONG, BABILONG)
    examples = load_published(tmp_path, count)
    assert [example.task for example in examples] == ["babilong_qa1"] * 2 + ["ruler_niah"] * 2
    assert len({example.key for example in examples}) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": "b"}, "fields are prompt, answer; expected .*ruler: input, out"),
        ({**RULER, "outputs": "12"}, "field outputs is '12'; allowed is a list"),
        ({**RULER, "outputs": []}, "answers are empty; scoring 'all' needs one"),
        ({**BABILONG, "target": ""}, "answers are empty; scoring 'any' needs one"),
        ({**BABILONG, "target": 3}, "field target is 3; allowed is text"),
        ({**LONGBENCH_ROW, "dataset": "lcc"}, "dataset is 'lcc'; allowed are narrativeqa"),
        ([1, 2], "no JSON object"),
    ],
)
def test_unknown_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(TaskError, match=rf"rows\.jsonl, line 2: .*{message}"):
        load(tmp_path, "rows.jsonl", RULER, row)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"without \.jsonl files"):
        load_published(tmp_path, count)
    with pytest.raises(TaskError, match=r"missing\.jsonl cannot be read"):
        load_published(tmp_path / "missing.jsonl", count)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(RULER) + "\n\n{not json\n")
    with pytest.raises(TaskError, match=r"broken\.jsonl, line 3: not JSON"):
        load_published(broken, count)
    broken.write_text("\n")
    with pytest.raises(TaskError, match="is empty"):
        load_published(broken, count)
