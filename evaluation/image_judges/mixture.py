"""Several judges as one, each brought to a common scale before it is weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation.judges import build, checked_scores, parts


class MixturePart(JudgeConfig):
    """One judge of a mixture. ``mean`` and ``deviation`` are numbers of the recipe, not of the batch: a score then means the
    same in every batch, shard and run."""

    mean: float = 0.0
    """Taken from the judge's score."""

    deviation: float = Field(default=1.0, gt=0.0)
    """What is left is divided by this."""


class MixtureJudge:
    """sum_j weight_j (score_j - mean_j) / deviation_j.

    Judges of different scales (PickScore near 20, HPSv2 near 0.28) need their means and deviations: those of a first run's
    scores, say. With the defaults it is the plain weighted sum of the recipe's list of judges.

    Args:
        judges: as in a recipe, each with ``mean`` and ``deviation`` besides ``name``, ``weight`` and ``options``.
        label: the name in scores and reports; null writes the mixture out.

    Raises:
        UserError: the list is empty, or an entry is none of a judge's.
    """

    def __init__(self, *, judges: Sequence[Mapping[str, Any]], label: str | None = None):
        self.specs = _checked(judges)
        self.judges = [build(spec) for spec in self.specs]
        self.name = label or f"mixture({' + '.join(map(_term, self.specs, self.judges))})"
        self.relative = any(getattr(judge, "relative", False) for judge in self.judges)
        """Whether a part compares outputs of one call with each other."""
        weighed = [judge for spec, judge in zip(self.specs, self.judges, strict=True) if spec.weight != 0]
        self.parts = [part for judge in weighed for part in parts(judge)]

    @cached_property
    def version(self) -> str:
        """Versions, weights, means and deviations of all parts."""
        return " + ".join(
            f"{spec.weight:g} ({judge.name} {judge.version} - {spec.mean:g}) / {spec.deviation:g}"
            for spec, judge in zip(self.specs, self.judges, strict=True)
        )

    def local_files(self) -> list[Path]:
        """Of all parts, see :class:`~polyalign.evaluation.network_judge.NetworkJudge`."""
        return [path for judge in self.judges for path in getattr(judge, "local_files", list)()]

    def score(self, conditions: Sequence[Any], outputs: Sequence[Any]) -> list[float]:
        """A number for each output; every judge sees all of them, one judge after the other.

        Raises:
            UserError: one of the judges gives something else than a finite number for each output.
        """
        totals = [0.0] * len(outputs)
        for spec, judge in zip(self.specs, self.judges, strict=True):
            scores = checked_scores(judge, conditions, outputs, where=f"it is part of '{self.name}'")
            standard = [(score - spec.mean) / spec.deviation for score in scores]
            totals = [total + spec.weight * score for total, score in zip(totals, standard, strict=True)]
        return totals


def _checked(given: Any) -> list[MixturePart]:
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f"the judge 'mixture': judges is {given!r}; a list with at least one judge is needed")
    found = []
    for index, part in enumerate(given):
        try:
            found.append(MixturePart.model_validate(part))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(key) for key in (f"judges[{index}]", *first["loc"]))
            allowed = ", ".join(MixturePart.model_fields)
            raise UserError(f"the judge 'mixture': {place}: {first['msg']} (allowed keys: {allowed})") from error
    return found


def _term(spec: MixturePart, judge: Any) -> str:
    return judge.name if spec.weight == 1 else f"{spec.weight:g} {judge.name}"
