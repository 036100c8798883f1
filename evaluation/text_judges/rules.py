"""A judge of texts that counts what can be counted: declared rules, each with its weight."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from polyalign.core.config import Section
from polyalign.core.errors import UserError

FENCE = re.compile(r"\s*```(?:json)?[^\S\n]*\n(.*?)\n?\s*```\s*", re.DOTALL)
WORD = re.compile(r"\w+(?:[-'\u2019.,/]\w+)*")
"""A word, with what joins its parts: "don't", "2134-03-05", "12.5"."""


class Rule(Section):
    """One rule. It gives a text a value from 0 (broken) to 1 (kept)."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """What the value counts in the sum; negative for what is not wanted."""

    @abstractmethod
    def value(self, text: str) -> float:
        """From 0 to 1."""


class Pattern(Rule):
    """1 if a regular expression is found anywhere in the text (``present``), or if it is not (``absent``)."""

    rule: Literal["present", "absent"]

    pattern: str = Field(min_length=1)
    """A regular expression of Python's ``re``; ``^`` and ``$`` match at every line."""

    ignore_case: bool = False
    """Whether capitals count as small letters."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    def value(self, text: str) -> float:
        flags = re.MULTILINE | (re.IGNORECASE if self.ignore_case else 0)
        found = re.search(self.pattern, text, flags) is not None
        return float(found == (self.rule == "present"))


class Length(Rule):
    """1 where the length n lies within the range, n / least below it and most / n above it."""

    rule: Literal["length"]

    unit: Literal["words", "characters"] = "words"
    """What is counted."""

    least: int = Field(default=0, ge=0)
    """The shortest length that is wanted."""

    most: int | None = Field(default=None, ge=1)
    """The longest; null is any."""

    @model_validator(mode="after")
    def _says_something(self) -> Length:
        if self.most is None and self.least == 0:
            raise ValueError("a length needs least, or most, or both")
        if self.most is not None and self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        return self

    def value(self, text: str) -> float:
        length = len(text) if self.unit == "characters" else len(words(text))
        if length < self.least:
            return length / self.least
        return 1.0 if self.most is None or length <= self.most else self.most / length


class Json(Rule):
    """1 if the whole text is JSON; with ``keys`` an object, and the share of these that it has."""

    rule: Literal["json"]

    keys: tuple[str, ...] = ()
    """What the object has to have, besides anything else."""

    fenced: bool = False
    """Whether the JSON may stand in a fence of three backquotes."""

    def value(self, text: str) -> float:
        inside = FENCE.fullmatch(text) if self.fenced else None
        try:
            content = json.loads(inside[1] if inside else text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        if not self.keys:
            return 1.0
        return sum(key in content for key in self.keys) / len(self.keys) if isinstance(content, dict) else 0.0


class Keywords(Rule):
    """The share of the listed words and phrases that the text has, as whole words."""

    rule: Literal["keywords"]

    words: tuple[str, ...] = Field(min_length=1)
    """Words or phrases; several spaces, or a line's end, count as one space."""

    count: Literal["share", "all", "any"] = "share"
    """The share of them that is there; or 1 if all are there, or any one, and else 0."""

    ignore_case: bool = True
    """Whether capitals count as small letters."""

    @field_validator("words")
    @classmethod
    def _not_empty(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if not all(word.strip() for word in given):
            raise ValueError("one of the words is empty")
        return given

    def value(self, text: str) -> float:
        flags = re.IGNORECASE if self.ignore_case else 0
        found = [re.search(_whole(word), text, flags) is not None for word in self.words]
        share = sum(found) / len(found)
        return share if self.count == "share" else float(share == 1 if self.count == "all" else share > 0)


class Repetition(Rule):
    """The share of different ones among the n-grams of words: 1 where nothing is said twice. A text of fewer words has 1."""

    rule: Literal["repetition"]

    n: int = Field(default=3, ge=1)
    """Words of an n-gram."""

    def value(self, text: str) -> float:
        said = [word.casefold() for word in words(text)]
        grams = [tuple(said[start : start + self.n]) for start in range(len(said) - self.n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0


AnyRule = Annotated[Pattern | Length | Json | Keywords | Repetition, Field(discriminator="rule")]
KINDS = tuple(str(kind) for made in get_args(get_args(AnyRule)[0]) for kind in get_args(made.model_fields["rule"].annotation))
RULES: TypeAdapter[list[Any]] = TypeAdapter(Annotated[list[AnyRule], Field(min_length=1)])


class RulesJudge:
    """sum_j weight_j value_j(text), the values from 0 to 1; the prompt is not looked at.

    Args:
        rules: a list, each ``{rule: present | absent | length | json | keywords | repetition, weight: 1.0, ...}`` with the
            options of its class here.
        label: the name in scores and reports; null is ``text_rules``.

    Raises:
        UserError: an entry is none of these; it is named with what is wrong.
    """

    EXAMPLE: ClassVar[str] = "{rules: [{rule: length, least: 20, most: 80}, {rule: absent, pattern: sorry, weight: 2}]}"

    def __init__(self, *, rules: Sequence[Mapping[str, Any]], label: str | None = None):
        try:
            self.rules: list[Rule] = RULES.validate_python(rules)
        except ValidationError as error:
            raise UserError(_explained(rules, error)) from error
        self.name = label or "text_rules"
        said = json.dumps([rule.model_dump(mode="json") for rule in self.rules], sort_keys=True)
        self.version = f"1 rules {hashlib.sha256(said.encode()).hexdigest()[:8]}"

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        """A score for each text."""
        if len(conditions) != len(outputs):
            raise ValueError(f"{len(outputs)} texts for {len(conditions)} conditions")
        return [sum(rule.weight * rule.value(output) for rule in self.rules) for output in outputs]


def words(text: str) -> list[str]:
    """The words of a text, punctuation left out."""
    return WORD.findall(text)


def _whole(phrase: str) -> str:
    """A pattern that finds a phrase where no letter or digit goes on before or after it."""
    inner = r"\s+".join(re.escape(part) for part in phrase.split())
    return rf"(?<!\w){inner}(?!\w)"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _explained(rules: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    place = "rules" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in _location(first))
    found = rules if first["loc"] == () else first["input"]
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_not_found":
        place, said = f"{place}.rule", "missing, which says what kind of rule it is"
    elif first["type"] == "union_tag_invalid":
        place, said, found = f"{place}.rule", "there is no such rule", found["rule"]
        near = difflib.get_close_matches(str(found), KINDS, n=1)
        said += f", did you mean '{near[0]}'" if near else ""
    kinds = ", ".join(KINDS)
    return f"the judge 'text_rules': {place}: {said}, found {found!r}. A rule is one of {kinds}, and may have a weight"


def _location(found: Any) -> list[Any]:
    """Where it is wrong, without the name of the kind that pydantic puts after the place of a rule."""
    place = list(found["loc"])
    return place[:1] + place[2:] if len(place) > 1 else place
