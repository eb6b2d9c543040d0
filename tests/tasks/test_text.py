"""Texts read, cut into sentences, and run through."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.tasks.text import Haystack, TextError, load_text, reference_prose, sentences

TEXT = 'One two three. Is it four? It is!\n\nA heading\n\n(Last one.) He said "so." End e.g. here.'


def count(text):
    return len(text.split())


def test_sentences_end_at_marks_and_blank_lines():
    assert sentences(TEXT) == [
        "One two three.", "Is it four?", "It is!", "A heading", "(Last one.)",
        'He said "so."', "End e.g. here.",
    ]  # fmt: skip


@given(st.text(st.sampled_from('aB1 .!?\n"()'), max_size=80))
def test_sentences_lose_nothing_but_space(text):
    assert "".join(" ".join(sentences(text)).split()) == "".join(text.split())


def test_reference_prose_is_long_and_has_no_grammar_or_repeats():
    text = reference_prose()
    paragraphs = text.split("\n\n")
    assert len(text.split()) > 20_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert "::=" not in text
    assert ">>>" not in text


def test_files_and_folders_are_joined_in_order(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("Second.")
    (folder / "a.txt").write_text("First.")
    (folder / "notes.md").write_text("Not read.")
    (tmp_path / "c.text").write_text("Third.\n")
    assert load_text([folder, tmp_path / "c.text"]) == "First.\n\nSecond.\n\nThird."


def test_unusable_paths_are_named(tmp_path):
    empty, binary, folder = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "folder"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    folder.mkdir()
    for path, message in [
        (tmp_path / "missing.txt", "does not exist"),
        (empty, "is empty"),
        (binary, "UTF-8"),
        (folder, "without .txt files"),
    ]:
        with pytest.raises(TextError, match=message) as error:
            load_text([path])
        assert str(path) in str(error.value)
    with pytest.raises(TextError, match="no text files"):
        load_text([])
    with pytest.raises(TextError, match="empty"):
        Haystack(" \n", count)


@given(start=st.integers(0, 20), tokens=st.integers(0, 100))
def test_a_run_has_the_tokens_asked_for_and_wraps(start, tokens):
    haystack = Haystack(TEXT, count)
    run = haystack.run(start, tokens)
    endless = haystack.sentences[start % 7 :] + haystack.sentences * 20
    assert sum(map(count, run)) == tokens
    assert " ".join(endless).startswith(" ".join(run))


def test_each_sentence_is_counted_once():
    counted = []
    haystack = Haystack(TEXT, lambda text: counted.append(text) or count(text))
    for seed in range(10):
        haystack.run(random.Random(seed).randrange(7), 50)
    assert len(counted) == len(haystack.sentences)
