"""Facts that a summary omits, invents and alters, counted against the text that it summarises.

With S the facts of the source, T those of the summary and R those that a summary has to state (of the reference if there is
one to be followed, else S):

- *kept*: facts of R that T states; *supported*: facts of T that S (or the reference) states;
- *altered*: a fact of T that is not supported, and is about what a fact of S is about that T does not state: the same thing
  with another value, or a name that was denied and is now asserted. Each such pair is one alteration, not an omission and an
  invention;
- *omitted*: facts of R neither kept nor altered; *invented*: facts of T neither supported nor altered.

precision = supported / |T|, recall = kept / |R|, F1 their harmonic mean. 1 where neither text has facts.

Numbers are compared as values and in one unit: 5.90 is 5.9, and 0.5 g is 500 mg; a unit that only one of the two writes is not
held against it. A name is a fact of its own, so a laboratory value that is missing with its name and day is missing three
times.

Limits, besides those of :mod:`polyalign.evaluation.text_metrics.extraction`: names are found only if a lexicon has them in the
wording of the text; a value whose neighbour is no name of the lexicon is supported by the same value anywhere in the source,
so a true number in a wrong place goes unseen there; values of one name that change places within it (the sodium of day 1 told
for day 3) are true each by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.evaluation.text_metrics.extraction import EMPTY, VALUES, Fact, Lexicon, facts_in
from polyalign.evaluation.text_metrics.rouge import references_of

MEASURES = ("f1", "precision", "recall", "errors")


@dataclass(frozen=True)
class Findings:
    """What became of the facts; see the module's text for the words. ``altered`` are pairs (in the source, in the summary)."""

    required: tuple[Fact, ...]
    told: tuple[Fact, ...]
    kept: tuple[Fact, ...]
    supported: tuple[Fact, ...]
    omitted: tuple[Fact, ...]
    invented: tuple[Fact, ...]
    altered: tuple[tuple[Fact, Fact], ...]

    @property
    def precision(self) -> float:
        return len(self.supported) / len(self.told) if self.told else float(not self.required)

    @property
    def recall(self) -> float:
        return len(self.kept) / len(self.required) if self.required else float(not self.told)

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    @property
    def errors(self) -> int:
        """Omitted, invented and altered facts together."""
        return len(self.omitted) + len(self.invented) + len(self.altered)

    def counts(self) -> dict[str, int]:
        """Numbers of required, told, kept, omitted, invented and altered facts."""
        names = ("required", "told", "kept", "omitted", "invented", "altered")
        return {name: len(getattr(self, name)) for name in names}

    def by_kind(self) -> dict[str, dict[str, int]]:
        """:meth:`counts` for each kind of fact (number, date, time, day, and the lexicon's kinds); an alteration has the kind
        of the source's fact."""
        kinds = sorted({fact.kind for fact in (*self.required, *self.told)})
        return {kind: self._of_kind(kind).counts() for kind in kinds}

    def _of_kind(self, kind: str) -> Findings:
        def own(facts: Iterable[Fact]) -> tuple[Fact, ...]:
            return tuple(fact for fact in facts if fact.kind == kind)

        return Findings(
            required=own(self.required),
            told=own(self.told),
            kept=own(self.kept),
            supported=own(self.supported),
            omitted=own(self.omitted),
            invented=own(self.invented),
            altered=tuple(pair for pair in self.altered if pair[0].kind == kind),
        )


def compare(source: str, summary: str, *, reference: str | None = None, lexicon: Lexicon = EMPTY) -> Findings:
    """The facts of ``summary`` against those of ``source``.

    Args:
        reference: a summary whose facts are the ones to state; those it has beyond the source count as true.
        lexicon: the names that count, see :class:`~polyalign.evaluation.text_metrics.extraction.Lexicon`.
    """
    wanted = None if reference is None else facts_in(reference, lexicon)
    return compare_facts(facts_in(source, lexicon), facts_in(summary, lexicon), wanted)


