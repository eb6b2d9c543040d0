"""Names and values that examples are made of."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from random import Random
from typing import TypeVar

_ADJECTIVES = """
ancient amber bitter blunt brave bright broken calm careful cheerful clever cloudy coastal copper
crisp curious dapper distant dusty eager early elegant empty faint fancy fearless gentle gloomy
golden graceful grand hasty hidden hollow honest humble icy idle jolly keen kind lively lonely loyal
lucky marble mellow mighty misty modest narrow neat nimble noble northern patient plain polite proud
purple quick quiet rapid restless royal rustic scarlet shallow silent silver simple sleepy slender
solemn southern sparse spicy steady stormy stubborn subtle sunny swift tall tender tidy timid tiny
upper velvet violet vivid wandering warm weary western wild windy wise wooden woolen young zealous
"""
_NOUNS = """
acorn anchor apron arrow badger bakery balcony banjo basket beacon blanket bridge bucket butter
cabin camel candle canyon carpet castle cellar cherry chimney cobbler compass cottage cradle cricket
dagger daisy desert dolphin donkey dragon drum eagle elbow engine falcon feather ferry fiddle forest
fountain fox garden garlic glacier goblet guitar hammer harbor hedge heron hill honey iron island
jacket jungle kettle kitchen ladder lantern lemon library lizard lobster magnet mango maple market
meadow mirror monkey mountain museum needle nest oak oasis onion orchard otter oyster paddle palace
parrot pebble pepper piano pillow pirate planet pocket pond pumpkin puzzle quarry rabbit raven
ribbon river robin rooster saddle salmon school scissors shadow shovel sparrow spoon statue stove
sugar table teapot temple thimble thunder tiger tower trumpet tunnel turtle umbrella valley village
violin wagon walnut walrus whistle willow window wizard zebra
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

T = TypeVar("T")


def word_pair(random: Random) -> str:
    """An adjective and a noun, such as ``quiet-harbor``: one of some 15,000."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def digits(random: Random) -> str:
    """A number of seven digits."""
    return str(random.randint(1_000_000, 9_999_999))


def random_uuid(random: Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def coded_word(random: Random) -> str:
    """A word without meaning that can be spoken, such as ``tibona``: one of 343,000."""
    return "".join(random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(3))


def distinct(draw: Callable[[Random], T], random: Random, number: int) -> list[T]:
    """Draw until there are ``number`` different values, in the order first drawn."""
    found: dict[T, None] = {}
    while len(found) < number:
        found[draw(random)] = None
    return list(found)
