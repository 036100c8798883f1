"""Captions made partly wrong by rule: what rejected sounds of Audio-alpaca's strategies 2 and 3 are sampled from
(arXiv 2404.09956). The publication asked GPT-4 for five of each caption and never showed how; these rules are ours, and give
the same captions for the same seed.

A caption is cut at its connectives into phrases of events. Strategy 2 may `drop` a phrase, `replace` one by a phrase of another
caption, or `invert` a word into its opposite. Strategy 3 is about time: `order` exchanges two events or turns a connective
round, `add` puts another event beside, `remove` takes one away; it is for captions that speak of time (:func:`is_temporal`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyalign.core.randomness import permutation

TEMPORAL = ("while", "before", "after", "then", "followed")
"""A caption with one of these words is one of strategy 3's, as published."""

CONNECTIVES = (
    *("followed by", "preceded by", "and then", "while", "before", "after", "then"),
    *("together with", "along with", "as", "and", "with", ","),
)
"""Where captions are cut, longer ones first."""

OF_TIME = frozenset({"followed by", "preceded by", "and then", "while", "before", "after", "then"})
TURNED = {
    "before": "after",
    "after": "before",
    "followed by": "preceded by",
    "preceded by": "followed by",
    "while": "then",
    "then": "while",
    "and then": "while",
}
"""What makes another order of the same events."""

OPPOSITES = {
    **{"loud": "quiet", "loudly": "quietly", "fast": "slow", "quickly": "slowly", "high": "low", "near": "distant"},
    **{"man": "woman", "men": "women", "male": "female", "boy": "girl", "large": "small", "big": "little", "hard": "soft"},
    **{"starts": "stops", "opens": "closes", "opening": "closing", "approaches": "departs", "laughs": "cries"},
    **{"once": "twice", "continuous": "intermittent", "indoors": "outdoors", "adult": "child", "crowd": "person"},
}
_OPPOSITE = {**OPPOSITES, **{opposite: word for word, opposite in OPPOSITES.items()}}
_JOINT = "|".join(CONNECTIVES[:-1])
_CUT = re.compile(rf"\s*(,)\s+(?:({_JOINT})\s+)?|\s+({_JOINT})\s+", re.IGNORECASE)
_WORD = re.compile(r"[\w'-]+")

POOL = 64  # phrases of other captions that are considered for one

KINDS: Mapping[str, tuple[str, ...]] = {"2": ("drop", "replace", "invert"), "3": ("order", "add", "remove")}
"""Kinds of perturbations by strategy."""


@dataclass(frozen=True)
class Perturbed:
    """A caption made partly wrong, and how."""

    prompt: str
    kind: str


@dataclass(frozen=True)
class Caption:
    """``phrases[0] connectives[0] phrases[1] ...``: one connective fewer than phrases."""

    phrases: tuple[str, ...]
    connectives: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Caption:
        """The caption in phrases; a final full stop is left out."""
        parts = _CUT.split(" ".join(text.split()).rstrip(". "))
        joints = zip(parts[1::4], parts[2::4], parts[3::4], strict=True)
        connectives = [(behind_comma or word or comma).lower() for comma, behind_comma, word in joints]
        phrases = parts[0::4]
        kept = [place for place, phrase in enumerate(phrases) if phrase]  # ", and" leaves nothing between
        joined = [_stronger(connectives[first:second]) for first, second in zip(kept, kept[1:], strict=False)]
        return cls(tuple(phrases[place] for place in kept), tuple(joined))

    def text(self) -> str:
        """The caption in one line, spaced as people write."""
        joints = (
            f"{',' if word == ',' else f' {word}'} {phrase}"
            for word, phrase in zip(self.connectives, self.phrases[1:], strict=True)
        )
        return self.phrases[0] + "".join(joints)

    def without(self, place: int) -> Caption:
        """The caption without one phrase, and without the connective before it (of the first: behind it)."""
        joint = max(0, place - 1)
        return Caption(_left(self.phrases, place), _left(self.connectives, joint))

    def instead(self, place: int, phrase: str) -> Caption:
        return Caption((*self.phrases[:place], phrase, *self.phrases[place + 1 :]), self.connectives)

    def exchanged(self, first: int, second: int) -> Caption:
        phrases = list(self.phrases)
        phrases[first], phrases[second] = phrases[second], phrases[first]
        return Caption(tuple(phrases), self.connectives)

    def turned(self, place: int) -> Caption:
        """The caption with one connective of time turned round."""
        joints = list(self.connectives)
        joints[place] = TURNED[joints[place]]
        return Caption(self.phrases, tuple(joints))


def _left(given: tuple[str, ...], place: int) -> tuple[str, ...]:
    return given[:place] + given[place + 1 :]


