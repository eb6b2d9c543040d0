"""Scores of answers, and the names and halves of examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.tasks.example import Example, ScoringError, Turn, score

WORD = st.sampled_from(["red", "blue", "green", "seven", "house"])
WORDS = st.lists(WORD, min_size=1, max_size=8)


def turn(scoring, *answers):
    return Turn("Which?", answers, scoring, 8)


@pytest.mark.parametrize(
    ("scoring", "answers", "answer", "expected"),
    [
        ("all", ("Alpha", "beta", "gamma", "delta"), "alpha, BETA and gamma", 0.75),
        ("all", ("123",), " 123.", 1.0),
        ("any", ("kitchen", "garden"), "She is in the Garden", 1.0),
        ("any", ("kitchen", "garden"), "She is in the hall", 0.0),
        ("label", ("music",), " Music.\nMessage: more", 1.0),
        ("label", ("music",), "musical", 0.0),
        ("label", ("music",), "sport\nmusic", 0.0),
        ("label", ("music",), "", 0.0),
        ("f1", ("the red house",), "a Red house!", 1.0),
        ("f1", ("red house",), "red car", 0.5),
        ("f1", ("blue", "red house"), "red house on a hill", 2 / 3),
        ("f1", ("red red",), "red", 2 / 3),
        ("rouge", ("police kill the gunman",), "police killed the gunman", 0.75),
        ("rouge", ("police kill the gunman",), "the gunman kill police", 0.5),
        ("rouge", ("police",), "", 0.0),
    ],
)
def test_scores_worked_out_by_hand(scoring, answers, answer, expected):
    assert score(turn(scoring, *answers), answer) == pytest.approx(expected)


@given(st.sampled_from(["all", "any", "label", "f1", "rouge"]), WORDS, WORDS)
def test_a_score_is_a_share_and_the_reference_scores_one(scoring, reference, answer):
    asked = turn(scoring, " ".join(reference))
    assert 0 <= score(asked, " ".join(answer)) <= 1
    assert score(asked, " ".join(reference)) == 1


@given(WORDS, WORDS)
def test_order_matters_to_rouge_alone(reference, answer):
    asked = " ".join(reference)
    text = " ".join(answer)
    assert score(turn("rouge", asked), text) <= score(turn("f1", asked), text)


def test_agreement_is_not_scored_alone():
    with pytest.raises(ScoringError, match=r"agreement.*full attention"):
        score(Turn("Summarize.", (), "agreement", 8), "Anything.")


@pytest.mark.parametrize(
    ("scoring", "answers", "max_tokens", "message"),
    [
        ("exact", ("a",), 8, "'exact'; allowed are all, any, label, f1, rouge, agreement"),
        ("all", (), 8, "answers are empty"),
        ("all", ("",), 8, "answers are empty"),
        ("agreement", ("a",), 8, "takes none"),
        ("all", ("a",), 0, "max_tokens is 0"),
    ],
)
def test_turns_that_make_no_sense_are_refused(scoring, answers, max_tokens, message):
    with pytest.raises(ScoringError, match=message):
        Turn("Which?", answers, scoring, max_tokens)


def test_key_and_split():
    examples = [Example("lookup", i, 4096, "text", (turn("all", "a"),)) for i in range(6)]
    assert examples[3].key == "lookup/4096/3"
    assert [e.split for e in examples] == ["choose", "report"] * 3
