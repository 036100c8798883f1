"""Strategic masking of an answer: words about objects, their attributes and relations become gaps, which a model then fills in
while it looks at another picture (Re-Align, arXiv 2502.13146).

The paper names what is masked and not by what tool. Two ways are here: rules over word lists and patterns, which need no
network, and the model itself, asked in words (:func:`aligned` reads what it gives back). The rules know no grammar: behind a
determiner they take the words up to the next function word, verb form or mark, the last as the object and those before it as
attributes. They find most of a caption's content words and at times a verb too; English only.

| kind | by list | by pattern |
| --- | --- | --- |
| objects | what COCO names, people, shapes, plurals too | the noun behind a determiner |
| attributes | colours, sizes, shapes, materials, states | what stands between determiner and noun |
| counts | numbers, several, many | figures; with the verb before and the noun behind, whose form depends on them |
| relations | spatial and logical words and phrases | |
| verdicts | yes, no, not, never | in an answer that begins with one, the article of `there is a` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from polyalign.modalities.vlm.mask_words import BEING, DETERMINERS, FRAMES, FUNCTION, IRREGULAR, LISTS, SINGULAR
from polyalign.modalities.vlm.re_align_config import MASK, MASK_KINDS, MaskKind, ReAlignConfig

WORD = re.compile(r"\w+(?:['’-]\w+)*")
LONGEST_RUN = 4
"""Words behind a determiner that are looked at."""

Masker = Callable[[str, str], "Masked"]
"""From an answer and its question to the answer with gaps; without gaps where there is nothing to mask."""


@dataclass(frozen=True)
class Gap:
    """A stretch of an answer, in characters, how many words it has, and of which kinds they are."""

    start: int
    end: int
    words: int = 1
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Masked:
    """An answer and its gaps, in order, none touching the next."""

    answer: str
    gaps: tuple[Gap, ...]

    @property
    def pieces(self) -> list[str]:
        """What stays: one piece more than there are gaps."""
        edges = [0, *(edge for gap in self.gaps for edge in (gap.start, gap.end)), len(self.answer)]
        return [self.answer[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def taken(self) -> list[str]:
        """What stood in the gaps."""
        return [self.answer[gap.start : gap.end] for gap in self.gaps]

    def filled(self, words: Sequence[str]) -> str:
        """The answer with other words in its gaps."""
        first, *rest = self.pieces
        return first + "".join(word + piece for word, piece in zip(words, rest, strict=True))

    def text(self, mask: str = MASK) -> str:
        """The answer as it is shown, each gap as ``mask``."""
        return self.filled([mask] * len(self.gaps))


def masker_of(config: ReAlignConfig) -> Masker:
    """The rules of a configuration."""
    lists = {kind: frozenset(map(_stems, config.words.get(kind, LISTS[kind]))) for kind in MASK_KINDS}

    def mask(answer: str, question: str) -> Masked:
        marks = _Marks(answer, config, {_stem(word) for word in WORD.findall(question.lower())} if config.keep_asked else set())
        if "verdicts" in config.mask_kinds:
            marks.verdict_articles(lists["verdicts"])
        if config.nouns:
            marks.nouns(lists)
        if "counts" in config.mask_kinds:
            marks.counts(lists["counts"])
        for kind in config.mask_kinds:
            marks.listed(kind, lists[kind])
        return Masked(answer, tuple(marks.gaps()))

    return mask


class _Marks:
    """Which words of an answer are masked, and why."""

    def __init__(self, answer: str, config: ReAlignConfig, asked: set[str]):
        self.found = list(WORD.finditer(answer))
        self.words = [match[0].lower() for match in self.found]
        self.stems = [_stem(word) for word in self.words]
        self.joined = [
            not answer[one.end() : two.start()].strip() for one, two in zip(self.found, self.found[1:], strict=False)
        ]
        self.kinds: list[set[str]] = [set() for _ in self.words]
        self.wanted, self.asked = set(config.mask_kinds), asked

    def listed(self, kind: MaskKind, phrases: frozenset[tuple[str, ...]]) -> None:
        """Words and phrases of a list, unless every word of one is asked for."""
        longest = max(map(len, phrases), default=0)
        for start in range(len(self.words)):
            for size in range(min(longest, len(self.words) - start), 0, -1):
                places = range(start, start + size)
                if self._adjoin(places) and tuple(self.stems[start : start + size]) in phrases:
                    if not all(self.stems[place] in self.asked for place in places):
                        self._mark(places, kind)
                    break

    def nouns(self, lists: Mapping[str, frozenset[tuple[str, ...]]]) -> None:
        """What stands behind determiners."""
        stops = {phrase[0] for kind in ("relations", "verdicts") for phrase in lists[kind] if len(phrase) == 1}
        for place, word in enumerate(self.words):
            if word in DETERMINERS or self._counts(place, lists["counts"]):
                run = self._run(place, stops)
                kept = [place for place in run if self.stems[place] not in self.asked]
                for at in kept:
                    kind = "objects" if at == run[-1] else "attributes"
                    if kind in self.wanted:
                        self._mark([at], kind)

    def counts(self, numbers: frozenset[tuple[str, ...]]) -> None:
        """Numbers with the verb before and the noun behind, asked for or not: `is one square` becomes `are two squares`."""
        for place in range(len(self.words)):
            if not self._counts(place, numbers):
                continue
            self._mark([place], "counts")
            if place and self.joined[place - 1] and self.words[place - 1] in BEING:
                self._mark([place - 1], "counts")
            self._mark(self._run(place, set())[-1:], "counts")

    def verdict_articles(self, verdicts: frozenset[tuple[str, ...]]) -> None:
        """In an answer that says yes or no: the article of `there is a`, which becomes `no`, or the other way about."""
        if not self.words or (self.stems[0],) not in verdicts:
            return
        for place in range(2, len(self.words)):
            if (
                self.words[place - 2] == "there"
                and self.words[place - 1] in BEING
                and self.words[place] in ("a", "an", "any", "no")
            ):
                self._mark([place], "verdicts")

    def gaps(self) -> list[Gap]:
        """Marked words; neighbours with nothing but space between them are one gap, but relations and what they relate."""
        gaps: list[Gap] = []
        for place, kinds in enumerate(self.kinds):
            if not kinds:
                continue
            match = self.found[place]
            together = place and self.joined[place - 1] and ("relations" in kinds) == ("relations" in self.kinds[place - 1])
            if together and self.kinds[place - 1]:
                last = gaps.pop()
                gaps.append(Gap(last.start, match.end(), last.words + 1, tuple(sorted({*last.kinds, *kinds}))))
            else:
                gaps.append(Gap(match.start(), match.end(), 1, tuple(sorted(kinds))))
        return gaps

    def _counts(self, place: int, numbers: frozenset[tuple[str, ...]]) -> bool:
        return self.words[place].isdigit() or (self.stems[place],) in numbers

    def _run(self, place: int, stops: set[str]) -> list[int]:
        """The places behind a determiner that make up a noun with its attributes."""
        run: list[int] = []
        for at in range(place + 1, min(place + 1 + LONGEST_RUN, len(self.words))):
            word = self.words[at]
            ends = word in FUNCTION or word in DETERMINERS or self.stems[at] in stops
            if ends or not self.joined[at - 1] or (run and word.endswith("ing")):
                break
            run.append(at)
        if len(run) > 1 and (self.words[run[-1]].endswith("ed") or self._is_verb(place, run[-1])):
            run.pop()
        return [] if run and self.words[run[-1]] in FRAMES else run

    def _is_verb(self, determiner: int, last: int) -> bool:
        """Whether a word ends in s although its determiner is that of one thing: `a man holds`."""
        word = self.words[last]
        return self.words[determiner] in SINGULAR and word.endswith("s") and not word.endswith("ss")

    def _adjoin(self, places: range) -> bool:
        return all(self.joined[place] for place in places[:-1])

    def _mark(self, places: Sequence[int], kind: str) -> None:
        for place in places:
            self.kinds[place].add(kind)


def _stem(word: str) -> str:
    """A word in the singular, as far as spelling shows it."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, kept in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + kept
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def _stems(phrase: str) -> tuple[str, ...]:
    return tuple(_stem(word) for word in WORD.findall(phrase.lower()))


def aligned(reply: str, answer: str, mask: str = MASK) -> Masked | None:
    """An answer with the gaps of a model's ``reply``, which is that answer with some words replaced by ``mask``; None where the
    reply has other words than the answer, or no gap."""
    first, *rest = [piece for piece in reply.strip().split(mask)]
    if not rest or not answer.startswith(first):
        return None
    gaps, at = [], len(first)
    for number, piece in enumerate(rest):
        last = number == len(rest) - 1
        found = answer.rfind(piece, at) if last else answer.find(piece, at + 1)
        end = len(answer) - len(piece) if last else found
        if found < 0 or end <= at or (last and found != end):
            return None
        words = len(WORD.findall(answer[at:end]))
        if not words:
            return None
        gaps.append(Gap(at, end, words, ("model",)))
        at = end + len(piece)
    return Masked(answer, tuple(gaps))
