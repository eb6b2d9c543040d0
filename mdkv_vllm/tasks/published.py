"""Examples from files as published: BABILong, RULER and LongBench, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mdkv_vllm.tasks.errors import TaskError
from mdkv_vllm.tasks.example import Example, ScoringError, Turn
from mdkv_vllm.tasks.fitting import prompt_tokens
from mdkv_vllm.tasks.text import TokenCount


@dataclass(frozen=True)
class Row:
    """One line of a file.

    Attributes:
        path: the file.
        number: the line's number, from 1.
        fields: the line's JSON object.
    """

    path: Path
    number: int
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that is text."""
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f"field {name} is {value!r:.40}; allowed is text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts."""
        value = self.fields[name]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(f"field {name} is {value!r:.40}; allowed is a list of texts")
        return tuple(value)

    def error(self, message: str) -> TaskError:
        """An error that names the file and the line."""
        return TaskError(f"{self.path}, line {self.number}: {message}")


def load_published(path: Path, count: TokenCount) -> list[Example]:
    """Read one file or every ``.jsonl`` file of a folder and of the folders in it.

    The kind of each row is known by its fields. A task is named after kind and file; its
    length is that of the file's longest prompt, so that a file stays together.

    Args:
        path: file or folder.
        count: counts the tokens of a string.

    Raises:
        TaskError: nothing to read, or a row that is none of the known kinds.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise TaskError(f"{path} is a folder without .jsonl files")
    return [example for file in files for example in _load_file(file, count)]


def _load_file(path: Path, count: TokenCount) -> list[Example]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    rows = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise TaskError(f"{path} is empty; it needs one row or more")
    examples = [_example(row, index) for index, row in enumerate(rows)]
    length = max(prompt_tokens(example, count) for example in examples)
    return [replace(example, length=length) for example in examples]


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TaskError(f"{path}, line {number}: {line:.40} is no JSON object")
    return Row(path, number, fields)


def _example(row: Row, index: int) -> Example:
    for kind, (names, read) in _KINDS.items():
        if names <= row.fields.keys():
            try:
                context, turn = read(row)
            except ScoringError as error:
                raise row.error(str(error)) from error
            task = f"{kind}_{row.path.stem.removeprefix(f'{kind}_')}"
            return Example(task, index, 0, context, (turn,))
    expected = "; ".join(f"{kind}: {', '.join(sorted(k[0]))}" for kind, k in _KINDS.items())
    raise row.error(f"fields are {', '.join(row.fields)}; expected are those of {expected}")


def _babilong(row: Row) -> tuple[str, Turn]:
    """BABILong (arXiv 2406.10149): facts of bAbI tasks scattered in the text of books."""
    question = (
        "Between the sentences of the book above are facts about people, places and things. "
        "Answer from these facts alone, in one word or a few.\n"
        f"Question: {row.text('question').strip()}"
    )
    return row.text("input"), Turn(question, (row.text("target"),), "any", 20, "Answer:")


def _ruler(row: Row) -> tuple[str, Turn]:
    """RULER (arXiv 2404.06654): context, question and the answer's beginning in one text."""
    prompt = row.text("input").rstrip()
    if prefix := str(row.fields.get("answer_prefix") or "").strip():
        prompt = prompt.removesuffix(prefix).rstrip()
    context, _, question = prompt.rpartition("\n")
    if not prefix:
        question, prefix = _cut_prefix(question)
    name = row.path.stem
    scoring = "any" if "qa" in name.split("_") else "all"
    return context, Turn(question, row.texts("outputs"), scoring, _ruler_tokens(name), prefix)


def _cut_prefix(line: str) -> tuple[str, str]:
    """Cut RULER's last line into the question and the beginning of its answer."""
    question, answer, rest = line.rpartition("Answer:")
    if not answer:
        question, answer, rest = line.rpartition("? ")
        return (question + "?", rest) if answer else (line, "")
    return question.rstrip(), answer + rest


def _ruler_tokens(name: str) -> int:
    """Tokens to generate, as RULER's own configuration has them."""
    known = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    return next((tokens for part, tokens in known.items() if part in name.split("_")), 128)


@dataclass(frozen=True)
class Recipe:
    """How a LongBench data set is asked and scored (arXiv 2308.14508, table 1).

    Attributes:
        question: with the slot ``{input}``.
        scoring: as in :class:`Turn`.
        max_tokens: tokens to generate, as in LongBench's own configuration.
        answer_prefix: begins the answer.
    """

    question: str
    scoring: str
    max_tokens: int
    answer_prefix: str = ""


_ASK = "Answer from the text above alone, in as few words as you can.\nQuestion: {input}"
_REPORT = "Write a summary of the text above, of one page at most."
_QUERY = "Answer this about the meeting above, in a few sentences.\nQuestion: {input}"
_COUNT = (
    "Some paragraphs above are repeated. How many different ones are there? Answer with the "
    "number alone."
)
_FIND = (
    "Which paragraph above does this summary belong to? Answer in the form 'Paragraph 1'.\n{input}"
)
LONGBENCH = {
    "narrativeqa": Recipe(_ASK, "f1", 128, "Answer:"),
    "qasper": Recipe(_ASK, "f1", 128, "Answer:"),
    "multifieldqa_en": Recipe(_ASK, "f1", 64, "Answer:"),
    "hotpotqa": Recipe(_ASK, "f1", 32, "Answer:"),
    "2wikimqa": Recipe(_ASK, "f1", 32, "Answer:"),
    "musique": Recipe(_ASK, "f1", 32, "Answer:"),
    "triviaqa": Recipe("{input}", "f1", 32),
    "gov_report": Recipe(_REPORT, "rouge", 512),
    "multi_news": Recipe(_REPORT, "rouge", 512),
    "qmsum": Recipe(_QUERY, "rouge", 512),
    "samsum": Recipe("{input}", "rouge", 128),
    "trec": Recipe("{input}", "label", 64),
    "passage_count": Recipe(_COUNT, "label", 32),
    "passage_retrieval_en": Recipe(_FIND, "label", 32),
}


def _longbench(row: Row) -> tuple[str, Turn]:
    name = row.text("dataset").removesuffix("_e")
    recipe = LONGBENCH.get(name)
    if recipe is None:
        raise row.error(f"dataset is {name!r}; allowed are {', '.join(LONGBENCH)}")
    question = recipe.question.replace("{input}", row.text("input"))
    answers = row.texts("answers")
    turn = Turn(question, answers, recipe.scoring, recipe.max_tokens, recipe.answer_prefix)
    return row.text("context"), turn


_KINDS: dict[str, tuple[set[str], Callable[[Row], tuple[str, Turn]]]] = {
    "longbench": ({"dataset", "input", "context", "answers"}, _longbench),
    "ruler": ({"input", "outputs"}, _ruler),
    "babilong": ({"input", "question", "target"}, _babilong),
}
