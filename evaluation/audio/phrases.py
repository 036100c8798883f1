"""A caption's events in the order in which it says they sound.

Rules on connectives, no model: what a caption means by "and" or by its full stops is left open, so nothing is claimed of the
order there. A caption that says no order gives one group.
"""

from __future__ import annotations

import re

Groups = tuple[tuple[str, ...], ...]
"""Groups of phrases in the order of time; inside a group no order is said."""

FORWARD = (
    "followed shortly by", "followed closely by", "followed by", "succeeded by", "after which", "and afterwards", "and finally",
    "and then", "and next", "afterwards", "finally", "then", "before", "shortly after that", "right after that", "after that",
    "after a while",
)  # fmt: skip
"""What stands after these sounds later. Longer ones come first, so that "and then" is not left with an "and"."""
BACKWARD = ("shortly after", "right after", "preceded by", "before that", "after")
"""What stands after these sounds earlier."""
TOGETHER = ("at the same time as", "and at the same time", "simultaneously with", "while", "whilst", "during")
"""What stands after these sounds at the same time."""
LEADING = ("after", "before", "while")
"""At the start of a caption these join the part up to the first comma to the rest."""
EARLIER = "earlier"
"""How a sentence goes on that says what sounded before the last event, as "Before that, ..."."""

COUNTS = {"once": 1, "twice": 2, "two times": 2, "three times": 3, "four times": 4, "five times": 5}
_KINDS = {word: kind for kind, words in (("then", FORWARD), ("after", BACKWARD), ("while", TOGETHER)) for word in words}
_WORDS = sorted(_KINDS, key=len, reverse=True)
_SPLIT = re.compile(rf"[,;]?\s*\b({'|'.join(map(re.escape, _WORDS))})\b[,]?\s*", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
_HEAD = re.compile(
    r"^(?:and|but|by|with|first|initially|there is|there are|we hear|(?:the|a) sounds? of)\b[\s,]*", re.IGNORECASE
)
_TAIL = re.compile(r"[\s,]+(?:and|first|initially|is heard|are heard|can be heard|sounds|shortly|occurs|plays)$", re.IGNORECASE)
_PAUSE = re.compile(
    r"(?:(?:a|an|the|some|short|brief|long|few|moments?|seconds?|pause|while|silence|that|this)\s*)+", re.IGNORECASE
)
_COUNT = re.compile(rf"[\s,]+({'|'.join(COUNTS)})$", re.IGNORECASE)


def split(caption: str) -> Groups:
    """The caption's event phrases in the order of time: "A drum after a bell" gives (("a bell",), ("A drum",)).

    "Before" and "then" put what follows later, "after" puts it before what stands just before it, "while" beside it. At the
    start ("After a bell, a drum sounds") they join the part up to the comma to the rest. A phrase with a count ("a bell twice")
    stands so many times, one group after the other. Sentences are put into one group unless a later one starts with a
    connective. Pauses ("after a short pause") and what points back ("After that, ...") are no events.
    """
    groups: list[list[str]] = []
    for sentence in _SENTENCES.split(caption.strip()):
        kind, rest = _leading(sentence)
        found = _clause(sentence if rest is None else rest)
        if not found:
            continue
        if kind == EARLIER:
            groups[-1:-1] = found
        elif groups and kind is None:
            groups[-1] += [phrase for group in found for phrase in group] if len(found) == 1 else []
            groups += found if len(found) > 1 else []
        else:
            groups += found
    return tuple(tuple(group) for group in _counted(groups))


def _leading(sentence: str) -> tuple[str | None, str | None]:
    """How a sentence goes on from the one before, None where it says nothing of that, and what is left of it: without its
    connective, or with it in the middle; None is the sentence as it is."""
    start = _SPLIT.match(sentence)
    if start is None or start.start() != 0 or not sentence[: start.end()].strip():
        return None, None
    word, rest = start[1].lower(), sentence[start.end() :]
    if word not in LEADING:
        return EARLIER if word == "before that" else _KINDS[word], rest
    first, comma, second = rest.partition(",")
    if not comma or not second.strip():
        return _KINDS[word], rest
    if word != "while" and not _cleaned(first):  # "After a moment, ...", "Before this, ..."
        return {"after": "then", "before": EARLIER}[word], second
    joined = {"after": "then", "before": "after", "while": "while"}[word]
    return None, f"{first.strip()} {joined} {second.strip()}"


def _clause(sentence: str) -> list[list[str]]:
    """Groups of one sentence, from the left to the right."""
    pieces = _SPLIT.split(sentence)
    groups: list[list[str]] = []
    place = -1
    for number in range(0, len(pieces), 2):
        phrase = _cleaned(pieces[number])
        if not phrase:
            continue
        kind = "then" if number == 0 or not groups else _KINDS[pieces[number - 1].lower()]
        if kind == "while":
            groups[place].append(phrase)
        elif kind == "after":
            groups.insert(place, [phrase])
        else:
            groups.append([phrase])
            place = len(groups) - 1
    return groups


def _counted(groups: list[list[str]]) -> list[list[str]]:
    """Phrases with a count, repeated; only where nothing sounds beside them."""
    made: list[list[str]] = []
    for group in groups:
        counted = _COUNT.search(group[0]) if len(group) == 1 else None
        if counted is None:
            made.append([_COUNT.sub("", phrase) for phrase in group])
        else:
            made += [[group[0][: counted.start()]]] * COUNTS[counted[1].lower()]
    return made


def _cleaned(piece: str) -> str:
    phrase = piece.strip(" \t\n,;.!?")
    while (shorter := _TAIL.sub("", _HEAD.sub("", phrase))) != phrase and shorter:
        phrase = shorter
    phrase = phrase.strip(" ,;")
    return "" if _PAUSE.fullmatch(phrase) else phrase


def says_order(caption: str) -> bool:
    """Whether a caption says that something sounds before something else."""
    return len(split(caption)) > 1
