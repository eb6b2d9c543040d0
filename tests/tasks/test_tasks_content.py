"""What is particular to single tasks: the texts hold what the questions ask for."""

import json
import re
from collections import Counter

import pytest

from mdkv_vllm.tasks import generate
from mdkv_vllm.tasks.classification import TOPICS
from mdkv_vllm.tasks.filling import hide
from mdkv_vllm.tasks.generated import REASONING_TOKENS, REPLY_TOKENS
from mdkv_vllm.tasks.text import Haystack, reference_prose

NEEDLE = re.compile(r"A special magic (\w+) for (\S+) is (\S+)\.")


@pytest.fixture(scope="module")
def haystack():
    return Haystack(reference_prose(), lambda text: len(text.split()))


def examples(haystack, name, length=2048, per_task=5):
    return list(generate([name], [length], per_task, haystack))


def body(example):
    """The context without its instruction."""
    return example.context.partition("\n\n")[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("needle_digits", r"\d{7}"),
        ("needle_words", r"[a-z]+-[a-z]+"),
        ("needle_uuid", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("multikey_1", r"\d{7}"),
        ("multikey_2", r"\d{7}"),
        ("multikey_3", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    ],
)
def test_the_needle_is_in_the_text_at_its_depth(haystack, name, value):
    for index, example in enumerate(examples(haystack, name, 4096)):
        text = body(example)
        (turn,) = example.turns
        (answer,) = turn.answers
        assert re.fullmatch(value, answer)
        (found,) = (match for match in NEEDLE.finditer(text) if match[3] == answer)
        assert f"for {found[2]} mentioned" in turn.question
        assert example.depth == index / 4
        # A sentence of haystack may lie between the depth and the next gap.
        at = found.start() / (len(text) - len(found[0]))
        assert at == pytest.approx(example.depth, abs=0.03)


@pytest.mark.parametrize("name", ["multikey_1", "multikey_2", "multikey_3"])
def test_distractors_differ_from_what_is_asked(haystack, name):
    for example in examples(haystack, name):
        asked = re.search(r"for (\S+) mentioned", example.turns[0].question)[1]
        needles = NEEDLE.findall(body(example))
        assert [v for _, key, v in needles if key == asked] == [*example.turns[0].answers]
        assert [key for _, key, v in needles if v in example.turns[0].answers] == [asked]
        assert len(needles) == 4 if name == "multikey_1" else len(needles) > 100


@pytest.mark.parametrize("name", ["multikey_2", "multikey_3"])
def test_the_text_is_nothing_but_needles(haystack, name):
    for example in examples(haystack, name):
        assert all(NEEDLE.fullmatch(line) for line in body(example).split("\n"))


@pytest.mark.parametrize(("name", "keys"), [("multivalue", 1), ("multiquery", 4)])
def test_all_values_are_asked_for(haystack, name, keys):
    for example in examples(haystack, name):
        needles = NEEDLE.findall(body(example))
        assert len({key for _, key, _ in needles}) == keys
        assert {value for _, _, value in needles} == {*example.turns[0].answers}
        assert len(example.turns[0].answers) == 4
        assert all(key in example.turns[0].question for _, key, _ in needles)


def test_the_chain_leads_to_the_value(haystack):
    for example in examples(haystack, "variable_tracking"):
        assigned = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})\.", body(example)):
            assigned[name] = assigned.get(source, source)
        assert tuple(assigned) == example.turns[0].answers
        assert len(assigned) == 5
        assert len({*assigned.values()}) == 1
        assert f"value {assigned[name]}," in example.turns[0].question


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 10, 1), (8192, 30, 3)])
def test_common_words_are_the_most_common(haystack, length, often, seldom):
    for example in examples(haystack, "common_words", length):
        words = re.findall(r"(\d+)\. (\w+)", body(example))
        assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
        counts = Counter(word for _, word in words)
        assert {word for word in counts if counts[word] == often} == {*example.turns[0].answers}
        assert len(example.turns[0].answers) == 10
        # An uncommon word may be drawn twice, but not thrice among so few.
        assert max(set(counts.values()) - {often}) <= 2 * seldom


def test_frequent_words_are_the_three_after_the_dots(haystack):
    for length in (256, 1024, 8192):
        for example in examples(haystack, "frequent_words", length):
            ranked = Counter(body(example).split()).most_common(5)
            assert ranked[0][0] == "..."
            assert tuple(word for word, _ in ranked[1:4]) == example.turns[0].answers
            assert ranked[3][1] > ranked[4][1]


def test_the_object_has_the_value_at_its_depth(haystack):
    for index, example in enumerate(examples(haystack, "json_lookup")):
        pairs = json.loads(body(example))
        key = re.search(r'"(\S+)"', example.turns[0].question)[1]
        assert pairs[key] == example.turns[0].answers[0]
        assert list(pairs).index(key) / (len(pairs) - 1) == pytest.approx(index / 4, abs=0.01)


def test_the_message_to_classify_is_new_and_the_shots_are_labelled(haystack):
    for example in examples(haystack, "many_shot", per_task=12):
        shots = re.findall(r"Message: (.+)\nTopic: (\w+)", example.context)
        message = example.turns[0].question.rpartition("Message: ")[2]
        assert message not in [shot for shot, _ in shots]
        assert {label for _, label in shots} == {*TOPICS}
        words = [
            Counter(word for shot, label in shots if label == topic for word in shot.split())
            for topic in TOPICS
        ]
        shared = [sum((Counter(message.split()) & seen).values()) for seen in words]
        assert shared[list(TOPICS).index(example.turns[0].answers[0])] == max(shared)


@pytest.mark.parametrize(("name", "turns"), [("followup", 2), ("followup_5", 5)])
def test_each_turn_of_a_conversation_asks_for_another_needle(haystack, name, turns):
    for example in examples(haystack, name):
        values = {key: value for _, key, value in NEEDLE.findall(body(example))}
        asked = [re.search(r"for (\S+) mentioned", turn.question)[1] for turn in example.turns]
        assert len({*asked}) == turns
        assert [turn.answers for turn in example.turns] == [(values[key],) for key in asked]
        places = [body(example).index(values[key]) / len(body(example)) for key in asked]
        assert places[0] == pytest.approx(example.depth, abs=0.03)
        gaps = [(later - places[0]) % 1 for later in places[1:]]
        expected = [number / turns for number in range(1, turns)]
        assert gaps == pytest.approx(expected, abs=0.04)


def test_needles_at_one_gap_keep_their_order():
    needles = [(0.0, "first"), (0.5, "second"), (0.5, "third"), (1.0, "last")]
    assert hide(needles, ["aaaa", "bbbb"]) == "first aaaa second third bbbb last"
    assert hide(needles, []) == "first second third last"


def test_a_number_is_needed_long_after_the_answer_began_with_it(haystack):
    for example in generate(["recall"], [600], 3, haystack):
        (turn,) = example.turns
        said, asked = turn.given.index(turn.answers[0]), turn.given.rindex("special magic number")
        assert len(turn.given[:said].split()) < 30
        assert len(turn.given[said:asked].split()) > 0.9 * REASONING_TOKENS


def test_a_reply_goes_on_with_its_text(haystack):
    (example,) = generate(["long_reply"], [600], 1, haystack)
    given = example.turns[0].given
    place = haystack.sentences.index(
        next(one for one in haystack.sentences if given.startswith(one))
    )
    assert len(given.split()) == pytest.approx(REPLY_TOKENS, rel=0.02)
    assert haystack.sentences[place - 2] in example.context
    assert haystack.sentences[place] not in example.context