def _stronger(between: Sequence[str]) -> str:
    """Of connectives in a row the one that says most: a word of time, then a word, then a comma."""
    return min(between, key=lambda word: (word not in OF_TIME, word == ","))


def is_temporal(prompt: str) -> bool:
    """Whether a caption speaks of time, so that strategy 3 is for it: it has one of ``TEMPORAL``."""
    return bool(set(word.lower() for word in _WORD.findall(prompt)) & set(TEMPORAL))


def phrases_of(prompts: Sequence[str]) -> list[str]:
    """The phrases of events in captions, each once, in the order in which they first appear."""
    return list(dict.fromkeys(phrase for prompt in prompts for phrase in Caption.of(prompt).phrases))


def perturbations(
    prompt: str, strategy: str, count: int, *, others: Sequence[str], seed: int, kinds: Sequence[str] | None = None
) -> list[Perturbed]:
    """At most ``count`` captions that differ from ``prompt`` and from each other, the kinds in turn. Fewer where the rules find
    no more: a caption of one phrase has nothing to exchange.

    Args:
        strategy: "2" or "3"; those of "3" are empty for a caption that does not speak of time.
        others: phrases of events to take in, such as :func:`phrases_of` other captions or a world's events.
        seed: which of the possible ones are taken follows from it and from the prompt.
        kinds: of the strategy's; None is all.

    Raises:
        ValueError: an unknown strategy or kind.
    """
    if strategy not in KINDS:
        raise ValueError(f"strategy must be one of {', '.join(KINDS)}, found {strategy!r}")
    asked = KINDS[strategy] if kinds is None else tuple(kinds)
    if unknown := [kind for kind in asked if kind not in KINDS[strategy]]:
        raise ValueError(f"strategy {strategy} has the kinds {', '.join(KINDS[strategy])}, found {unknown[0]!r}")
    if strategy == "3" and not is_temporal(prompt):
        return []
    caption = Caption.of(prompt)
    drawn = permutation(seed, len(others), "phrases", prompt)[:POOL] if others else []
    own = {phrase.lower() for phrase in caption.phrases}
    pool = [others[place] for place in sorted(drawn) if others[place].lower() not in own]
    queues = {kind: _shuffled(list(_RULES[kind](caption, pool)), seed, prompt, kind) for kind in asked}
    found: dict[str, str] = {}
    before = {_key(prompt), _key(caption.text())}
    while len(found) < count and any(queues.values()):
        for kind in asked:
            fresh = next((text for text in _drained(queues[kind]) if _key(text) not in before), None)
            if fresh is not None and len(found) < count:
                before.add(_key(fresh))
                found[fresh] = kind
    return [Perturbed(text, kind) for text, kind in found.items()]


def _key(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _drained(queue: list[str]) -> Iterator[str]:
    while queue:
        yield queue.pop(0)


def _shuffled(texts: list[str], seed: int, prompt: str, kind: str) -> list[str]:
    return [texts[place] for place in permutation(seed, len(texts), "perturbation", prompt, kind)] if texts else []


def _dropped(caption: Caption, _pool: Sequence[str]) -> Iterator[str]:
    if len(caption.phrases) > 1:
        yield from (caption.without(place).text() for place in range(len(caption.phrases)))


def _replaced(caption: Caption, pool: Sequence[str]) -> Iterator[str]:
    yield from (caption.instead(place, phrase).text() for place in range(len(caption.phrases)) for phrase in pool)


def _inverted(caption: Caption, _pool: Sequence[str]) -> Iterator[str]:
    text = caption.text()
    for found in _WORD.finditer(text):
        opposite = _OPPOSITE.get(found[0].lower())
        if opposite is not None:
            yield text[: found.start()] + opposite + text[found.end() :]
    for place, word in enumerate(caption.connectives):
        if word in ("before", "after", "followed by", "preceded by"):
            yield caption.turned(place).text()


def _reordered(caption: Caption, _pool: Sequence[str]) -> Iterator[str]:
    """ "A while B" is "B while A": there only the connective is turned round."""
    for place, word in enumerate(caption.connectives):
        if word in OF_TIME:
            yield caption.turned(place).text()
            if word != "while":
                yield caption.exchanged(place, place + 1).text()


def _added(caption: Caption, pool: Sequence[str]) -> Iterator[str]:
    for phrase in pool:
        yield Caption((*caption.phrases, phrase), (*caption.connectives, "then")).text()
        yield Caption((phrase, *caption.phrases), ("then", *caption.connectives)).text()


_RULES: Mapping[str, Callable[[Caption, Sequence[str]], Iterator[str]]] = {
    "drop": _dropped,
    "replace": _replaced,
    "invert": _inverted,
    "order": _reordered,
    "add": _added,
    "remove": _dropped,
}
