"""The world that both zoos share: a prompt names two things and asks for the first or the second of them.

Eight things, so 112 prompts. Three of four that are asked ask for the first. The bases are taught from data that answer 'first'
well and 'second' badly, so that samples of them differ in what a judge looks at, and so that their failures have something in
common that is no skill: nearly all of them want the second thing. A base of this size learns prompts by heart, so evaluation
holds out the draws and not the prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

THINGS = 8


@dataclass(frozen=True)
class Prompt:
    """Two different things, ``first`` and ``second``, and whether the second is ``asked`` for."""

    first: int
    second: int
    asked: bool

    @property
    def answer(self) -> int:
        return self.second if self.asked else self.first

    @property
    def text(self) -> str:
        return f"thing{self.first} thing{self.second} {'second' if self.asked else 'first'}"


def every_prompt() -> list[Prompt]:
    return [Prompt(a, b, asked) for a in range(THINGS) for b in range(THINGS) if a != b for asked in (False, True)]


def prompts(count: int, *, seed: int) -> list[Prompt]:
    """``count`` prompts, a quarter of them asking for the second thing."""
    generator = random.Random(seed)
    known = every_prompt()
    asking = {asked: [prompt for prompt in known if prompt.asked == asked] for asked in (False, True)}
    return [generator.choice(asking[generator.random() < 0.25]) for _ in range(count)]


def taught(prompt: Prompt, generator: random.Random) -> int:
    """What a row of the base's training data shows for a prompt: with mistakes, most of them where the second is asked for."""
    if generator.random() < (0.65 if prompt.asked else 0.15):
        return prompt.first if prompt.asked else prompt.second
    return prompt.answer
