"""Many-shot classification: learn six topics from labelled messages (after arXiv 2404.11018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mdkv_vllm.tasks.example import Turn
from mdkv_vllm.tasks.filling import series
from mdkv_vllm.tasks.task import Draft, Setting, Task


@dataclass(frozen=True)
class Topic:
    """Messages of one label.

    Attributes:
        templates: messages with the slots ``{thing}`` and ``{detail}``.
        things: words for the first slot.
        details: words for the second slot.
    """

    templates: tuple[str, ...]
    things: tuple[str, ...]
    details: tuple[str, ...]

    def message(self, random: Random) -> str:
        """A random message."""
        template = random.choice(self.templates)
        return template.format(thing=random.choice(self.things), detail=random.choice(self.details))


TOPICS = {
    "weather": Topic(
        (
            "They expect {thing} {detail}, so take a coat.",
            "Will there be {thing} {detail}?",
            "We woke up to {thing} and it will not end {detail}.",
            "The forecast says {thing} {detail}.",
            "After so much {thing} we hope for clear skies {detail}.",
            "Roads are closed because of {thing}, and more is on its way {detail}.",
        ),
        ("rain", "snow", "thick fog", "hail", "strong wind", "frost", "thunder", "drizzle"),
        ("tonight", "on Monday", "in the hills", "by noon", "along the coast", "at dawn"),
    ),
    "sport": Topic(
        (
            "Our {thing} team won {detail}.",
            "The {thing} coach was unhappy {detail}.",
            "She trains for the {thing} cup and scored {detail}.",
            "Who is playing {thing} {detail}?",
            "The {thing} referee stopped the game {detail}.",
            "He hurt his knee at {thing} practice {detail}.",
        ),
        ("football", "tennis", "hockey", "rugby", "volleyball", "handball", "cricket", "judo"),
        ("in the final", "after half-time", "by two points", "in the last minute", "once more"),
    ),
    "cooking": Topic(
        (
            "Fry the {thing} {detail}, then add some salt.",
            "How long does the {thing} have to boil {detail}?",
            "I chopped the {thing} and let it simmer {detail}.",
            "The recipe wants the {thing} baked {detail}.",
            "Stir the {thing} into the sauce {detail}.",
            "Grandmother always roasted her {thing} {detail}.",
        ),
        ("onions", "rice", "chicken", "carrots", "dough", "mushrooms", "beans", "potatoes"),
        ("with butter", "for ten minutes", "on low heat", "with garlic", "until golden"),
    ),
    "music": Topic(
        (
            "The {thing} solo {detail} was lovely.",
            "He tunes his {thing} {detail}.",
            "She has played the {thing} {detail} since she was six.",
            "Their new song begins with a {thing} {detail}.",
            "I cannot hear the {thing} {detail}; turn up the volume.",
            "The composer wrote a part for {thing} {detail}.",
        ),
        ("violin", "piano", "guitar", "trumpet", "drum", "flute", "cello", "organ"),
        ("in the first verse", "before the concert", "with the choir", "in the slow part"),
    ),
    "travel": Topic(
        (
            "Our flight to {thing} leaves {detail}.",
            "Is there a hotel in {thing} with rooms {detail}?",
            "I lost my passport in {thing} {detail}.",
            "We took the night train to {thing} {detail}.",
            "Pack your suitcase, the tour of {thing} starts {detail}.",
            "The ferry to {thing} was booked out {detail}.",
        ),
        ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Athens", "Nairobi", "Quebec"),
        ("next week", "in spring", "over the holidays", "early in the morning", "in August"),
    ),
    "money": Topic(
        (
            "The bank raised the rate on my {thing} {detail}.",
            "How much tax is due on the {thing} {detail}?",
            "He paid back his {thing} {detail}.",
            "The price of the {thing} went up by five percent {detail}.",
            "She opened an account for the {thing} {detail}.",
            "We cannot afford the {thing} {detail}.",
        ),
        ("loan", "savings", "rent", "shares", "mortgage", "insurance", "salary", "pension"),
        ("this quarter", "without notice", "last year", "before the deadline", "in two parts"),
    ),
}


def _plan(setting: Setting) -> Callable[[int], Draft]:
    """The size is the number of labelled messages; the new one is not among them."""
    random = setting.random
    label = random.choice(list(TOPICS))
    message = TOPICS[label].message(random)

    def shot() -> str:
        topic, other = label, message
        while other == message:
            topic = random.choice(list(TOPICS))
            other = TOPICS[topic].message(random)
        return f"Message: {other}\nTopic: {topic}"

    shots = series(shot)
    turn = Turn(
        f"Now give the topic of this message, in one word.\n\nMessage: {message}",
        (label,),
        "label",
        8,
        "Topic:",
    )

    def build(size: int) -> Draft:
        instruction = "Each message below is followed by its topic."
        return Draft("\n\n".join([instruction, *shots(size)]), (turn,))

    return build


CLASSIFICATION = (
    Task("many_shot", "classification", "the topic of a message, after many labelled ones", _plan),
)