def compare_facts(source: Sequence[Fact], told: Sequence[Fact], required: Sequence[Fact] | None = None) -> Findings:
    """:func:`compare` of facts that were found already."""
    required = list(source) if required is None else list(required)
    true = list(dict.fromkeys([*source, *required]))
    truth, telling = _Index(true), _Index(told)
    supported = [fact for fact in told if truth.has(fact)]
    wrong = [fact for fact in told if not truth.has(fact)]
    kept = [fact for fact in required if telling.has(fact)]
    missing = [fact for fact in required if not telling.has(fact)]
    altered = _alterations(wrong, [fact for fact in true if not telling.has(fact)], set(missing))
    before, after = {pair[0] for pair in altered}, {pair[1] for pair in altered}
    return Findings(
        required=tuple(required),
        told=tuple(told),
        kept=tuple(kept),
        supported=tuple(supported),
        omitted=tuple(fact for fact in missing if fact not in before),
        invented=tuple(fact for fact in wrong if fact not in after),
        altered=tuple(altered),
    )


def totals(findings: Sequence[Findings]) -> dict[str, float]:
    """Several summaries together: how many, how many of them without errors, their counts summed, and precision, recall and F1
    of the sums (every fact weighs alike, however many its summary has)."""
    names = ("required", "told", "kept", "supported", "omitted", "invented", "altered")
    counts = {name: sum(len(getattr(one, name)) for one in findings) for name in names}
    precision = counts.pop("supported") / counts["told"] if counts["told"] else float(not counts["required"])
    recall = counts["kept"] / counts["required"] if counts["required"] else float(not counts["told"])
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    clean = sum(one.errors == 0 for one in findings)
    return {"summaries": len(findings), "without_errors": clean, **counts, "precision": precision, "recall": recall, "f1": f1}


class _Index:
    """Facts by what could agree with them, so that thousands are looked through at once."""

    def __init__(self, facts: Sequence[Fact]):
        self._facts: dict[tuple[object, ...], list[Fact]] = {}
        for fact in facts:
            for key in self._keys(fact):
                self._facts.setdefault(key, []).append(fact)

    def has(self, fact: Fact) -> bool:
        """Whether one of the facts says the same as ``fact``."""
        return any(_agree(fact, other) for key in self._keys(fact) for other in self._facts.get(key, ()))

    @staticmethod
    def _keys(fact: Fact) -> list[tuple[object, ...]]:
        measured = (fact.kind, fact.unit, fact.value)
        return [measured, (fact.kind, "as written", fact.raw)] if fact.kind in VALUES else [measured]


def _alterations(wrong: Sequence[Fact], unsaid: Sequence[Fact], missing: Set[Fact]) -> list[tuple[Fact, Fact]]:
    """One to one: each wrong fact with the unsaid one on the same thing that a summary had to state, and is nearest in
    value."""
    left = list(unsaid)
    pairs = []
    for fact in wrong:
        options = [other for other in left if _same_thing(fact, other)]
        if options:
            nearest = min(options, key=lambda other: (other not in missing, other.unit != fact.unit, _gap(fact, other)))
            left.remove(nearest)
            pairs.append((nearest, fact))
    return pairs


def _agree(one: Fact, other: Fact) -> bool:
    """Whether two facts say the same."""
    if one.kind != other.kind or one.denied != other.denied:
        return False
    if one.kind not in VALUES:
        return one.value == other.value
    if one.about != other.about and one.known and other.known:
        return False
    if one.unit and other.unit:
        return one.unit == other.unit and one.value == other.value
    return one.raw == other.raw


def _same_thing(one: Fact, other: Fact) -> bool:
    if one.kind != other.kind:
        return False
    return one.value == other.value if one.kind not in VALUES else bool(one.about) and one.about == other.about


def _gap(one: Fact, other: Fact) -> Decimal:
    if isinstance(one.value, Decimal) and isinstance(other.value, Decimal):
        return abs(one.value - other.value)
    return Decimal(0)


