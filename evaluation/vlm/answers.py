"""What a free answer says: yes or no, true or false, or the letter of an option.

Every benchmark's published scorer reads answers in a way of its own, and figures differ with it. ``words`` is ours: it finds
more kinds of answers and says None where it finds none, which counts as wrong and is counted apart; nothing is guessed. The
others are the published rules with their quirks:

- ``pope``: the first sentence without commas, cut at blanks; "No", "no" or "not" is no. Anything else is yes: "NO", "no!",
  nothing.
- ``mme``: "yes" or "no" in the first four letters, any case. "not", "none" and "know" are no.
- ``amber``: exactly "Yes" or "No". "yes", "No." and "Yes, it is" are wrong.
- ``exact``: "yes" or "no" without blanks, any case, as lmms-eval has it for POPE. "Yes." is wrong.
- ``vlmevalkit``: the word yes or the word no, not both. "There is not" is nothing.
- ``mmmu`` (letters): the last "(B)", else the last " B ", else an option's text. A lone article "A" is option A; where nothing
  is found a random option, which is not done here.
- ``mantis`` (letters): the first letter of the answer. "The answer is B" is T, so nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

YesNo = Callable[[str], str | None]
Letter = Callable[[str, Mapping[str, str]], str | None]
"""From an answer and the options' texts by letter to a letter."""

_YES = frozenset({"yes", "yeah", "yep", "true", "correct"})
_NO = frozenset({"no", "nope", "false", "incorrect"})
_NEGATION = re.compile(r"\b(?:not|no|none|neither|without)\b|n't\b")
_DENIED = re.compile(r"(?:\bnot|n't) (?:\w+ )?(?:true|correct)\b")
_THERE_IS = re.compile(r"^there(?:'s| is| are)\b")
_UNSURE = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible to)|unsure|uncertain|unclear|unknown|impossible to|not enough information"
    r"|do(?:n't| not) know|(?:can ?not|can't|unable to) (?:be )?(?:determine|tell|say|answer|know|judge|confirm|identify)\w*)\b"
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def _plain(text: str) -> str:
    return text.replace("\u2019", "'").lower().strip()


def unsure(text: str) -> bool:
    """Whether an answer says that it does not know."""
    return _UNSURE.search(_plain(text)) is not None


def yes_or_no(text: str) -> str | None:
    """Ours. The first word if it is a yes or a no (or true, false); else nothing for an answer that does not know; else
    the one of both that the answer has; else no for a negated statement and yes for one that begins with "there is"."""
    plain = _plain(text)
    words = _WORD.findall(plain)
    if words and words[0] in _YES | _NO:
        return "yes" if words[0] in _YES else "no"
    if unsure(plain):
        return None
    yes, no = not _YES.isdisjoint(words), not _NO.isdisjoint(words)
    if yes != no:
        return "yes" if yes and not _DENIED.search(plain) else "no"
    if yes:
        return None
    if _NEGATION.search(plain):
        return "no"
    return "yes" if _THERE_IS.match(plain) else None


def _pope(text: str) -> str:
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _mme(text: str) -> str | None:
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _amber(text: str) -> str | None:
    return {"Yes": "yes", "No": "no"}.get(text)


def _exact(text: str) -> str | None:
    plain = text.strip().lower()
    return plain if plain in ("yes", "no") else None


def _vlmevalkit(text: str) -> str | None:
    words = set(re.sub(r"[^\w\s]", " ", text.lower()).split())
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "yes" if yes else "no"


YES_NO: Mapping[str, YesNo] = {
    "words": yes_or_no,
    "pope": _pope,
    "mme": _mme,
    "amber": _amber,
    "exact": _exact,
    "vlmevalkit": _vlmevalkit,
}

_STATED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|should be|would be))?\s*[:=]?\s*\**\s*[(\[{]?"
    r"((?-i:[A-Z])|[a-z](?=[)\]}.]|\s*$))\b",  # a small letter only where it is no article
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}")
_FIRST = re.compile(r"^[\s*\"']*([A-Z])\s*[.):\]]")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")
_ARTICLE = re.compile(r"(?<![\w'])A(?= [a-z])")


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """Ours, the first of these that finds a letter of ``options``: the whole answer; "\\boxed{B}"; the last "answer is B"; an
    answer that begins with "B."; the only "(B)"; the only B that stands alone (an article is none); the option whose text the
    answer repeats, if it is the only one."""
    bare = re.sub(r"[\W_]+", "", text).upper()
    if bare in options:
        return bare
    if found := _last(_BOXED.findall(text), options) or _last(_STATED.findall(text), options):
        return found
    if (first := _FIRST.match(text)) and first[1] in options:
        return first[1]
    lone = _only(_BRACKETED.findall(text), options) or _only(_ALONE.findall(_ARTICLE.sub(" ", text)), options)
    return lone or _repeated(text, options)


def _last(found: Sequence[str], options: Mapping[str, str]) -> str | None:
    return next((one.upper() for one in reversed(found) if one.upper() in options), None)


def _only(found: Sequence[str], options: Mapping[str, str]) -> str | None:
    different = {one for one in found if one in options}
    return different.pop() if len(different) == 1 else None


def _repeated(text: str, options: Mapping[str, str]) -> str | None:
    """Longer texts first, and what one has taken is gone, so "dark red" is not also "red"."""
    left, found = _plain(text), []
    for name, said in sorted(options.items(), key=lambda one: -len(one[1])):
        plain = _plain(said).strip(".")
        pattern = rf"(?<!\w){re.escape(plain)}(?!\w)"
        if plain and re.search(pattern, left):
            found.append(name)
            left = re.sub(pattern, " ", left)
    return found[0] if len(found) == 1 else None


def _mmmu(text: str, options: Mapping[str, str]) -> str | None:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {name: text.rfind(form.format(name)) for name in options}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda name: places[name])
    if len(text.split()) > 5:
        places = {name: text.lower().rfind(said.lower()) for name, said in options.items()}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda name: places[name])
    return None


def _mantis(text: str, options: Mapping[str, str]) -> str | None:
    place = text.lower().find("final answer:")
    if place >= 0:
        text = text[place + len("final answer:") :].strip()
    stated = re.match(r"Answer: ([A-Z])", text)
    first = stated[1] if stated else next((one.upper() for one in text if one.isalpha()), "")
    if first in options:
        return first
    return next((name for name, said in options.items() if text.strip() == _without_letter(said, name)), None)


def _without_letter(said: str, name: str) -> str:
    """An option's text without the letter that some files write before it."""
    return re.sub(rf"^(?:{name}[.:]|\({name}\))", "", said).strip()


LETTERS: Mapping[str, Letter] = {"words": letter, "mmmu": _mmmu, "mantis": _mantis}
