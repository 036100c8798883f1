"""Answers about pictures of known objects, in the words that the worlds `scenes` and `emoji_scenes` have in common."""

from __future__ import annotations

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four")


def with_article(name: str) -> str:
    """``a cat``, ``an owl``: an before a vowel, which no name of these worlds that begins with one is an exception to."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def listed(names: Sequence[str]) -> str:
    """``a cat, an owl and a key``."""
    each = [with_article(name) for name in names]
    return each[0] if len(each) == 1 else f"{', '.join(each[:-1])} and {each[-1]}"


def caption(names: Sequence[str]) -> str:
    """What is in a picture."""
    return f"There is {listed(names)}."


def existence(name: str, there: bool) -> str:
    """Whether it is there."""
    return f"Yes, there is {with_article(name)}." if there else f"No, there is no {name}."


def counted(number: int, one: str = "object", several: str = "objects") -> str:
    """How many there are, up to four."""
    return f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {several}."
