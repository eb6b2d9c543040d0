"""Text to hide things in: from files, or from the Python that is running."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

TokenCount = Callable[[str], int]
"""Number of tokens of a text, special tokens not included."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[^\w\s]*\s+(?=[^\w\s]*[A-Z0-9])")
_MARKUP = re.compile(r"::=|>>>|\.\.\. |===|---")
_MIN_PARAGRAPH_WORDS = 8


class TextError(ValueError):
    """A text that cannot be used; the message names its path."""


def load_text(paths: Sequence[Path]) -> str:
    """Read UTF-8 texts and join them, a blank line between them.

    Args:
        paths: files, and folders of which every ``.txt`` file is read in the order of names.

    Raises:
        TextError: a path does not exist, cannot be read, or holds no text.
    """
    texts = []
    for path in paths:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise TextError(f"{path} is a folder without .txt files; allowed are text files")
        texts += [_read(file) for file in files]
    if not texts:
        raise TextError("no text files are given; allowed are files and folders of .txt files")
    return "\n\n".join(texts)


def reference_prose() -> str:
    """The prose of Python's language reference, which every Python brings along.

    Grammar, code and headings are left out, and paragraphs that several topics share appear
    once. It has some 33,000 words and is the same for all machines with one Python release.
    """
    topics = pydoc_data.topics.topics
    paragraphs = (
        " ".join(re.sub(r"(?<=\w-)\n\s*", "", paragraph).replace("*", "").split())
        for name in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", topics[name])
    )
    return "\n\n".join(dict.fromkeys(filter(_is_prose, paragraphs)))


def sentences(text: str) -> list[str]:
    """Split a text into sentences with single spaces; a blank line ends a sentence too."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        start = 0
        for end in _SENTENCE_END.finditer(line):
            found.append(line[start : end.end()].rstrip())
            start = end.end()
        found.append(line[start:])
    return [sentence for sentence in found if sentence]


def token_counter(tokenizer: Any) -> TokenCount:  # noqa: ANN401
    """Counts a string's tokens as they are inside a longer text, without special ones."""
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


class Haystack:
    """A text cut into sentences whose tokens are counted once.

    Attributes:
        sentences: the text's sentences in order.
        count: the token counter it was made with.
    """

    def __init__(self, text: str, count: TokenCount) -> None:
        """Cut a text.

        Args:
            text: the text.
            count: counts the tokens of a string.

        Raises:
            TextError: the text has no sentence.
        """
        self.sentences = sentences(text)
        self.count = count
        if not self.sentences:
            raise TextError("the haystack text is empty; it needs one sentence or more")

    def run(self, start: int, tokens: int) -> list[str]:
        """Consecutive sentences, from the beginning again after the last.

        The last sentence is cut between words where it would go beyond ``tokens``.

        Args:
            start: index of the first sentence.
            tokens: about how many tokens; rarely more.
        """
        found = []
        position = start % len(self.sentences)
        while tokens > 0:
            sentence, size = self.sentences[position], self._sizes[position]
            if size > tokens:
                words = sentence.split()
                sentence = " ".join(words[: len(words) * tokens // size])
            if sentence:
                found.append(sentence)
            tokens -= size
            position = (position + 1) % len(self.sentences)
        return found

    @cached_property
    def _sizes(self) -> list[int]:
        # Most tokenizers keep a word's leading space in its token, as inside a longer text.
        return [max(1, self.count(f" {sentence}")) for sentence in self.sentences]


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except FileNotFoundError as error:
        raise TextError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise TextError(f"{path} is empty; it needs some text")
    return text


def _is_prose(paragraph: str) -> bool:
    return (
        paragraph[:1].isupper()
        and paragraph.endswith(".")
        and len(paragraph.split()) >= _MIN_PARAGRAPH_WORDS
        and not _MARKUP.search(paragraph)
    )