def read_lexicon(path: str | Path) -> Lexicon:
    """A lexicon from a JSON file: ``{"drug": {"warfarin": ["coumadin"]}, "diagnosis": ["sepsis"]}``; the names of a kind are an
    object with other wordings, or a list.

    Raises:
        UserError: the file cannot be read, or is something else.
    """
    path = Path(path).expanduser()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: a lexicon is a JSON file, and this cannot be read as one ({error})") from error
    try:
        return Lexicon({kind: _names(kind, names) for kind, names in given.items()})
    except (AttributeError, ValueError) as error:
        said = error if isinstance(error, ValueError) else f"found {type(given).__name__}"
        raise UserError(f'{path}: a lexicon is an object like {{"drug": {{"warfarin": ["coumadin"]}}}}; {said}') from error


def _names(kind: str, names: Any) -> dict[str, list[str]]:
    listed = {name: [] for name in names} if isinstance(names, list) else names
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"the names of {kind!r} must be a list of texts or an object")
    for name, others in listed.items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise ValueError(f"the other wordings of {name!r} must be a list of texts")
    return listed


class ClinicalFactsJudge:
    """How faithful a summary is to its source: precision, recall or F1 of its facts, or the number of errors with a minus.

    The source is ``condition["source"]`` where it is there, else the prompt: an instruction around a stay is no part of it.

    Args:
        measure: ``f1``, ``precision``, ``recall`` or ``errors`` (minus the omitted, invented and altered facts).
        lexicon: a JSON file with the names that count, see :func:`read_lexicon`. Without one only numbers, dates, times and
            days are compared.
        required: ``source``, every fact of it has to be told; ``reference``, those of ``condition["reference"]``.
        label: the judge's name in scores and reports, to tell two of a kind apart.

    Raises:
        UserError: an option is none of the allowed.
    """

    name = "clinical_facts"

    def __init__(self, *, measure: str = "f1", lexicon: str | None = None, required: str = "source", label: str | None = None):
        if measure not in MEASURES:
            raise UserError(f"the judge 'clinical_facts': measure is {measure!r}; allowed: {', '.join(MEASURES)}")
        if required not in ("source", "reference"):
            raise UserError(f"the judge 'clinical_facts': required is {required!r}; allowed: source, reference")
        if lexicon is not None and not Path(lexicon).expanduser().is_file():
            raise UserError(f"the judge 'clinical_facts': lexicon is {lexicon!r}; there is no such file")
        self.measure, self.required = measure, required
        self.where = None if lexicon is None else Path(lexicon).expanduser()
        self.name = label or self.name

    @cached_property
    def version(self) -> str:
        """The rules' version, the options, and the lexicon's hash."""
        names = "no lexicon" if self.where is None else f"{self.where.name}@sha256:{sha256_of(self.where)[:16]}"
        return f"1 {self.measure} {self.required} {names}"

    def local_files(self) -> list[Path]:
        """The files on this machine that a score depends on."""
        return [] if self.where is None else [self.where]

    @cached_property
    def lexicon(self) -> Lexicon:
        return EMPTY if self.where is None else read_lexicon(self.where)

    def findings(self, condition: Mapping[str, Any], summary: str) -> Findings:
        """What became of the facts in one summary.

        Raises:
            UserError: ``required: reference`` and the condition has none, or several.
        """
        source, reference = condition.get("source", condition["prompt"]), None
        if self.required == "reference":
            references = references_of(condition, self.name)
            if len(references) > 1:
                raise UserError(f"the judge '{self.name}' takes the facts of one reference, and found {len(references)}")
            reference = references[0]
        return compare(source, summary, reference=reference, lexicon=self.lexicon)

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float]:
        found = [self.findings(condition, output) for condition, output in zip(conditions, outputs, strict=True)]
        return [-float(one.errors) if self.measure == "errors" else float(getattr(one, self.measure)) for one in found]
